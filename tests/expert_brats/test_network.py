"""The released network: its size, its weights by name, and the recorded logits of golden/experts/brats."""

import json

import numpy as np
import pytest
import torch
import yaml
from monai.bundle import ConfigParser
from monai.inferers import SlidingWindowInferer

from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import BundleExpert
from vila_m3_common.volumes import load_volume
from vila_m3_common.weights import load_weights

# float16 storage of the network's input; the recorded logits come from the float32 input.
TOLERANCE = 2e-3


def full_network(bundle_root, seed=None):
    parser = ConfigParser(json.loads((bundle_root / "configs" / "size_full.json").read_text()))
    if seed is not None:
        torch.manual_seed(seed)
    return parser.get_parsed_content("network_def")


@pytest.fixture(scope="module")
def seed0_network(bundle_root):
    return full_network(bundle_root, seed=0).eval()


@pytest.fixture(scope="module")
def preprocessed(golden):
    with np.load(golden / "brats" / "preprocessed.npz") as stored:
        return torch.from_numpy(stored["x"].astype(np.float32))[None]


def test_full_network_has_the_keys_and_shapes_of_the_released_one(bundle_root, brats_facts):
    network = full_network(bundle_root)
    shapes = {key: list(value.shape) for key, value in network.state_dict().items()}
    assert shapes == brats_facts["keys_and_shapes"]
    assert sum(weight.numel() for weight in network.parameters()) == brats_facts["param_count"] == 4_702_227


def test_first_window_gives_the_recorded_logits(golden, seed0_network, preprocessed):
    """Constant blending: the voxels [0:32, 0:32, 0:24] belong to the first of the 64 x 64 x 48 windows alone."""
    with torch.no_grad():
        logits = seed0_network(preprocessed[..., :64, :64, :48])[0, :, :32:3, :32:3, :24:3]
    with np.load(golden / "brats" / "logits_seed0_roi64_stride3.npz") as stored:
        expected = torch.from_numpy(stored["y"])[:, :11, :11, :8]
    assert torch.allclose(logits, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_sliding_window_gives_the_recorded_logits_everywhere(golden, seed0_network, preprocessed):
    inferer = SlidingWindowInferer(roi_size=(64, 64, 48), sw_batch_size=1, overlap=0.5)
    with torch.no_grad():
        logits = inferer(preprocessed, seed0_network)[0, :, ::3, ::3, ::3]
    with np.load(golden / "brats" / "logits_seed0_roi64_stride3.npz") as stored:
        assert torch.allclose(logits, torch.from_numpy(stored["y"]), rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def released_file(seed0_network, tmp_path_factory):
    """A file of the released one's name and layout, with random values."""
    path = tmp_path_factory.mktemp("models") / "model_brats_mri_segmentation.pt"
    torch.save(seed0_network.state_dict(), path)
    return path


def test_released_file_is_loaded_by_name(bundle_root, seed0_network, released_file):
    network = load_weights(full_network(bundle_root, seed=5), released_file)
    assert not network.training
    for key, value in network.state_dict().items():
        assert torch.equal(value, seed0_network.state_dict()[key]), key


def test_full_overlay_names_the_file_of_large_files_yml(bundle_root):
    entry = yaml.safe_load((bundle_root / "large_files.yml").read_text())["large_files"][0]
    assert entry["url"].endswith("/model_zoo/model_brats_mri_segmentation.pt")
    assert (entry["hash_type"], entry["hash_val"]) == ("md5", "870e677b782a5184cbc48db1456b78e8")
    overlay = json.loads((bundle_root / "configs" / "size_full.json").read_text())
    assert entry["path"] in overlay["checkpoint"]


def test_nano_weights_do_not_pass_for_the_released_ones(bundle_root):
    with pytest.raises(UserError, match=r"model\.safetensors do not fit the network: missing"):
        load_weights(full_network(bundle_root), bundle_root / "models" / "model.safetensors")


def test_missing_released_file_says_how_to_get_it(bundle_root, tmp_path):
    with pytest.raises(UserError, match=r"model\.pt do not exist; get them with `python -m monai.bundle download"):
        load_weights(full_network(bundle_root), tmp_path / "models" / "model.pt")


@pytest.mark.slow
def test_full_size_run_gives_the_recorded_label_map(bundle_root, golden, brats_facts, released_file, tmp_path):
    """Files in, label map out, with ROI 64 x 64 x 48; voxels whose logit is nearly 0 may differ."""
    overlay = json.loads((bundle_root / "configs" / "size_full.json").read_text())
    expert = BundleExpert(
        bundle_root, {**overlay, "checkpoint": str(released_file), "roi_size": [64, 64, 48], "device": "cpu"}
    )
    names = ("t1c", "t1n", "t2w", "t2f")
    paths = tuple(str(golden / "brats" / "inputs" / f"{name}.nii.gz") for name in names)
    result = expert.run(ExpertRequest(paths, output_dir=str(tmp_path)))
    expert.close()
    expected = load_volume(golden / "brats" / "labels_seed0_roi64.nii.gz")
    found = load_volume(result.label_map_path)
    assert np.allclose(found.affine, expected.affine)
    differing = int((found.array != expected.array).sum())
    assert differing <= brats_facts["seed0_roi64"]["near_threshold_abs_lt_1e3"]
