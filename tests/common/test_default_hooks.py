from pathlib import Path
from typing import Any

import pytest
import torch
from toy_bundle import METADATA

from vila_m3_common.default_hooks import DefaultHooks, card_from_metadata
from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.volumes import load_volume


def hooks_for(**changes: Any) -> DefaultHooks:
    metadata = {**METADATA, **changes}
    return DefaultHooks(metadata, card_from_metadata(metadata, "bone_ct"))


def output_of(ct_file: Path, tmp_path: Path, prediction: torch.Tensor) -> dict[str, Any]:
    request = ExpertRequest((str(ct_file),), slice_index=20, question="Q", output_dir=str(tmp_path), stem="x")
    return {"request": request.to_json(), "pred": prediction}


@pytest.mark.parametrize(("modality", "study"), [("CT", "CT"), ("MR", "MRI"), ("X-ray", "CXR"), ("US", "")])
def test_the_card_takes_its_words_from_the_metadata(modality: str, study: str) -> None:
    formats = {"inputs": {"image": {"modality": modality}}, "outputs": {}}
    card = card_from_metadata({**METADATA, "network_data_format": formats}, "spleen-ct.v2")
    assert (card.name, card.modality, card.study_modality) == ("SPLEEN_CT_V2", modality, study)
    assert card.input_description == f"one {modality} volume"


def test_metadata_that_says_nothing_still_makes_a_card() -> None:
    card = card_from_metadata({}, "x")
    assert (card.name, card.modality, card.accuracy, card.task) == ("X", "unknown", "not stated", "segmentation")


def test_one_image_is_a_path_and_several_are_a_list() -> None:
    assert hooks_for().expert_request(ExpertRequest(("a.nii",))) == {"image": "a.nii"}
    assert hooks_for().expert_request(ExpertRequest(("a.nii", "b.nii"))) == {"image": ["a.nii", "b.nii"]}


def test_one_hot_predictions_become_labels(ct_file: Path, tmp_path: Path) -> None:
    bone = torch.from_numpy(load_volume(ct_file).array >= 100)
    prediction = torch.stack([~bone, bone]).float()
    result = hooks_for().expert_feedback(output_of(ct_file, tmp_path, prediction))
    assert result.legend == {"red": "bone"}
    assert result.overlay_path is not None
    assert result.overlay_path.is_file()


def test_a_prediction_on_another_grid_is_refused(ct_file: Path, tmp_path: Path) -> None:
    message = r"BONE_CT returned a label map of \(4, 4, 4\) .* must invert the resampling \(Invertd\)"
    with pytest.raises(UserError, match=message):
        hooks_for().expert_feedback(output_of(ct_file, tmp_path, torch.zeros(1, 4, 4, 4)))


def test_a_classification_bundle_reports_every_class(ct_file: Path, tmp_path: Path) -> None:
    formats = {"inputs": {"image": {"modality": "X-ray"}}, "outputs": {"pred": {"channel_def": {"0": "Edema"}}}}
    hooks = hooks_for(task="Chest X-ray classification", network_data_format=formats)
    result = hooks.expert_feedback(output_of(ct_file, tmp_path, torch.tensor([0.7, 0.2])))
    assert result.scores == pytest.approx({"Edema": 0.7, "class 1": 0.2})
    assert result.text.startswith("The resulting predictions are:\nedema: yes\nclass 1: no\n. Analyze the image")
