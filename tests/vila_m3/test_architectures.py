"""The released sizes on the meta device: names, shapes and parameter counts, without a weight."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from vila_m3.checkpoint import PARTS
from vila_m3.export import released_name
from vila_m3.model import VilaM3ForConditionalGeneration, build_model

SIZES = ("3b", "8b", "13b", "40b")
# The recorded tiny checkpoint of the same parts; names differ from the size's in layer numbers alone.
TWINS = {"3b": "A_siglip_llama3", "8b": "A_siglip_llama3", "13b": "A_siglip_llama3", "40b": "D_intern_yi_hermes"}
# Parameters: LLM, vision tower (with the parts that are never run), projector. Also in docs/README.md.
COUNTS = {
    "3b": (2_701_560_320, 428_225_600, 18_364_416),
    "8b": (8_030_269_440, 428_225_600, 35_668_992),
    "13b": (13_015_864_320, 428_225_600, 49_826_816),
    "40b": (34_388_917_248, 5_536_496_000, 143_170_560),
}


def architecture(repository: Path, size: str) -> dict[str, Any]:
    return json.loads((repository / f"vila_m3_bundle/configs/size_{size}.json").read_text())["model_config"]


@pytest.fixture(scope="module")
def models(repository: Path) -> dict[str, VilaM3ForConditionalGeneration]:
    with torch.device("meta"):
        return {size: build_model(architecture(repository, size)) for size in SIZES}


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_stated_ones(models: dict[str, Any], size: str) -> None:
    model = models[size]
    counts = tuple(
        sum(value.numel() for value in part.parameters())
        for part in (model.llm, model.vision_tower, model.mm_projector)
    )
    assert counts == COUNTS[size]


def test_the_docs_state_these_counts(repository: Path) -> None:
    page = (repository / "vila_m3_bundle/docs/README.md").read_text()
    for size, counts in COUNTS.items():
        row = " | ".join(f"{count:,}" for count in counts)
        assert f"| {size.upper()} | {row} |" in page


@pytest.mark.parametrize(("size", "megabytes"), [("3b", 36.7), ("8b", 71.3), ("13b", 99.7)])
def test_projector_files_have_the_known_size(models: dict[str, Any], size: str, megabytes: float) -> None:
    count = sum(value.numel() for value in models[size].mm_projector.parameters())
    assert round(2 * count / 1e6, 1) == megabytes


@pytest.mark.parametrize(("size", "rows"), [("3b", 32000), ("8b", 128257), ("13b", 32000), ("40b", 64000)])
def test_vocabularies_have_the_known_size(models: dict[str, Any], size: str, rows: int) -> None:
    assert models[size].get_input_embeddings().weight.shape[0] == rows


@pytest.mark.parametrize(("size", "count"), [("3b", 196), ("8b", 196), ("13b", 196), ("40b", 256)])
def test_an_image_takes_the_known_number_of_tokens(models: dict[str, Any], size: str, count: int) -> None:
    assert models[size].tokens_per_image == count


def without_numbers(names: Any) -> set[str]:
    return {re.sub(r"layers\.\d+\.", "layers.N.", name) for name in names}


@pytest.mark.parametrize("size", SIZES)
def test_names_are_those_of_the_released_layout(models: dict[str, Any], golden: Path, size: str) -> None:
    for part in PARTS:
        names = [name for name in models[size].state_dict() if name.startswith(f"{part}.")]
        written = [released_name(name, models[size].config) for name in names]
        with safe_open(golden / TWINS[size] / part / "model.safetensors", "pt") as opened:
            recorded = list(opened.keys())
        kept = (lambda names: set(names)) if part == "mm_projector" else without_numbers
        assert kept(written) == kept(recorded), part
        layers = {int(number) for number in re.findall(r"\blayers\.(\d+)\.", " ".join(written))}
        if part != "mm_projector":
            config = models[size].config
            sub = config.text_config if part == "llm" else config.vision_config
            assert layers == set(range(sub.num_hidden_layers))


@pytest.mark.parametrize(
    ("size", "name", "shape"),
    [
        ("3b", "llm.model.layers.31.mlp.down_proj.weight", (2560, 6912)),
        ("8b", "llm.model.layers.31.self_attn.k_proj.weight", (1024, 4096)),
        ("8b", "llm.lm_head.weight", (128257, 4096)),
        ("8b", "mm_projector.layers.2.weight", (4096, 4608)),
        ("8b", "vision_tower.embeddings.position_embedding.weight", (729, 1152)),
        ("8b", "vision_tower.encoder.layers.26.mlp.fc1.weight", (4304, 1152)),
        ("13b", "llm.model.layers.39.self_attn.q_proj.weight", (5120, 5120)),
        ("40b", "llm.model.layers.59.self_attn.v_proj.weight", (1024, 7168)),
        ("40b", "vision_tower.encoder.layers.44.attn.qkv.weight", (9600, 3200)),
        ("40b", "vision_tower.embeddings.position_embedding", (1, 1025, 3200)),
        ("40b", "mm_projector.layers.2.weight", (7168, 12800)),
    ],
)
def test_shapes_are_the_released_ones(models: dict[str, Any], size: str, name: str, shape: tuple[int, ...]) -> None:
    assert tuple(models[size].state_dict()[name].shape) == shape
