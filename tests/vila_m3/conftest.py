"""A tiny VLM with random weights, its tokenizer, and conversations about phantoms."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vila_m3.model import VilaM3ForConditionalGeneration, build_model
from vila_m3.phantom_conversations import ConversationMaker, build_pool
from vila_m3.processor import VilaM3Processor
from vila_m3.training import make_processor, start_tokenizer

TINY: dict[str, Any] = {
    "chat_template": "llama_3",
    "drops_chunk_starts": False,
    "text_config": {
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 14,
    },
}


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    """Outputs recorded from the original VILA on tiny random weights."""
    return shared / "golden/vila"


@pytest.fixture(scope="session")
def cards(repository: Path) -> str:
    return (repository / "vila_m3_bundle/configs/model_cards.txt").read_text()


@pytest.fixture(scope="session")
def maker(cards: str) -> ConversationMaker:
    return ConversationMaker(build_pool(1, first_seed=9000, show_progress=False), cards)


@pytest.fixture
def tiny_config() -> dict[str, Any]:
    return TINY


@pytest.fixture
def model() -> VilaM3ForConditionalGeneration:
    torch.manual_seed(0)
    return build_model(TINY).eval()


@pytest.fixture(scope="session")
def tokenizer(maker: ConversationMaker, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return start_tokenizer(None, maker, 1024, "llama_3", str(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def processor(model: VilaM3ForConditionalGeneration, tokenizer: Any) -> VilaM3Processor:
    return make_processor(tokenizer, model)
