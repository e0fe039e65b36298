"""Numbers recorded from the original code: shared/golden/vila, checkpoint A (SigLIP, mlp_downsample, Llama)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from vila_m3.model import IMAGE_TOKEN_ID, VilaM3, load_model, save_model
from vila_m3.projector import MultimodalProjector, SpaceToDepth
from vila_m3_common.errors import UserError


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict[str, np.ndarray]:
    return dict(np.load(shared / "golden/vila/A_siglip_llama3.npz"))


@pytest.fixture(scope="module")
def original(shared: Path) -> VilaM3:
    return load_model(shared / "golden/vila/A_siglip_llama3")


def expand(input_ids: np.ndarray, tokens_per_image: int) -> torch.Tensor:
    """The recorded ids have one place per image, ours one per visual token."""
    expanded: list[int] = []
    for token in input_ids.tolist():
        expanded += [IMAGE_TOKEN_ID] * tokens_per_image if token == IMAGE_TOKEN_ID else [token]
    return torch.tensor([expanded])


def test_projector_outputs_equal_the_recorded_ones(original: VilaM3, recorded: dict[str, np.ndarray]) -> None:
    with torch.no_grad():
        features = original.encode_images(torch.from_numpy(recorded["pixel_values"]))
    np.testing.assert_allclose(features.numpy(), recorded["projector_out"], atol=1e-5)


@pytest.mark.parametrize(
    ("case", "images"), [("single", [0]), ("two_images", [0, 1]), ("multi_turn", [1, 2, 0]), ("text_only", [])]
)
def test_logits_equal_the_recorded_ones(
    original: VilaM3, recorded: dict[str, np.ndarray], case: str, images: list[int]
) -> None:
    pixel_values = torch.from_numpy(recorded["pixel_values"][images]) if images else None
    input_ids = expand(recorded[f"{case}.input_ids"][0], original.tokens_per_image)
    with torch.no_grad():
        logits = original(input_ids, pixel_values)
    np.testing.assert_allclose(logits.numpy(), recorded[f"{case}.logits"], atol=2e-5)


@pytest.mark.parametrize("grid", [4, 5, 27])
def test_the_downsampling_projector_equals_the_recorded_one(shared: Path, grid: int) -> None:
    recorded = np.load(shared / "golden/vila/projectors.npz")
    projector = MultimodalProjector("mlp_downsample", 8, 12)
    prefix = "mlp_downsample|w|"
    weights = {key.removeprefix(prefix): torch.from_numpy(recorded[key]) for key in recorded if key.startswith(prefix)}
    projector.load_state_dict(
        {key if key.startswith("layers.") else f"layers.{key}": value for key, value in weights.items()}
    )
    with torch.no_grad():
        out = projector(torch.from_numpy(recorded[f"mlp_downsample|in|{grid}"]))
    np.testing.assert_allclose(out.numpy(), recorded[f"mlp_downsample|out|{grid}"], atol=1e-5)
    assert projector.token_count(grid * grid) == out.shape[1]


def test_joined_tokens_are_in_column_major_order() -> None:
    features = torch.arange(16.0).reshape(1, 16, 1)
    joined = SpaceToDepth()(features)
    assert joined[0].tolist() == [[0, 1, 4, 5], [8, 9, 12, 13], [2, 3, 6, 7], [10, 11, 14, 15]]


def test_a_saved_model_loads_with_the_same_weights(model: VilaM3, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=0)
    assert loaded.select_layer == model.select_layer
    assert loaded.chat_template == model.chat_template


def test_images_and_places_must_agree(model: VilaM3) -> None:
    with pytest.raises(ValueError, match="4 image places in input_ids for 8 image tokens"):
        model(torch.tensor([[1, *[IMAGE_TOKEN_ID] * 4]]), torch.zeros(2, 3, 42, 42))


def test_a_missing_part_is_named(model: VilaM3, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    (tmp_path / "mm_projector/config.json").unlink()
    with pytest.raises(UserError, match="mm_projector/config.json is missing; a checkpoint is a folder"):
        load_model(tmp_path)


def test_a_checkpoint_of_another_shape_names_the_tensor(model: VilaM3, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "llm/config.json").read_text())
    (tmp_path / "llm/config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    with pytest.raises(UserError, match=r"model.embed_tokens.weight \(1024, 32\) != \(1000, 32\)"):
        load_model(tmp_path)


def test_a_truncated_file_is_refused(model: VilaM3, tmp_path: Path) -> None:
    save_model(model, tmp_path)
    path = tmp_path / "llm/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match="are damaged"):
        load_model(tmp_path)
