"""The main job on real scans, by the command that users type. The nano models' findings on them mean nothing."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImage

from vila_m3_common.slices import to_ras

Run = Callable[..., subprocess.CompletedProcess]
Read = Callable[[Path], dict]

SCANS = [
    ("ct/example_ct.nii.gz", "Are there any liver masses?", "VISTA3D", "hepatic tumor"),
    ("ct/example_ct_dicom", "Which organs are visible?", "VISTA3D", "organs"),
    ("mri/brats_gli_00001", "Is there a brain tumor?", "BRATS", ""),
    ("mri/brats_hg0015", "Segment any tumors in the image", "BRATS", ""),
    ("cxr/nih_256/00000061_012.png", "Is there a pleural effusion?", "CXR", ""),
    ("cxr/full_size/cr_chest.dcm", "What are the findings?", "CXR", ""),
]


@pytest.mark.parametrize(("scan", "question", "expert", "argument"), SCANS)
def test_the_right_expert_runs_and_the_model_answers(
    shared: Path,
    tmp_path: Path,
    run_composite: Run,
    read_case: Read,
    scan: str,
    question: str,
    expert: str,
    argument: str,
) -> None:
    output = tmp_path / "out"
    done = run_composite("--image", str(shared / "data" / scan), "--question", question, "--output_dir", str(output))
    assert done.returncode == 0, done.stderr
    record = read_case(output)
    calls = [turn["expert"] for turn in record["turns"] if "expert" in turn]
    assert [(call["name"], call["argument"], call["is_error"]) for call in calls] == [(expert, argument, False)]
    assert f"<{expert}({argument})>" in done.stdout
    assert record["answer"]
    if expert != "CXR":
        (label_path,) = output.glob("*/*_labels.nii.gz")
        check_geometry(label_path, first_image(shared / "data" / scan))


def first_image(path: Path) -> Path:
    """The image whose geometry the label map must have: the volume, the DICOM folder, or T1c."""
    found = [file for pattern in ("t1c*", "*T1C*") for file in path.glob(pattern)] if path.is_dir() else []
    return found[0] if found else path


def check_geometry(label_path: Path, image_path: Path) -> None:
    labels = nib.load(label_path)
    image = LoadImage(image_only=True)(str(image_path))
    assert labels.shape == tuple(image.shape)
    np.testing.assert_allclose(labels.affine, np.asarray(image.affine), atol=1e-3)
    assert to_ras(np.asarray(labels.dataobj), labels.affine).dtype == np.uint8


def test_it_runs_from_another_directory_with_absolute_paths(
    shared: Path, tmp_path: Path, run_composite: Run, read_case: Read
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    image = (shared / "data/ct/example_ct.nii.gz").resolve()
    done = run_composite(
        "--image",
        str(image),
        "--question",
        "['Are there any liver masses?', 'Is there a hepatic tumor?']",
        "--output_dir",
        str(tmp_path / "out"),
        cwd=elsewhere,
    )
    assert done.returncode == 0, done.stderr
    calls = [turn["expert"] for turn in read_case(tmp_path / "out")["turns"] if "expert" in turn]
    assert [call["is_reused"] for call in calls] == [False, True]
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("question", ["Are there any liver masses?", "Is there a brain tumor?"])
def test_a_body_mri_runs_no_expert_and_says_why(
    shared: Path, tmp_path: Path, run_composite: Run, read_case: Read, question: str
) -> None:
    image = shared / "data/ct/example_mr_sm.nii.gz"
    done = run_composite("--image", str(image), "--question", question, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    record = read_case(tmp_path / "out")
    assert not [turn for turn in record["turns"] if turn.get("expert", {}).get("label_map")]
    assert "note: No expert was run: VISTA3D: it reads" in done.stdout
    assert "but the image is MRI" in done.stdout
    assert "--modality overrules" in done.stdout
