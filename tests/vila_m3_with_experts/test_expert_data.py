"""Conversations made by the nano experts on real studies pass validation."""

from pathlib import Path

import pytest

from vila_m3.data.validation import Validator, validate_file
from vila_m3_composite.expert_data import make_expert_data

ROOT = Path(__file__).parents[2]
BUNDLE = str(ROOT / "bundles/vila_m3_with_experts")
CARDS = (ROOT / "vila_m3_bundle/configs/model_cards.txt").read_text()


def make(folder: Path, studies: dict[str, list[list[str]]], expert: str) -> dict[str, int]:
    make_expert_data(studies, str(folder), BUNDLE, [str(ROOT / expert)], CARDS)
    modality = next(iter(studies)).lower()
    summary = validate_file(folder / f"{modality}.jsonl", Validator(folder, CARDS), folder / "validated")
    assert summary["dropped"] == {}
    return summary


def radiographs(shared: Path, count: int) -> list[list[str]]:
    return [[str(path)] for path in sorted((shared / "data/cxr/nih_256").rglob("*.png"))[:count]]


def test_two_real_radiographs_give_valid_conversations(shared: Path, tmp_path: Path) -> None:
    assert make(tmp_path, {"CXR": radiographs(shared, 2)}, "expert_cxr")["kept"] == 4


def test_an_unknown_modality_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="modality PET is unknown"):
        make_expert_data({"PET": []}, str(tmp_path), BUNDLE, [], CARDS)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_real_study_gives_valid_conversations(shared: Path, tmp_path: Path) -> None:
    data = shared / "data"
    cases = radiographs(shared, 10**6)
    assert make(tmp_path / "cxr", {"CXR": cases}, "expert_cxr")["kept"] >= 1.8 * len(cases)
    assert make(tmp_path / "ct", {"CT": [[str(data / "ct/example_ct.nii.gz")]]}, "expert_vista3d")["kept"] == 2
    sequences = [str(data / f"mri/brats_gli_00001/{name}.nii.gz") for name in ("t1c", "t1n", "t2w", "t2f")]
    assert make(tmp_path / "mri", {"MRI": [sequences]}, "expert_brats")["kept"] == 2
