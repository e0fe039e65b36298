"""The expert turn, overlay, measurements and notes; reference texts and pictures from golden/experts/glue."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from brats_expert.expert import BratsFeedback, measure_regions
from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.volumes import load_volume

SEQUENCE_FILES = ("t1c.nii.gz", "t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz")
ALL_PRESENT = (
    "The results are <image>. The colors in this image describe\n"
    "yellow and red: tumor core, only yellow: enhancing tumor, all colors: whole tumor\n"
    "Use this result to respond to this prompt:\nWhere is it?."
)
SERVED_TAIL = "Use this result to respond to this prompt:\nWhere is it?"


@pytest.fixture
def run_feedback(tmp_path):
    """Feed back a label map ``(X, Y, Z)`` over four random sequences of the same shape."""

    def run(labels, variant="trained", overlay_sequence="t1c", slice_index=2, question="Where is it?"):
        paths = write_sequences(tmp_path, labels.shape)
        request = ExpertRequest(paths, "", slice_index, 2, question, str(tmp_path))
        output = {"pred": torch.from_numpy(labels)[None], "request": request.to_json()}
        return BratsFeedback(variant, overlay_sequence)(output)

    return run


def write_sequences(folder, shape, affine=None):
    """Random sequences with an empty first layer, so that they look skull-stripped."""
    paths = []
    for index, name in enumerate(SEQUENCE_FILES):
        array = np.random.default_rng(index).integers(1, 900, shape).astype(np.int16)
        array[0] = 0
        nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), folder / name)
        paths.append(str(folder / name))
    return tuple(paths)


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


SLICES = {
    "mri124_z5": ("mri_t1c.mha", "mri_labels_124.mha"),
    "mri124_z20": ("mri_t1c.mha", "mri_labels_124.mha"),
    "mri124_z33": ("mri_t1c.mha", "mri_labels_124.mha"),
    "mri_z5": ("mri_t1c.mha", "mri_truth.mha"),
    "mri_z20": ("mri_t1c.mha", "mri_truth.mha"),
    "mri_z33": ("mri_t1c.mha", "mri_truth.mha"),
    "syn_124_z2": ("syn_mri.nii.gz", "syn_labels_124.nii.gz"),
}


@pytest.mark.parametrize("name", SLICES)
def test_overlay_equals_the_reference_picture_pixel_for_pixel(golden, glue_mri, tmp_path, name):
    facts = glue_mri[name]
    image, labels = (golden / "glue" / "inputs" / file for file in SLICES[name])
    paths = []
    for index in range(4):  # the reference shows T1c in all four places
        path = tmp_path / f"{index}{''.join(image.suffixes)}"
        path.symlink_to(image.resolve())
        paths.append(str(path))
    request = ExpertRequest(tuple(paths), "", facts["slice_index"], 2, "", str(tmp_path))
    output = {"pred": torch.tensor(load_volume(labels).array)[None], "request": request.to_json()}
    result = BratsFeedback("served")(output)
    expected = np.asarray(Image.open(golden / "glue" / facts["overlay_png"]).convert("RGB"))
    np.testing.assert_array_equal(result.images[0], expected)
    assert result.text.startswith(facts.get("text", ""))
    colors = {str(label): color for label, color in zip(facts["unique_labels"][1:], result.legend, strict=True)}
    assert colors == facts["colormap"]


def test_trained_text_equals_every_recorded_expert_turn(shared, run_feedback):
    folder = shared / "golden" / "data_eval" / "1_data_preparation" / "experts" / "brats" / "output"
    recorded = []
    for path in folder.glob("*.json"):
        for entry in json.loads(path.read_text()):
            recorded += [turn["value"] for turn in entry["conversations"] if turn["value"].startswith("The results")]
    ending = "Use this result to respond to this prompt:\n"
    assert len(recorded) == 12
    for text in recorded:
        question = text.split(ending)[1].removesuffix(".")
        assert run_feedback(labels_with([1, 2, 4]), question=question).text == text


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
    # Edges of the boxes and their diagonals bound every diameter; the boxes lie left of the middle of 30 mm.
    assert 15 <= rows["whole tumor"]["longest_diameter_mm"] <= np.hypot(15, 15)
    assert rows["whole tumor"]["perpendicular_diameter_mm"] <= rows["whole tumor"]["longest_diameter_mm"]
    assert {row["side"] for row in rows.values()} == {"both", "left"}


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


@pytest.mark.parametrize("order", [None, ["flair", "t1", "t1c", "t2"]])
def test_overlay_of_a_four_d_file_takes_the_channel(tmp_path, order):
    paths = write_sequences(tmp_path, (8, 9, 5))
    channels = dict(zip(("t1c", "t1", "t2", "flair"), map(nib.load, paths), strict=True))
    stacked = np.stack([np.asarray(channels[name].dataobj) for name in order or channels], axis=-1)
    nib.save(nib.Nifti1Image(stacked, np.eye(4)), tmp_path / "four.nii.gz")
    pictures = []
    for given, given_order in ((paths, None), ((str(tmp_path / "four.nii.gz"),), order)):
        request = ExpertRequest(given, "", 2, 2, "", str(tmp_path))
        feedback = BratsFeedback(overlay_sequence="flair", sequence_order=given_order)
        pictures.append(feedback({"pred": torch.zeros(1, 8, 9, 5), "request": request.to_json()}).images[0])
    assert np.array_equal(pictures[0], pictures[1])


def test_label_map_is_saved_in_the_geometry_of_the_t1c(tmp_path):
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    affine[:3, 3] = (90, 80, -60)
    pred = torch.zeros(1, 8, 9, 5)
    pred[0, 3, 4, 2] = 4
    paths = write_sequences(tmp_path, (8, 9, 5), affine)
    request = ExpertRequest(paths, "", None, 2, "", str(tmp_path), "case")
    result = BratsFeedback()({"pred": pred, "request": request.to_json()})
    saved = nib.load(result.label_map_path)
    assert result.label_map_path.name == "case_labels.nii.gz"
    assert np.allclose(saved.affine, affine)
    assert np.argwhere(np.asarray(saved.dataobj)).tolist() == [[3, 4, 2]]


def test_notes_about_the_scan_come_with_the_result(tmp_path):
    paths = write_sequences(tmp_path, (8, 9, 5))
    untold = []
    for index, path in enumerate(paths):
        (tmp_path / f"{index}.nii.gz").symlink_to(path)
        untold.append(str(tmp_path / f"{index}.nii.gz"))
    request = ExpertRequest(tuple(untold), "", 2, 2, "", str(tmp_path))
    result = BratsFeedback()({"pred": torch.zeros(1, 8, 9, 5), "request": request.to_json()})
    assert result.notes[0] == "No tumor was found in the whole volume."
    assert result.notes[1].startswith("The sequences were taken to be t1c, t1, t2, flair; the intensities neither")


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
