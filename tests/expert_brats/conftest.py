"""What the tests of the brain tumour expert share: its folder, phantoms, golden files, and a path to their helpers."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import brats_expert
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.phantoms import mri_phantom, save_mri, save_volume

sys.path.insert(0, str(Path(__file__).parents[1] / "common"))
sys.path.insert(0, str(Path(__file__).parent))

SEQUENCE_FILES = ("t1c.nii.gz", "t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz")


@pytest.fixture(scope="session")
def bundle_root() -> Path:
    return Path(brats_expert.__file__).parents[1]


@pytest.fixture(scope="session")
def golden(shared: Path) -> Path:
    return shared / "golden" / "experts"


@pytest.fixture(scope="session")
def brats_facts(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "brats" / "brats.json").read_text())


@pytest.fixture(scope="session")
def glue_mri(golden: Path) -> dict[str, Any]:
    return json.loads((golden / "glue" / "glue.json").read_text())["mri"]


@pytest.fixture(scope="session")
def small_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A phantom with tumour on a 24 x 28 x 20 grid of 8 mm: four sequences and ``label.nii.gz``."""
    phantom = mri_phantom(1, has_tumor=True, shape=(24, 28, 20), spacing=8.0)
    folder = save_mri(phantom, tmp_path_factory.mktemp("phantom"))
    save_volume(phantom.labels, phantom.affine, folder / "label.nii.gz")
    return folder


@pytest.fixture
def request_for(tmp_path: Path):
    """Make a request for the four sequences of a folder."""

    def make(folder: Path, **fields: Any) -> ExpertRequest:
        paths = tuple(str(folder / name) for name in SEQUENCE_FILES)
        return ExpertRequest(paths, output_dir=str(tmp_path), **fields)

    return make
