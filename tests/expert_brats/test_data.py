"""Which cases training and evaluation read."""

import json

import numpy as np
import pytest

from brats_expert import data
from brats_expert.data import list_cases
from vila_m3_common.errors import UserError
from vila_m3_common.phantoms import VolumePhantom
from vila_m3_common.volumes import load_volume


@pytest.fixture
def tiny_phantoms(monkeypatch):
    """Phantoms of a few voxels; the list of seeds that were drawn."""
    drawn = []

    def draw(seed, has_tumor):
        drawn.append(seed)
        image = np.random.default_rng(seed).integers(1, 99, (4, 5, 6, 7)).astype(np.float32)
        return VolumePhantom(image, np.full((5, 6, 7), 2 if has_tumor else 0, np.uint8), np.eye(4))

    monkeypatch.setattr(data, "mri_phantom", draw)
    return drawn


def test_phantoms_are_written_once_and_reused(tmp_path, tiny_phantoms):
    first = list_cases(tmp_path, "training", 3)
    assert tiny_phantoms == [0, 1, 2]
    assert list_cases(tmp_path, "training", 3) == first
    assert tiny_phantoms == [0, 1, 2]
    assert len(list_cases(tmp_path, "training", 4)) == 4
    assert tiny_phantoms == [0, 1, 2, 3]


def test_phantom_case_has_four_sequences_in_order_and_a_label(tmp_path, tiny_phantoms):
    case = list_cases(tmp_path, "training", 1)[0]
    assert [path.rsplit("/", 1)[1] for path in case["image"]] == [
        "t1c.nii.gz",
        "t1n.nii.gz",
        "t2w.nii.gz",
        "t2f.nii.gz",
    ]
    assert load_volume(case["image"][0]).array.shape == (5, 6, 7)


def test_sections_share_no_seed_and_every_third_phantom_has_no_tumor(tmp_path, tiny_phantoms):
    for section in ("training", "validation", "test"):
        list_cases(tmp_path, section, 6)
    assert len(set(tiny_phantoms)) == len(tiny_phantoms) == 18
    assert sum(seed % 3 == 0 for seed in tiny_phantoms) == 6


def test_interrupted_writing_leaves_no_half_case(tmp_path, tiny_phantoms, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(data, "save_volume", fail)
        with pytest.raises(KeyboardInterrupt):
            list_cases(tmp_path, "training", 1)
    assert not any(folder.suffix == "" for folder in tmp_path.iterdir())
    assert load_volume(list_cases(tmp_path, "training", 1)[0]["image"][3])


def write_list(folder, **sections):
    (folder / "datalist.json").write_text(json.dumps(sections))
    return folder


def test_own_list_is_used_instead_of_phantoms(tmp_path, tiny_phantoms):
    for name in ("a.nii.gz", "b.nii.gz", "seg.nii.gz"):
        (tmp_path / name).touch()
    write_list(tmp_path, training=[{"image": ["a.nii.gz", "b.nii.gz"], "label": "seg.nii.gz"}])
    expected = {
        "image": [str(tmp_path / "a.nii.gz"), str(tmp_path / "b.nii.gz")],
        "label": str(tmp_path / "seg.nii.gz"),
    }
    assert list_cases(tmp_path, "training", 7) == [expected]
    assert tiny_phantoms == []


def test_own_list_without_test_section_is_tested_on_validation(tmp_path):
    (tmp_path / "scan.nii.gz").touch()
    write_list(tmp_path, validation=[{"image": "scan.nii.gz", "label": "scan.nii.gz"}])
    assert list_cases(tmp_path, "test", 7)[0]["image"] == str(tmp_path / "scan.nii.gz")


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"validation": []}, "datalist.json cannot be used for training"),
        ({"training": []}, "lists no training cases; add some, or remove the file"),
        ({"training": [{"image": "no.nii.gz", "label": "no.nii.gz"}]}, "no.nii.gz, listed in .* does not exist"),
        ({"training": [{"image": "datalist.json"}]}, "a case of .* has no 'label'"),
    ],
)
def test_faults_of_the_list_are_named(tmp_path, sections, message):
    with pytest.raises(UserError, match=message):
        list_cases(write_list(tmp_path, **sections), "training", 1)


def test_unknown_section_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown section 'train'; allowed: training, validation, test"):
        list_cases(tmp_path, "train", 1)
