"""Phantom studies, the app's models in this process, and MONAI Label's environment."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vila_m3_common import phantoms
from vila_m3_composite.viewer.models import ViewerModels
from vila_m3_composite.viewer.settings import ViewerSettings

sys.path.insert(0, str(Path(__file__).parent))

from monailabel_server import APP, environment
from viewer_studies import fill_studies


@pytest.fixture(scope="session")
def mri_4d_file(mri_phantom: phantoms.VolumePhantom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MRI phantom as one 4-D file, as a viewer's image has to be."""
    path = tmp_path_factory.mktemp("mri_4d") / "mri.nii.gz"
    return phantoms.save_volume(np.moveaxis(mri_phantom.image, 0, 3), mri_phantom.affine, path)


@pytest.fixture(scope="session")
def models(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ViewerModels]:
    """The bundles of the app, with no trained weights."""
    folder = tmp_path_factory.mktemp("model")
    opened = ViewerModels(ViewerSettings.from_conf({"model_dir": str(folder), "device": "cpu"}, repository / APP))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def venv(repository: Path) -> Path:
    """The environment of MONAI Label; only slow tests may ask for it."""
    return environment(repository)


@pytest.fixture
def studies(ct_file: Path, mri_4d_file: Path, cxr_file: Path, tmp_path: Path) -> Path:
    """A studies folder: two CTs, a brain MRI, a chest X-ray, and a file that is damaged."""
    return fill_studies(tmp_path / "studies", ct_file, mri_4d_file, cxr_file)
