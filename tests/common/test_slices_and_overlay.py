"""Slices and overlays, pixel for pixel against the reference's (golden/experts/glue)."""

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from vila_m3_common import overlay, slices
from vila_m3_common.errors import UserError
from vila_m3_common.volumes import load_volume

INPUTS = {
    "ct_imageonly": "ct.nii.gz",
    "ct": "ct.nii.gz",
    "mri": "mri_t1c.mha",
    "mri124": "mri_t1c.mha",
    "syn": "syn_mri.nii.gz",
}


@pytest.fixture(scope="module")
def glue_folder(shared: Path) -> Path:
    return shared / "golden/experts/glue"


@pytest.fixture(scope="module")
def cases(glue_folder: Path) -> dict[str, Any]:
    glue = json.loads((glue_folder / "glue.json").read_text())
    both = {**glue["ct"], **glue["mri"]}
    return {name: case for name, case in both.items() if isinstance(case, dict) and "image_png" in case}


def read_png(folder: Path, entry: str) -> np.ndarray:
    return np.asarray(Image.open(folder / entry.split(" ")[0]))


def source_file(name: str) -> str | None:
    """The volume that a case was cut from; the synthetic CT of syn_19 was not recorded."""
    if name.startswith(("mri", "syn_124")):
        return INPUTS[name.split("_")[0]]
    return None if name.startswith("syn_19") else INPUTS["ct"]


def test_slices_equal_the_recorded_pictures(glue_folder: Path, cases: dict[str, Any]) -> None:
    compared = 0
    for name, case in cases.items():
        if (file := source_file(name)) is None:
            continue
        volume = load_volume(glue_folder / "inputs" / file)
        ras = slices.to_ras(volume.array, volume.affine)
        index = slices.check_slice(ras.shape, case["slice_index"], case["axis"])
        plane = slices.take_slice(ras, index, case["axis"])
        if case["modality"] == "CT":
            grey = slices.window_ct(plane)
        else:
            grey = slices.scale_min_max(plane, float(ras.min()), float(ras.max()))
        np.testing.assert_array_equal(slices.grey_to_rgb(grey), read_png(glue_folder, case["image_png"]), err_msg=name)
        compared += 1
    assert compared == 24


def test_overlays_equal_the_recorded_pictures(glue_folder: Path, cases: dict[str, Any]) -> None:
    compared = 0
    for name, case in cases.items():
        if "overlay_png" not in case:
            continue
        labels = read_png(glue_folder, case["labels_png"])
        colors = overlay.assign_colors(np.unique(labels))
        assert colors == {int(label): color for label, color in case["colormap"].items()}, name
        blended = overlay.blend(read_png(glue_folder, case["image_png"])[..., 0], labels, colors)
        np.testing.assert_array_equal(blended, read_png(glue_folder, case["overlay_png"]), err_msg=name)
        compared += 1
    assert compared == 24


def test_colours_are_the_recorded_ones(glue_folder: Path) -> None:
    glue = json.loads((glue_folder / "glue.json").read_text())
    assert list(overlay.COLOR_CYCLE) == glue["colors_in_order"]
    assert {name: list(rgb) for name, rgb in overlay.RGB.items()} == glue["colors_rgb"]


@pytest.mark.parametrize("codes", ["RAS", "LSP", "PIR", "ALS", "SPL"])
def test_the_stored_orientation_does_not_change_the_picture(codes: str) -> None:
    array = np.arange(4 * 5 * 6, dtype=np.float32).reshape(4, 5, 6)
    affine = np.diag([1.0, 2.0, 3.0, 1.0])
    ras = nib.Nifti1Image(array, affine)
    target = nib.orientations.axcodes2ornt(tuple(codes))
    stored = ras.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(affine), target))
    np.testing.assert_array_equal(slices.to_ras(np.asarray(stored.dataobj), stored.affine), array)
    assert slices.ras_spacing(stored.affine) == pytest.approx((1.0, 2.0, 3.0))


def test_an_axial_slice_has_anterior_at_the_top_and_the_patients_right_on_the_left() -> None:
    volume = np.zeros((5, 7, 3), np.uint8)
    volume[4, 6, 1] = 9  # most right, most anterior
    plane = slices.take_slice(volume, 1)
    assert plane.shape == (7, 5)
    assert plane[0, 0] == 9


def test_the_ct_window_clips_and_truncates() -> None:
    hounsfield = np.array([-1000.0, -150.0, -149.0, 50.0, 249.0, 250.0, 3000.0])
    assert slices.window_ct(hounsfield).tolist() == [0, 0, 0, 127, 254, 255, 255]


def test_the_middle_slice_is_the_default() -> None:
    assert slices.check_slice((10, 11, 12), None, 2) == 6


@pytest.mark.parametrize("index", [-1, 12])
def test_a_slice_outside_the_volume_is_refused(index: int) -> None:
    with pytest.raises(
        UserError, match=rf"slice_index {index} is out of range; the axial slices of this volume are 0..11"
    ):
        slices.check_slice((10, 11, 12), index, 2)


def test_an_axis_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UserError, match=r"axis 3 does not exist; allowed: 0 \(sagittal\), 1 \(coronal\), 2 \(axial\)"):
        slices.check_slice((10, 11, 12), 0, 3)


def test_the_figure_keeps_the_patients_proportions_and_names_every_label() -> None:
    grey = np.full((20, 40), 100, np.uint8)
    labels = np.zeros((20, 40), np.int32)
    labels[5:10, 5:10] = 3
    figure = overlay.overlay_figure(grey, labels, {3: "blue"}, {3: "spleen"}, "VISTA3D", pixel_size=(2.0, 1.0))
    panel = 384  # 20 x 2 mm by 40 x 1 mm is a square
    assert figure.height == panel + 20
    assert figure.width > 2 * panel
    painted = np.asarray(figure)[20 + 7 * panel // 20, panel + 4 + 7 * panel // 40]
    assert painted[2] > painted[0]


def test_the_figure_of_a_slice_without_labels_says_so() -> None:
    grey = np.full((20, 20), 100, np.uint8)
    figure = overlay.overlay_figure(grey, np.zeros((20, 20), np.int32), {}, {}, "VISTA3D")
    legend = np.asarray(figure)[20:40, 2 * 384 + 14 :]
    assert (legend < 128).any()
