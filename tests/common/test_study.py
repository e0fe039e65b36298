from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_files import write_ct_series, write_dicom
from PIL import Image

from vila_m3_common import phantoms
from vila_m3_common.errors import UserError
from vila_m3_common.study import SEQUENCES, open_study, ras_channels, render_images
from vila_m3_common.volumes import load_volume


def save_nifti(array: np.ndarray, path: Path) -> Path:
    nib.save(nib.Nifti1Image(array.astype(np.float32), np.eye(4)), path)
    return path


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).uniform(1, 100, shape)


def test_a_ct_is_known_by_its_air(ct_file: Path) -> None:
    study = open_study(ct_file)
    assert (study.modality, study.source, study.opening_form, study.notes) == ("CT", "intensities", "CT", ())
    assert not study.is_planar


def test_a_volume_without_hounsfield_units_is_taken_as_mri_with_a_note(tmp_path: Path) -> None:
    study = open_study(save_nifti(noise(8, 8, 8), tmp_path / "scan.nii.gz"))
    assert (study.modality, study.opening_form) == ("MRI", "single MRI")
    assert "taken as MRI (--modality overrules)" in study.notes[0]


def test_intensities_between_ct_and_mri_claim_nothing(tmp_path: Path) -> None:
    study = open_study(save_nifti(noise(8, 8, 8) - 60, tmp_path / "scan.nii.gz"))
    assert (study.modality, study.opening_form) == ("unknown", "unknown")
    assert "say so with --modality CT or --modality MRI" in study.notes[0]


def test_the_user_overrules_the_intensities(ct_file: Path) -> None:
    assert open_study(ct_file, "MRI").modality == "MRI"


@pytest.mark.parametrize(("tag", "modality"), [("CT", "CT"), ("MR", "MRI")])
def test_a_dicom_series_is_known_by_its_tag(tag: str, modality: str, tmp_path: Path) -> None:
    study = open_study(write_ct_series(tmp_path / "series", modality=tag))
    assert (study.modality, study.source) == (modality, "DICOM")


def test_a_chest_radiograph_is_known_by_its_tag(tmp_path: Path) -> None:
    study = open_study(write_dicom(tmp_path / "x.dcm", noise(8, 8), "DX"))
    assert (study.modality, study.source, study.is_planar) == ("CXR", "DICOM", True)


def test_a_grey_picture_that_fills_its_frame_is_taken_as_chest_radiograph(cxr_file: Path) -> None:
    study = open_study(cxr_file)
    assert study.modality == "CXR"
    assert "taken as a chest X-ray" in study.notes[0]


@pytest.mark.parametrize("kind", ["colour", "mostly black"])
def test_other_pictures_claim_nothing(kind: str, tmp_path: Path) -> None:
    rgb = np.full((40, 40, 3), 120, np.uint8)
    rgb[:20] = (250, 10, 10) if kind == "colour" else 0
    Image.fromarray(rgb).save(tmp_path / "picture.png")
    study = open_study(tmp_path / "picture.png")
    assert study.modality == "unknown"
    assert "say so with --modality CXR" in study.notes[0]


def test_four_sequences_are_found_by_name_in_any_order(mri_folder: Path) -> None:
    files = sorted(mri_folder.iterdir(), reverse=True)
    for study in (open_study(mri_folder), open_study(files)):
        assert [path.name for path in study.paths] == ["t1c.nii.gz", "t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz"]
        assert (study.modality, study.opening_form) == ("MRI", "MRI")


@pytest.mark.parametrize(
    "names",
    [
        ("BraTS_001_t1ce", "BraTS_001_t1", "BraTS_001_t2", "BraTS_001_flair"),
        ("case-T1Gd", "case-T1", "case-T2", "case-FLAIR"),
        ("BraTS-GLI-00001-000-t1c", "BraTS-GLI-00001-000-t1n", "BraTS-GLI-00001-000-t2w", "BraTS-GLI-00001-000-t2f"),
    ],
)
def test_the_namings_of_the_brats_challenges_are_understood(names: tuple[str, ...], tmp_path: Path) -> None:
    paths = [save_nifti(noise(4, 5, 6), tmp_path / f"{name}.nii.gz") for name in names]
    assert [path.name for path in open_study(paths[::-1]).paths] == [f"{name}.nii.gz" for name in names]


def test_four_unnamed_files_keep_their_order_with_a_note(tmp_path: Path) -> None:
    paths = [save_nifti(noise(4, 5, 6), tmp_path / f"{name}.nii.gz") for name in "bdac"]
    study = open_study(paths)
    assert list(study.paths) == paths
    assert "taken in the order T1c, T1, T2, FLAIR" in study.notes[0]


def test_a_four_channel_volume_is_a_brain_mri(tmp_path: Path) -> None:
    study = open_study(save_nifti(noise(4, 5, 6, 4), tmp_path / "brain.nii.gz"))
    assert study.has_brain_sequences
    assert len(render_images(study)[0]) == 4


def test_the_pictures_of_a_four_d_file_follow_its_sequence_order(tmp_path: Path) -> None:
    array = noise(4, 5, 6, 4)
    standard = open_study(save_nifti(array, tmp_path / "standard.nii.gz"))
    other = open_study(
        save_nifti(array[..., [3, 1, 0, 2]], tmp_path / "other.nii.gz"), None, ["flair", "t1", "t1c", "t2"]
    )
    for one, same in zip(render_images(standard)[0], render_images(other)[0], strict=True):
        np.testing.assert_array_equal(one, same)
    as_stored = open_study(tmp_path / "other.nii.gz")
    assert as_stored.fingerprint != other.fingerprint
    assert not np.array_equal(render_images(as_stored)[0][0], render_images(other)[0][0])


