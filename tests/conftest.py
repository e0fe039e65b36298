"""Fixtures for all tests: the recorded reference outputs, and synthetic images."""

import os
import warnings
from pathlib import Path

import pytest

from vila_m3_common import phantoms

REPOSITORY = Path(__file__).resolve().parents[1]


def pytest_unconfigure() -> None:
    """Keep what ITK's wrappers print at exit from following pytest's summary."""
    warnings.filterwarnings("ignore", message="builtin type [Ss]wig", category=DeprecationWarning)


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with the recorded reference outputs, ``shared/`` next to the checkout or ``$VILA_M3_SHARED``."""
    folder = Path(os.environ.get("VILA_M3_SHARED", REPOSITORY.parent / "shared"))
    if folder.is_dir():
        return folder
    message = f"the recorded reference outputs are not at {folder}; set VILA_M3_SHARED to their folder"
    if os.environ.get("CI"):
        pytest.fail(message)
    pytest.skip(message)


@pytest.fixture(scope="session")
def ct_phantom() -> phantoms.VolumePhantom:
    """A small CT with hepatic tumours."""
    return phantoms.ct_phantom(seed=7001, tumors=["hepatic tumor"], shape=(72, 64, 56), spacing=4.5)


@pytest.fixture(scope="session")
def mri_phantom() -> phantoms.VolumePhantom:
    """A small brain MRI with a glioma."""
    return phantoms.mri_phantom(seed=7002, has_tumor=True, shape=(48, 56, 40), spacing=4.0)


@pytest.fixture(scope="session")
def cxr_phantom() -> phantoms.RadiographPhantom:
    """A chest X-ray with a large heart and an effusion."""
    return phantoms.cxr_phantom(seed=7003, findings=["Cardiomegaly", "Effusion"])


@pytest.fixture(scope="session")
def ct_file(ct_phantom: phantoms.VolumePhantom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CT phantom as NIfTI."""
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    return phantoms.save_volume(ct_phantom.image, ct_phantom.affine, path)


@pytest.fixture(scope="session")
def mri_folder(mri_phantom: phantoms.VolumePhantom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MRI phantom as a folder with t1c, t1n, t2w and t2f."""
    return phantoms.save_mri(mri_phantom, tmp_path_factory.mktemp("mri"))


@pytest.fixture(scope="session")
def cxr_file(cxr_phantom: phantoms.RadiographPhantom, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The chest X-ray phantom as PNG."""
    return phantoms.save_radiograph(cxr_phantom, tmp_path_factory.mktemp("cxr") / "cxr.png")
