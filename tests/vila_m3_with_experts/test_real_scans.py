"""The main job on real scans, by the command that users type. The nano models' findings on them mean nothing."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImage
from PIL import Image

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


def test_a_four_d_mri_in_another_order_is_read_as_the_four_files_are(
    shared: Path, tmp_path: Path, run_composite: Run, read_case: Read
) -> None:
    """The order of the Medical Segmentation Decathlon, on a real case; without it the expert refuses the file."""
    folder = shared / "data/mri/brats_gli_00001"
    files = [nib.load(folder / f"{name}.nii.gz") for name in ("t2f", "t1n", "t1c", "t2w")]
    decathlon = tmp_path / "decathlon.nii.gz"
    nib.save(nib.Nifti1Image(np.stack([np.asarray(file.dataobj) for file in files], -1), files[0].affine), decathlon)
    order = ("--sequence_order", "['flair','t1','t1c','t2']")
    records = {}
    for name, arguments in {"files": (folder,), "ordered": (decathlon, *order), "as stored": (decathlon,)}.items():
        output = tmp_path / name
        image, *more = map(str, arguments)
        question = ("--question", "Is there a brain tumor?", "--output_dir", str(output))
        done = run_composite("--image", image, *question, *more)
        assert done.returncode == 0, done.stderr
        records[name] = read_case(output)
    for read in (opening, labels):
        expected = read(tmp_path / "files")
        np.testing.assert_array_equal(read(tmp_path / "ordered"), expected)
        assert expected.any()
    assert records["ordered"]["answer"] == records["files"]["answer"]
    assert "add --sequence_order \"['flair', 't1', 't1c', 't2']\"" in records["as stored"]["notes"][0]


def opening(output: Path) -> np.ndarray:
    """The four pictures of the first turn, ``(4, H, W, 3)``."""
    return np.stack([np.asarray(Image.open(path)) for path in sorted(output.glob("*/turn00_image*.png"))])


def labels(output: Path) -> np.ndarray:
    (path,) = output.glob("*/*_labels.nii.gz")
    return np.asarray(nib.load(path).dataobj)
