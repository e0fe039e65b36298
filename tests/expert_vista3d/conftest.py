"""What the tests of the CT expert share: its folder, and a small phantom with its label map."""

import sys
from pathlib import Path

import pytest
import torch
from monai.networks.nets.vista3d import VISTA3D

import vista3d_expert
from vila_m3_common.phantoms import ct_phantom, save_volume
from vista3d_expert.network import nano_vista3d

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))


@pytest.fixture(scope="session")
def bundle_root() -> Path:
    return Path(vista3d_expert.__file__).parents[1]


@pytest.fixture(scope="session")
def glue(shared: Path) -> Path:
    return shared / "golden" / "experts" / "glue"


@pytest.fixture(scope="session")
def small_case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom with hepatic tumours on a 40 x 36 x 32 grid of 8 mm: ``image.nii.gz`` and ``label.nii.gz``."""
    phantom = ct_phantom(7101, tumors=["hepatic tumor"], shape=(40, 36, 32), spacing=8.0)
    folder = tmp_path_factory.mktemp("small_case")
    save_volume(phantom.image, phantom.affine, folder / "image.nii.gz")
    save_volume(phantom.labels, phantom.affine, folder / "label.nii.gz")
    return folder


@pytest.fixture(scope="session")
def network() -> VISTA3D:
    """A VISTA3D of two levels with the random weights of seed 0."""
    torch.manual_seed(0)
    return nano_vista3d(init_filters=8, feature_size=8, blocks_down=(1, 1)).eval()