def test_unnamed_files_follow_the_sequence_order_and_named_ones_their_names(tmp_path: Path, mri_folder: Path) -> None:
    order = ["flair", "t1", "t1c", "t2"]
    paths = [save_nifti(noise(4, 5, 6), tmp_path / f"{name}.nii.gz") for name in "bdac"]
    study = open_study(paths, sequence_order=order)
    assert (list(study.paths), study.sequence_order) == (paths, tuple(order))
    assert "taken in the order FLAIR, T1, T1c, T2" in study.notes[0]
    t1c = ras_channels(study)[0]
    np.testing.assert_array_equal(t1c, load_volume(paths[2]).array)
    assert open_study(mri_folder, sequence_order=order).sequence_order == SEQUENCES


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (
            ["flair", "t1", "t1c"],
            r"sequence_order \['flair', 't1', 't1c'\] is not usable; give each of t1c, t1, t2, flair",
        ),
        (["flair", "t1", "t1c", "t2"], r"was given for an image without four MRI sequences; leave it out"),
    ],
)
def test_a_sequence_order_that_means_nothing_is_refused(order: list[str], message: str, ct_file: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_study(ct_file, sequence_order=order)


def several(folder: Path, *names: str, shapes: dict[str, tuple[int, ...]] | None = None) -> list[Path]:
    shapes = shapes or {}
    return [save_nifti(noise(*shapes.get(name, (4, 5, 6))), folder / f"{name}.nii.gz") for name in names]


@pytest.mark.parametrize(
    ("make", "modality", "message"),
    [
        (lambda f: f / "x.nii.gz", None, r"x.nii.gz does not exist; check the path"),
        (lambda f: f, None, r"holds neither DICOM slices nor volumes \(.nii.gz"),
        (
            lambda f: save_nifti(noise(4, 5, 6), f / "v.nii.gz"),
            "ct",
            r"unknown modality 'ct'; did you mean 'CT'\? allowed",
        ),
        (lambda f: save_nifti(noise(4, 5, 6), f / "v.nii.gz"), "CXR", r"v.nii.gz is a volume, a CXR is 2-D"),
        (
            lambda f: save_nifti(noise(4, 5, 6, 3), f / "v.nii.gz"),
            None,
            r"v.nii.gz is 4-D \(4, 5, 6, 3\); read are 3-D",
        ),
        (lambda f: save_nifti(noise(4, 5, 6, 4), f / "v.nii.gz"), "CT", r"v.nii.gz is 4-D"),
        (lambda f: write_dicom(f / "s.dcm", noise(8, 8), "CT"), None, r"s.dcm is a single CT slice; give the folder"),
        (lambda f: several(f, "t1c", "t1", "t2"), None, r"3 of 4 MRI sequences found \(t1c, t1, t2\), missing: flair"),
        (
            lambda f: several(f, "a_t1c", "b_t1ce", "t1", "t2"),
            None,
            r"two files look like t1c: a_t1c.nii.gz and b_t1ce",
        ),
        (
            lambda f: several(f, "t1c", "t1", "t2", "flair"),
            "CT",
            r"4 files were given as CT; several files are only read",
        ),
        (
            lambda f: several(f, "t1c", "t1", "t2", "flair", shapes={"t2": (4, 5, 7)}),
            None,
            r"different shapes: .*t2.nii.gz \(4, 5, 7\).*register and resample them to one grid",
        ),
        (lambda f: several(f, "a", "b"), None, r"0 of 4 MRI sequences found \(none\), missing: t1c, t1, t2, flair"),
    ],
)
def test_input_that_cannot_be_used_is_refused(make, modality: str | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        open_study(make(tmp_path), modality)


def test_a_picture_given_as_ct_is_refused(cxr_file: Path) -> None:
    with pytest.raises(UserError, match=r"cxr.png is 2-D; CT is read as a volume"):
        open_study(cxr_file, "CT")


def test_a_slice_of_a_picture_is_refused(cxr_file: Path) -> None:
    with pytest.raises(UserError, match="slice_index 3 was given for a 2-D image; leave it out"):
        render_images(open_study(cxr_file), slice_index=3)


def test_the_pictures_of_the_opening_turn(ct_file: Path, mri_folder: Path, cxr_file: Path) -> None:
    ct_images, ct_index = render_images(open_study(ct_file))
    assert ([image.shape for image in ct_images], ct_index) == ([(64, 72, 3)], 28)
    mri_images, mri_index = render_images(open_study(mri_folder), slice_index=17)
    assert ([image.shape for image in mri_images], mri_index) == ([(56, 48, 3)] * 4, 17)
    cxr_images, cxr_index = render_images(open_study(cxr_file))
    assert ([image.shape for image in cxr_images], cxr_index) == ([(256, 256, 3)], None)


def test_the_references_four_times_t1c_is_an_option(mri_folder: Path) -> None:
    study = open_study(mri_folder)
    different, _ = render_images(study)
    same, _ = render_images(study, t1c_only=True)
    assert not np.array_equal(different[0], different[3])
    assert all(np.array_equal(image, different[0]) for image in same)


def test_the_fingerprint_changes_with_the_file(tmp_path: Path) -> None:
    path = phantoms.save_volume(noise(4, 5, 6), np.eye(4), tmp_path / "v.nii.gz")
    before = open_study(path).fingerprint
    assert open_study(path).fingerprint == before
    phantoms.save_volume(noise(4, 5, 7), np.eye(4), path)
    assert open_study(path).fingerprint != before
