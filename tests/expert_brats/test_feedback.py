"""The expert turn, overlay, measurements and notes; reference texts and pictures from golden/experts/glue."""

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from brats_expert.expert import BratsFeedback, measure_regions
from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.volumes import load_volume

ALL_PRESENT = (
    "The results are <image>. The colors in this image describe\n"
    "yellow and red: tumor core, only yellow: enhancing tumor, all colors: whole tumor\n"
    "Use this result to respond to this prompt:\nWhere is it?."
)
SERVED_TAIL = "Use this result to respond to this prompt:\nWhere is it?"


@pytest.fixture
def run_feedback(tmp_path):
    """Feed back a label map ``(X, Y, Z)`` over four random sequences of the same shape."""

    def run(labels, variant="trained", overlay_sequence="t1c", slice_index=2):
        paths = []
        for index in range(4):
            path = tmp_path / f"sequence{index}.nii.gz"
            array = np.random.default_rng(index).integers(0, 900, labels.shape).astype(np.int16)
            nib.save(nib.Nifti1Image(array, np.eye(4)), path)
            paths.append(str(path))
        request = ExpertRequest(tuple(paths), "", slice_index, 2, "Where is it?", str(tmp_path))
        output = {"pred": torch.from_numpy(labels)[None], "request": request.to_json()}
        return BratsFeedback(variant, overlay_sequence)(output)

    return run


def labels_with(ids, slice_index=2):
    labels = np.zeros((10, 12, 6), np.uint8)
    for position, label in enumerate(ids):
        labels[2 + position, 3:7, slice_index] = label
    return labels


@pytest.mark.parametrize("present", ["", "1", "2", "4", "1,2", "1,4", "2,4", "1,2,4", "3", "1,3,4"])
def test_served_texts_equal_the_reference(run_feedback, glue_mri, present):
    ids = [int(label) for label in present.split(",") if label]
    text = run_feedback(labels_with(ids), "served").text
    assert text == glue_mri["brats_text_by_labels_present"][present]["text"] + SERVED_TAIL


def test_reference_texts_are_all_covered(glue_mri):
    assert set(glue_mri["brats_text_by_labels_present"]) == {
        *("", "1", "2", "4", "1,2", "1,4", "2,4", "1,2,4", "3", "1,3,4")
    }


def test_trained_text_names_all_regions_when_1_2_and_4_are_in_the_slice(run_feedback):
    assert run_feedback(labels_with([1, 2, 4])).text == ALL_PRESENT


def test_trained_text_falls_back_to_the_served_regions_when_a_label_is_missing_in_the_slice(run_feedback):
    labels = labels_with([2, 4])
    labels[8, 8, 4] = 1  # in the volume, but in another slice
    assert "only blue: enhancing tumor, all colors: whole tumor\n" in run_feedback(labels).text


@pytest.mark.parametrize("name", ["mri124_z5", "mri124_z20", "mri124_z33"])
def test_overlay_equals_the_reference_picture(golden, glue_mri, tmp_path, name):
    facts = glue_mri[name]
    image = golden / "glue" / "inputs" / "mri_t1c.mha"
    labels = load_volume(golden / "glue" / "inputs" / "mri_labels_124.mha").array
    request = ExpertRequest((str(image),) * 4, "", facts["slice_index"], 2, "", str(tmp_path))
    output = {"pred": torch.from_numpy(labels.copy())[None], "request": request.to_json()}
    result = BratsFeedback("served")(output)
    expected = np.asarray(Image.open(golden / "glue" / facts["overlay_png"]).convert("RGB"))
    assert np.abs(result.images[0].astype(int) - expected.astype(int)).max() <= 1
    assert result.text.startswith(facts["text"])
    assert {str(label): color for label, color in zip((1, 2, 4), result.legend, strict=True)} == facts["colormap"]


