"""What the tests of the chest X-ray expert share, and import paths to the helper modules."""

import sys
from pathlib import Path

import pytest
from monai.transforms import Compose, ScaleIntensityRanged

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
sys.path.insert(0, str(Path(__file__).parent))

import cxr_expert
from cxr_expert.transforms import CenterSquareCropd, LoadRadiographd

PREPROCESSING = Compose(
    [
        LoadRadiographd("image"),
        ScaleIntensityRanged("image", 0, 255, -1024, 1024),
        CenterSquareCropd("image"),
    ]
)


@pytest.fixture(scope="session")
def bundle():
    return Path(cxr_expert.__file__).parents[1]


@pytest.fixture(scope="session")
def load_image():
    """Read a radiograph as the bundle's preprocessing does: (1, H, H) in -1024..1024."""
    return lambda path: PREPROCESSING({"image": str(path)})["image"]
