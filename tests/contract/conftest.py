"""Zips of all bundles, and an import path to this folder's helper module."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from bundles_under_test import BUNDLES, ROOT

from vila_m3_common.package import package_bundles


@pytest.fixture(scope="session")
def zips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Bundle name -> its zip."""
    archives = package_bundles(ROOT, tmp_path_factory.mktemp("dist"))
    return dict(zip(BUNDLES, archives, strict=True))