def test_measurements_hold_the_labels_and_the_regions(run_feedback):
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[5:20, 5:20, 5:20] = 2
    labels[8:16, 8:16, 8:16] = 4
    labels[10:14, 10:14, 10:14] = 1
    rows = {row["name"]: row for row in run_feedback(labels, slice_index=12).measurements}
    assert list(rows) == [
        "necrotic and non-enhancing tumor core",
        "peritumoral edema",
        "enhancing tumor",
        "tumor core",
        "whole tumor",
    ]
    # 1 mm voxels: 15^3, 8^3 and 4^3 boxes inside each other
    assert rows["whole tumor"]["volume_ml"] == pytest.approx(3.375)
    assert rows["tumor core"]["volume_ml"] == pytest.approx(0.512)
    assert rows["necrotic and non-enhancing tumor core"]["volume_ml"] == pytest.approx(0.064)
    assert rows["tumor core"]["labels"] == [1, 4]
    assert rows["whole tumor"]["component_count"] == 1


def test_region_of_separate_labels_is_counted_as_a_whole():
    labels = np.zeros((12, 12, 12), np.uint8)
    labels[1:6, 1:6, 1:6] = 1
    labels[6:11, 1:6, 1:6] = 4  # touches the first
    rows = {row["name"]: row for row in measure_regions(labels, np.eye(4), axis=2)}
    assert rows["tumor core"]["component_count"] == 1


def test_note_tells_where_the_tumor_is_when_the_slice_misses_it(run_feedback):
    result = run_feedback(labels_with([1, 2, 4], slice_index=4), slice_index=1)
    assert result.notes == [
        "whole tumor is largest in axial slice 4, outside the slice that the VLM saw (1); "
        "ask again with that slice_index."
    ]


def test_note_without_a_slice_in_the_request_uses_the_middle_one(run_feedback):
    assert run_feedback(labels_with([2], slice_index=3), slice_index=None).notes == [
        "whole tumor is largest in axial slice 3."
    ]


def test_volume_without_tumor_is_a_result_with_a_note(run_feedback):
    result = run_feedback(np.zeros((10, 12, 6), np.uint8))
    assert result.notes == ["No tumor was found in the whole volume."]
    assert result.text == (
        "The results are <image>. The colors in this image describe\n"
        "Use this result to respond to this prompt:\nWhere is it?."
    )
    assert not result.is_error
    assert result.measurements == []
    assert result.legend == {}
    assert result.label_map_path.is_file()


def test_overlay_lies_on_the_chosen_sequence(run_feedback):
    labels = np.zeros((10, 12, 6), np.uint8)
    flair = run_feedback(labels, overlay_sequence="flair").images[0]
    assert not np.array_equal(flair, run_feedback(labels).images[0])


def test_overlay_of_a_four_d_file_takes_the_channel(tmp_path):
    array = np.random.default_rng(0).integers(0, 500, (8, 9, 5, 4)).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "four.nii.gz")
    nib.save(nib.Nifti1Image(array[..., 3], np.eye(4)), tmp_path / "flair.nii.gz")
    pred = torch.zeros(1, 8, 9, 5)
    pictures = []
    for paths in ((str(tmp_path / "four.nii.gz"),), (str(tmp_path / "flair.nii.gz"),) * 4):
        request = ExpertRequest(paths, "", 2, 2, "", str(tmp_path))
        result = BratsFeedback(overlay_sequence="flair")({"pred": pred, "request": request.to_json()})
        pictures.append(result.images[0])
    assert np.array_equal(pictures[0], pictures[1])


def test_label_map_is_saved_in_the_geometry_of_the_t1c(tmp_path):
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    affine[:3, 3] = (90, 80, -60)
    array = np.arange(8 * 9 * 5, dtype=np.int16).reshape(8, 9, 5)
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "t1c.nii.gz")
    pred = torch.zeros(1, 8, 9, 5)
    pred[0, 3, 4, 2] = 4
    request = ExpertRequest((str(tmp_path / "t1c.nii.gz"),) * 4, "", None, 2, "", str(tmp_path), "case")
    result = BratsFeedback()({"pred": pred, "request": request.to_json()})
    saved = nib.load(result.label_map_path)
    assert result.label_map_path.name == "case_labels.nii.gz"
    assert np.allclose(saved.affine, affine)
    assert np.argwhere(np.asarray(saved.dataobj)).tolist() == [[3, 4, 2]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"overlay_sequence": "t1gd"}, "unknown overlay_sequence 't1gd'; allowed: t1c, t1, t2, flair"),
        ({"variant": "demo"}, "unknown feedback_variant 'demo'; allowed: trained, served"),
    ],
)
def test_unknown_settings_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        BratsFeedback(**fields)
