"""What the original code computed, recorded in shared/golden/vila, against what this code computes.

fp32, eager attention, CPU. The tolerances are those of :data:`vila_m3.parity.TOLERANCES`.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vila_m3.checkpoint import load_checkpoint, load_processor
from vila_m3.configuration import VilaM3Config
from vila_m3.image_processor import VilaM3ImageProcessor, image_processor_for
from vila_m3.parity import TOLERANCES, Parity, read_cases, read_pictures, read_recording
from vila_m3.processor import VilaM3Processor, build_processor
from vila_m3.projector import MultimodalProjector, SpaceToDepth, token_count
from vila_m3.tokenizer import load_tokenizer
from vila_m3_common.chat_template import TEMPLATES, Rendered, get_template, render
from vila_m3_common.conversation import IMAGE_TOKEN, Conversation

CHECKPOINTS = ("A_siglip_llama3", "B_clip_vicuna", "D_intern_yi_hermes")
# Recorded tokenizer -> folder, and the template that it was recorded with.
TOKENIZERS = {
    "llama3_nobos": ("A_siglip_llama3/llm", "llama_3"),
    "llama3_autobos": ("tok_llama3_autobos", "llama_3"),
    "vicuna": ("B_clip_vicuna/llm", "vicuna_v1"),
    "hermes": ("D_intern_yi_hermes/llm", "hermes-2"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_every_recorded_quantity_is_reproduced(golden: Path, name: str, attention: str) -> None:
    # The pictures behind D were noise and are not recorded.
    pictures = None if name.startswith("D") else read_pictures(str(golden), 3)
    parity = Parity(
        load_checkpoint(golden / name, attention=attention),
        load_processor(golden / name),
        read_recording(str(golden / f"{name}.npz")),
        read_cases(str(golden / "cases.json"), name),
        pictures,
    )
    rows = list(parity.rows())
    assert {row.name: row.difference for row in rows if not row.is_equal} == {}
    assert parity.unknown == []
    kinds = Counter(row.kind for row in rows)
    assert kinds["logits"] == 6
    assert kinds["loss"] == 3
    assert kinds["gradient"] == (12 if name.startswith("A") else 0)


def test_the_tolerances_are_the_promised_ones() -> None:
    assert TOLERANCES == {"embedding": 1e-5, "logits": 2e-5, "loss": 1e-5, "gradient": 1e-4, "exact": 0.0}


def image_processor(key: str) -> VilaM3ImageProcessor:
    """Make the processor of a key such as ``siglip72.pad.img0``."""
    tower, ratio, _ = key.split(".")
    kind = tower.rstrip("0123456789")
    types = {"siglip": "siglip_vision_model", "clip": "clip_vision_model", "intern": "intern_vit_6b"}
    vision = {"model_type": types[kind], "image_size": int(tower.removeprefix(kind))}
    return image_processor_for(VilaM3Config(vision_config=vision, image_aspect_ratio=ratio))


def test_preprocessing_is_equal_on_every_recorded_key(golden: Path) -> None:
    with np.load(golden / "preprocess.npz") as recorded:
        assert len(recorded.files) == 21
        for key in recorded.files:
            picture = Image.open(golden / f"{key.split('.')[2]}.png")
            np.testing.assert_allclose(
                image_processor(key).to_pixel_values(picture), recorded[key], rtol=0, atol=1e-6, err_msg=key
            )


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu", "mlp3x_gelu", "mlp_downsample"])
@pytest.mark.parametrize("grid", [4, 5, 27])
def test_projectors_equal_the_recorded_ones(golden: Path, kind: str, grid: int) -> None:
    recorded = np.load(golden / "projectors.npz")
    projector = MultimodalProjector(kind, 8, 12)
    prefix = f"{kind}|w|"
    weights = {key.removeprefix(prefix): torch.from_numpy(recorded[key]) for key in recorded if key.startswith(prefix)}
    projector.load_state_dict(weights)
    with torch.no_grad():
        out = projector(torch.from_numpy(recorded[f"{kind}|in|{grid}"]))
    np.testing.assert_allclose(out.numpy(), recorded[f"{kind}|out|{grid}"], rtol=0, atol=1e-5)
    assert token_count(kind, grid * grid) == out.shape[1]


@pytest.mark.parametrize("grid", [4, 5])
def test_joined_tokens_come_in_the_recorded_order(golden: Path, grid: int) -> None:
    recorded = np.load(golden / "projectors.npz")[f"downsample_index_{grid}x{grid}"]
    numbers = torch.arange(float(grid * grid)).reshape(1, -1, 1)  # padding is 0, like the first token
    np.testing.assert_array_equal(SpaceToDepth()(numbers)[0].numpy().reshape(-1), recorded.reshape(-1))


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_3", "hermes-2"])
def test_templates_render_the_recorded_strings(golden: Path, name: str) -> None:
    recorded = json.loads((golden / "templates.json").read_text())
    texts, expected = recorded["turns"], recorded["templates"][name]
    picture = np.zeros((2, 2, 3), np.uint8)

    def rendered(count: int) -> str:
        conversation = Conversation()
        for index, text in enumerate(texts[:count]):
            images = [picture] * text.count(IMAGE_TOKEN)
            conversation.add("assistant" if index % 2 else "user", text, images)
        return render(conversation, get_template(name)).text

    assert rendered(6) == expected["three_turn_full"]
    assert rendered(5) == expected["three_turn_generate_None"]
    assert rendered(1) == expected["first_turn_generate"]


def processor_of(golden: Path, name: str) -> VilaM3Processor:
    folder, template = TOKENIZERS[name]
    config = VilaM3Config(chat_template=template, vision_config={"image_size": 14, "patch_size": 14})
    return build_processor(load_tokenizer(golden / folder), config)


@pytest.fixture(scope="module")
def tokenization(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "tokenization.json").read_text())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_token_ids_equal_the_recorded_ones(golden: Path, tokenization: dict[str, Any], name: str) -> None:
    processor, expected = processor_of(golden, name), tokenization[name]
    for text, ids in expected["tokenizer_plain"].items():
        assert processor.tokenizer(text)["input_ids"] == ids, text
    for text, ids in expected["tokenizer_image_token"].items():
        assert processor.tokenize_chunks(Rendered(text, ()))[0] == ids, text


def recorded_conversation(entry: dict[str, Any]) -> Conversation:
    conversation = Conversation()
    for message in entry["preprocess_multimodal"]:
        text = message["value"]
        images = [np.zeros((2, 2, 3), np.uint8)] * text.count(IMAGE_TOKEN)
        conversation.add("user" if message["from"] == "human" else "assistant", text, images)
    return conversation


@pytest.mark.parametrize("name", TOKENIZERS)
def test_supervised_tokens_equal_the_recorded_ones(golden: Path, tokenization: dict[str, Any], name: str) -> None:
    processor, expected = processor_of(golden, name), tokenization[name]
    conversation = recorded_conversation(expected)
    tokens, labels = processor.tokenize_chunks(render(conversation, processor.template))
    assert tokens == expected["sft_no_system=False"]["input_ids"]
    assert labels == expected["sft_no_system=False"]["labels"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_alignment_stage_tokenizes_as_recorded(golden: Path, tokenization: dict[str, Any], name: str) -> None:
    processor, expected = processor_of(golden, name), tokenization[name]
    conversation = Conversation()
    conversation.add("user", "<image>\nDescribe.", [np.zeros((2, 2, 3), np.uint8)])
    conversation.add("assistant", "The heart is normal in size.")
    processor.template_name = "plain"
    tokens, labels = processor.tokenize_chunks(render(conversation, processor.template))
    assert tokens == expected["plain_stage1"]["input_ids"]
    assert labels == expected["plain_stage1"]["labels"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_turn_ends_at_the_recorded_stop_tokens(golden: Path, tokenization: dict[str, Any], name: str) -> None:
    processor = processor_of(golden, name)
    stops = processor.tokenizer.convert_ids_to_tokens(sorted(processor.stop_ids))
    assert sorted(stops) == sorted(tokenization[name]["stop_tokens"])


def test_every_template_has_a_stop() -> None:
    assert {name: template.stop for name, template in TEMPLATES.items()} == {
        "plain": "\n",
        "vicuna_v1": "</s>",
        "llama_3": "<|eot_id|>",
        "hermes-2": "<|im_end|>",
    }
