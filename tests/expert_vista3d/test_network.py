"""Nano and full size: layout, size, loading by name, and one window of the recorded reference."""

import json
import zlib

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.networks.nets import vista3d132

from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import BundleExpert
from vila_m3_common.weights import load_weights, save_weights
from vista3d_expert.network import class_vectors, image_features, nano_vista3d


@pytest.fixture(scope="module")
def recorded(shared):
    return json.loads((shared / "golden/experts/vista3d/vista3d.json").read_text())


def recipe_weight(key, shape):
    """The recorded rule for portable random weights: drawn from the key's name."""
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if len(shape) >= 2:
        values = values * np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("bias"):
        values = values * 0.1
    else:
        values = values * 0.1 + 1
    return torch.from_numpy(values.astype(np.float32))


@pytest.fixture(scope="module")
def released_layout(recorded, tmp_path_factory):
    """A file of the released layout (``.pt`` state dict) with the recorded random weights, 0.9 GB."""
    state = {key: recipe_weight(key, shape) for key, shape in recorded["keys_and_shapes"].items()}
    path = tmp_path_factory.mktemp("weights") / "model_vista3d.pt"
    torch.save(state, path)
    return path


def test_nano_has_the_class_and_point_heads_of_the_full_network():
    keys = {key.split(".")[0] for key in nano_vista3d().state_dict()}
    assert keys == {"image_encoder", "class_head", "point_head"}
    assert nano_vista3d().class_head.class_embeddings.weight.shape == (512, 16)


def test_shipped_weights_fit_the_nano_network_and_are_small(bundle_root):
    path = bundle_root / "models" / "model.safetensors"
    load_weights(nano_vista3d(), path)
    assert path.stat().st_size < 10e6


def test_weights_of_another_size_are_refused_by_name(tmp_path):
    path = save_weights(nano_vista3d(init_filters=8, feature_size=8), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"do not fit the network: .* is \(.*\), needed \("):
        load_weights(nano_vista3d(), path)


def test_full_size_overlay_names_the_released_file_and_geometry(bundle_root):
    parser = ConfigParser()
    parser.read_config([str(bundle_root / "configs" / name) for name in ("inference.json", "size_full.json")])
    assert parser.get_parsed_content("checkpoint").endswith("models/model_vista3d.pt")
    assert parser["spacing"] == 1.5
    assert parser["roi_size"] == [128, 128, 128]
    assert parser["overlap"] == 0.3
    assert parser["network_def"]["_target_"] == "monai.networks.nets.vista3d132"


@pytest.mark.slow
def test_released_layout_loads_by_name_and_gives_the_recorded_logits(released_layout, bundle_root, shared, recorded):
    """In the corner that only the first 64^3 window covers, the stitched logits are that window's."""
    network = load_weights(vista3d132(in_channels=1), released_layout)
    assert sum(weight.numel() for weight in network.parameters()) == recorded["param_count"]
    folder = shared / "golden/experts/vista3d"
    parser = ConfigParser()
    parser.read_config([str(bundle_root / "configs" / name) for name in ("inference.json", "size_full.json")])
    item = parser.get_parsed_content("preprocessing")({"image": str(folder / "inputs/ct_crop.nii.gz")})
    expected = np.load(folder / "logits_recipe_p1_26_stride4.npz")["y"][0, :, :12, :12, :7]
    with torch.no_grad():
        features = image_features(network, item["image"].as_tensor()[None, :, :64, :64, :64])
        logits = torch.einsum("kc,cxyz->kxyz", class_vectors(network, [1, 26]), features[0])
    found = logits[:, :48:4, :48:4, :28:4].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)  # the logits' standard deviation is 7.5


@pytest.fixture(scope="module")
def seeded_layout(tmp_path_factory):
    """A file of the released layout with the weights of seed 0."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "seed0.pt"
    torch.save(vista3d132(in_channels=1).state_dict(), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("weights", "prompt", "run"), [("released_layout", [1, 26], "recipe_p1_26"), ("seeded_layout", [2], "seed0_p2")]
)
def test_the_whole_bundle_gives_the_recorded_label_map(
    request, bundle_root, shared, recorded, tmp_path, weights, prompt, run
):
    """From file to file; the recorded run had windows of 64 voxels and, as its bundle drops 0.3, an overlap of 0.25."""
    folder = shared / "golden/experts/vista3d"
    overrides = {
        "device": "cpu",
        "network_def": {"_target_": "monai.networks.nets.vista3d132", "in_channels": 1},
        "checkpoint": str(request.getfixturevalue(weights)),
        "spacing": 1.5,
        "roi_size": [64, 64, 64],
        "overlap": 0.25,
        "min_tumor_ml": 0.0,
        "slab_size": 8,
        "label_prompt": prompt,
    }
    expert = BundleExpert(bundle_root, overrides)
    result = expert.run(ExpertRequest((str(folder / "inputs/ct_crop.nii.gz"),), output_dir=str(tmp_path)))
    expert.close()
    written, expected = nib.load(result.label_map_path), nib.load(folder / f"labels_{run}.nii.gz")
    np.testing.assert_allclose(written.affine, recorded["runs"][run]["label_affine"], atol=1e-4)
    differing = np.asarray(written.dataobj) != np.asarray(expected.dataobj)
    # the recorded logits are within 1e-3 of a threshold at about this share of the voxels
    assert differing.mean() < 1e-3
