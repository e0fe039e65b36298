"""Request and feedback; texts and overlays are compared with the recorded outputs of the reference."""

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest
from vista3d_expert.hooks import Vista3dFeedback, Vista3dRequest, merge_legend

QUESTION = "Is there a tumor?"


def read_cases(glue):
    cases = json.loads((glue / "glue.json").read_text())["ct"]
    return {
        name: case
        for name, case in cases.items()
        if isinstance(case, dict) and {"label_file", "text_all_groups"} <= set(case)
    }


def feedback_for(case, glue, folder, variant="trained"):
    request = ExpertRequest(
        image_paths=(str(glue / "inputs" / "ct.nii.gz"),),
        slice_index=case["slice_index"],
        axis=case["axis"],
        question=QUESTION,
        output_dir=str(folder),
    )
    labels = np.asarray(nib.load(glue / case["label_file"]).dataobj)
    output = {"pred": torch.from_numpy(labels)[None], "request": request.to_json(), "label_prompt": "[1, 26]"}
    return Vista3dFeedback(variant)(output)


def test_texts_are_those_of_the_reference(glue, tmp_path):
    cases = read_cases(glue)
    assert len(cases) >= 12
    for name, case in cases.items():
        described = case["text_all_groups"]
        trained = feedback_for(case, glue, tmp_path).text
        served = feedback_for(case, glue, tmp_path, "served").text
        assert trained == f"{described}Use this result to respond to this prompt:\n{QUESTION}.", name
        assert served == f"{described}Use this result to respond to this prompt:\n{QUESTION}", name


def recorded_training_turns(shared):
    """Yield (expert turn, question) of the recorded CT conversations of the training data."""
    folder = shared / "golden/data_eval/1_data_preparation/experts/vista3d/output"
    for name in ("vista3d_train.json", "vista3d_test.json"):
        for entry in json.loads((folder / name).read_text()):
            texts = [turn["value"] for turn in entry["conversations"]]
            if len(texts) > 2:
                yield texts[2], texts[0].rsplit("This is a CT image.\n", 1)[1]


def test_trained_turns_are_those_of_the_recorded_training_data(shared, ct_file, tmp_path):
    """The made-up records name the structure before its colour, ours the colour first, as the served texts do."""
    ids, count = {"liver": 1, "spleen": 3}, 0
    for recorded, question in recorded_training_turns(shared):
        pairs = [pair.split(": ") for pair in recorded.split("describe ")[1].split(". Use")[0].split(", ")]
        labels = torch.zeros(1, 72, 64, 56)
        for place, (structure, _) in enumerate(pairs):
            labels[0, 30, 10 * place : 10 * place + 9, 20:30] = ids[structure]
        request = ExpertRequest((str(ct_file),), slice_index=25, question=question, output_dir=str(tmp_path))
        output = {"pred": labels, "request": request.to_json(), "label_prompt": "[1, 3]"}
        swapped = ", ".join(f"{color}: {structure}" for structure, color in pairs)
        described = ", ".join(": ".join(pair) for pair in pairs)
        assert Vista3dFeedback()(output).text == recorded.replace(described, swapped, 1)
        count += 1
    assert count == 20


def test_overlays_are_those_of_the_reference(glue, tmp_path):
    for name, case in read_cases(glue).items():
        recorded = np.asarray(Image.open(glue / case["overlay_png"].split(" ")[0])).astype(int)
        (picture,) = feedback_for(case, glue, tmp_path).images
        assert picture.shape == recorded.shape, name
        assert np.abs(picture - recorded).max() <= 1, name


def test_id_without_a_name_takes_a_colour_but_is_not_named(glue, tmp_path):
    case = read_cases(glue)["ct_unknown_id_z105"]
    result = feedback_for(case, glue, tmp_path)
    assert len(case["colormap"]) > len(result.legend)
    assert set(result.legend) < set(case["colormap"].values())


def test_result_holds_files_measurements_and_notes(glue, tmp_path):
    case = read_cases(glue)["ct_hepatic_z20"]
    result = feedback_for(case, glue, tmp_path)
    assert result.overlay_path.is_file()
    assert nib.load(result.label_map_path).shape == (122, 101, 112)
    rows = {row["name"]: row for row in result.measurements}
    assert set(rows) == {"liver", "hepatic tumor"}
    assert rows["hepatic tumor"]["mean_hu"] > 64  # the made-up rule of this label map: above 64 HU
    assert any("hepatic tumor is largest in axial slice" in note and "outside" in note for note in result.notes)


def test_tumor_that_was_asked_for_and_not_found_is_noted(glue, tmp_path):
    case = read_cases(glue)["ct_organs_z80"]
    assert "No hepatic tumor was found in the volume." in feedback_for(case, glue, tmp_path).notes


def test_structures_that_share_a_colour_are_joined():
    assert merge_legend([("red", "liver"), ("blue", "aorta"), ("red", "spleen")]) == {
        "red": "liver, spleen",
        "blue": "aorta",
    }


def test_request_becomes_an_item_with_class_ids(ct_file):
    item = Vista3dRequest()(ExpertRequest((str(ct_file),), argument="hepatic tumor"))
    assert item == {"image": str(ct_file), "label_prompt": [1, 26]}


def test_label_prompt_overrides_the_argument(ct_file):
    item = Vista3dRequest(["spleen"])(ExpertRequest((str(ct_file),), argument="hepatic tumor"))
    assert item["label_prompt"] == [3]


def test_prompts_of_a_request_stand_in_place_of_the_configured_ones(ct_file):
    hook = Vista3dRequest(["spleen"], points=[[1, 1, 1]])
    prompts = {"label_prompt": [1], "points": [[2, 3, 4]], "point_labels": [1]}
    item = hook(ExpertRequest((str(ct_file),), prompts=prompts))
    assert item == {"image": str(ct_file), "label_prompt": [1], "points": ((2, 3, 4),), "point_labels": (1,)}
    assert hook(ExpertRequest((str(ct_file),), prompts={"label_prompt": [1]})) == {
        "image": str(ct_file),
        "label_prompt": [1],
    }
    with pytest.raises(UserError, match="lies outside"):
        hook(ExpertRequest((str(ct_file),), prompts={"points": [[900, 0, 0]]}))


def test_unknown_argument_is_a_user_error(ct_file):
    with pytest.raises(UserError, match="unknown VISTA3D argument 'lung tumour'; did you mean 'lung tumor'"):
        Vista3dRequest()(ExpertRequest((str(ct_file),), argument="lung tumour"))


def test_several_images_are_refused(ct_file):
    with pytest.raises(UserError, match="reads one CT volume, but was given 2 images"):
        Vista3dRequest()(ExpertRequest((str(ct_file), str(ct_file))))


def test_four_channels_are_refused(tmp_path):
    path = tmp_path / "four.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=(4, 4, 4, 3)), np.eye(4)), path)
    with pytest.raises(UserError, match=r"four.nii.gz is 4-D \(4, 4, 4, 3\); VISTA3D reads one 3-D CT volume"):
        Vista3dRequest()(ExpertRequest((str(path),)))
