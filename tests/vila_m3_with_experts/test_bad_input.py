"""What a user can get wrong: one line that says how to mend it, status 1, nothing written."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from vila_m3_common import phantoms
from vila_m3_composite.app import read_questions, run_command


@pytest.fixture(scope="module")
def composite(repository: Path) -> dict[str, Any]:
    return {
        "bundle_root": str(repository / "bundles/vila_m3_with_experts"),
        "vlm_bundle": "vila_m3_bundle",
        "expert_bundles": ["expert_vista3d", "expert_brats", "expert_cxr"],
        "expert_overrides": {"device": "cpu"},
    }


def run(image: Any, output: Path, composite: dict[str, Any], **changes: Any) -> None:
    arguments: dict[str, Any] = {
        "question": "Are there any liver masses?",
        "question_file": None,
        "modality": None,
        "slice_index": None,
        "axis": 2,
        "t1c_only": False,
        "sequence_order": None,
    }
    run_command(image=image, output_dir=str(output), composite=composite, **{**arguments, **changes})


def save(array: np.ndarray, path: Path) -> Path:
    nib.save(nib.Nifti1Image(array.astype(np.float32), np.diag([3.0, 3.0, 3.0, 1.0])), path)
    return path


def three_sequences(folder: Path) -> Path:
    phantoms.save_mri(phantoms.mri_phantom(1, shape=(24, 28, 20), spacing=8.0), folder / "mri")
    (folder / "mri/t2w.nii.gz").unlink()
    return folder / "mri"


def uneven_sequences(folder: Path) -> Path:
    three_sequences(folder)
    save(np.random.default_rng(0).normal(size=(8, 8, 8)), folder / "mri/t2w.nii.gz")
    return folder / "mri"


def text_as_nifti(folder: Path) -> Path:
    path = folder / "text.nii.gz"
    path.write_text("this is no image")
    return path


def empty(folder: Path) -> Path:
    path = folder / "empty.nii.gz"
    path.touch()
    return path


def truncated(folder: Path) -> Path:
    phantom = phantoms.ct_phantom(1, [], (24, 24, 24), 12.0)
    path = phantoms.save_volume(phantom.image, phantom.affine, folder / "cut.nii.gz")
    path.write_bytes(path.read_bytes()[:2000])
    return path


BAD_IMAGES: list[tuple[Callable[[Path], Path], str]] = [
    (lambda folder: folder / "nothing.nii.gz", r"nothing.nii.gz does not exist; check the path"),
    (empty, r"empty.nii.gz is empty \(0 bytes\); give the complete image file"),
    (text_as_nifti, r"text.nii.gz cannot be read as image; the file is damaged or not what its name says"),
    (truncated, r"cut.nii.gz cannot be read as image; the file is damaged"),
    (
        lambda folder: save(np.where(np.arange(4096).reshape(16, 16, 16) == 7, np.nan, 1.0), folder / "nan.nii.gz"),
        r"nan.nii.gz holds 1 voxels that are NaN or infinite; replace them",
    ),
    (
        lambda folder: save(np.full((16, 16, 16), 40.0), folder / "flat.nii.gz"),
        r"flat.nii.gz is constant \(every voxel is 40\); give the image itself",
    ),
    (
        lambda folder: save(np.random.default_rng(0).normal(size=(32, 32)), folder / "flat2d.nii.gz"),
        r"flat2d.nii.gz is 2-D .*; a volume with at least 2 slices along every axis is needed",
    ),
    (three_sequences, r"3 of 4 MRI sequences found \(.*\), missing: t2. Give four files"),
    (uneven_sequences, r"the MRI sequences have different shapes: .* register and resample them to one grid"),
]


@pytest.mark.parametrize(("make", "message"), BAD_IMAGES)
def test_a_bad_image_is_explained(
    make: Callable[[Path], Path], message: str, tmp_path: Path, composite: dict[str, Any]
) -> None:
    image = make(tmp_path)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run(str(image), tmp_path / "out", composite)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slice_index": 999}, r"slice_index 999 is out of range; the axial slices of this volume are 0..55"),
        ({"axis": 5}, r"axis 5 does not exist; allowed: 0 \(sagittal\), 1 \(coronal\), 2 \(axial\)"),
        ({"modality": "CTT"}, r"unknown modality 'CTT'; did you mean 'CT'\? allowed: CT, MRI, CXR"),
        ({"modality": "CXR"}, r"ct.nii.gz is a volume, a CXR is 2-D; give a PNG, JPEG or DICOM file"),
        ({"question": None}, r"no question was given; add --question"),
        ({"question": "  "}, r"no question was given; add --question"),
        ({"question_file": "none.txt"}, r"question file none.txt does not exist"),
    ],
)
def test_a_bad_option_is_explained(
    changes: dict[str, Any], message: str, ct_file: Path, tmp_path: Path, composite: dict[str, Any]
) -> None:
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        run(str(ct_file), tmp_path / "out", composite, **changes)
    assert not (tmp_path / "out").exists()


def test_an_unknown_expert_in_the_config_is_explained(ct_file: Path, tmp_path: Path, composite: dict[str, Any]) -> None:
    with pytest.raises(
        SystemExit, match="^error: bundle expert_nobody was not found .* give the path of its root folder"
    ):
        run(str(ct_file), tmp_path / "out", {**composite, "expert_bundles": ["expert_nobody"]})
    assert not (tmp_path / "out").exists()


def test_a_root_without_metadata_is_explained(ct_file: Path, tmp_path: Path, composite: dict[str, Any]) -> None:
    root = tmp_path / "no_bundle"
    root.mkdir()
    with pytest.raises(SystemExit, match="^error: .*no_bundle is no MONAI bundle: configs/metadata.json is missing"):
        run(str(ct_file), tmp_path / "out", {**composite, "expert_bundles": [str(root)]})


def test_an_output_folder_that_cannot_be_written_is_explained(
    ct_file: Path, tmp_path: Path, composite: dict[str, Any]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"^error: output folder .*file/out cannot be written \(Not a directory\)"):
        run(str(ct_file), tmp_path / "file/out", composite)


def test_the_command_ends_with_one_line_and_no_traceback(tmp_path: Path, run_composite: Any) -> None:
    done = run_composite(
        "--image", str(tmp_path / "none.nii.gz"), "--question", "q", "--output_dir", str(tmp_path / "out")
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == f"error: {tmp_path}/none.nii.gz does not exist; check the path"
    assert "Traceback" not in done.stderr


def test_what_the_command_line_makes_of_a_question_is_undone(tmp_path: Path) -> None:
    assert read_questions(("5", 6), None) == ["5, 6"]
    assert read_questions(1.5, None) == ["1.5"]
    file = tmp_path / "questions.txt"
    file.write_text("$import os\n\n%file\n")
    assert read_questions(None, str(file)) == ["$import os", "%file"]


def test_a_config_that_is_no_json_is_explained(ct_file: Path, tmp_path: Path, composite: dict[str, Any]) -> None:
    (tmp_path / "broken/configs").mkdir(parents=True)
    (tmp_path / "broken/configs/metadata.json").write_text("{")
    with pytest.raises(SystemExit, match="^error: .*metadata.json is not valid JSON"):
        run(str(ct_file), tmp_path / "out", {**composite, "expert_bundles": [str(tmp_path / "broken")]})


def test_bundles_of_another_release_are_refused(
    repository: Path, ct_file: Path, tmp_path: Path, composite: dict[str, Any]
) -> None:
    copy = tmp_path / "expert_old"
    shutil.copytree(repository / "expert_cxr", copy, ignore=shutil.ignore_patterns("models", "docs"))
    metadata = json.loads((copy / "configs/metadata.json").read_text())
    (copy / "configs/metadata.json").write_text(json.dumps({**metadata, "vila_m3_common_version": "9.9.9"}))
    with pytest.raises(
        SystemExit, match="^error: bundle expert_old needs vila_m3_common 9.9.9, but .* is already imported"
    ):
        run(str(ct_file), tmp_path / "out", {**composite, "expert_bundles": [str(copy)]})


def test_a_damaged_archive_is_no_image(tmp_path: Path, composite: dict[str, Any]) -> None:
    path = tmp_path / "junk.nii.gz"
    path.write_bytes(gzip.compress(b"not an image at all"))
    with pytest.raises(SystemExit, match="^error: junk.nii.gz cannot be read as image"):
        run(str(path), tmp_path / "out", composite)
