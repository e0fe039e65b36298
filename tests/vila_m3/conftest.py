"""A tiny VLM with random weights, its tokenizer, and conversations about phantoms."""

from pathlib import Path
from typing import Any

import pytest
import torch

from vila_m3.model import VilaM3, build_model
from vila_m3.phantom_conversations import ConversationMaker, build_pool
from vila_m3.processor import Processor, build_processor
from vila_m3.training import start_tokenizer

TINY: dict[str, Any] = {
    "chat_template": "llama_3",
    "mm_projector_type": "mlp_downsample",
    "select_layer": -2,
    "llm": {
        "vocab_size": 1024,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "vision_tower": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 42,
        "patch_size": 14,
    },
}


@pytest.fixture(scope="session")
def cards(repository: Path) -> str:
    return (repository / "vila_m3_bundle/configs/model_cards.txt").read_text()


@pytest.fixture(scope="session")
def maker(cards: str) -> ConversationMaker:
    return ConversationMaker(build_pool(1, first_seed=9000, show_progress=False), cards)


@pytest.fixture
def model() -> VilaM3:
    torch.manual_seed(0)
    return build_model(TINY).eval()


@pytest.fixture(scope="session")
def tokenizer(maker: ConversationMaker, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return start_tokenizer(None, maker, 1024, "llama_3", str(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture
def processor(model: VilaM3, tokenizer: Any) -> Processor:
    return build_processor(tokenizer, model)
