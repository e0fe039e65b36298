"""Texts come from the VILA-M3 reference, recorded in golden/experts/cxr and golden/data_eval."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_expert.calibration import Calibration, FindingCalibration
from cxr_expert.hooks import CxrFeedback, expert_request
from cxr_expert.network import CxrEnsemble, CxrMember
from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.phantoms import cxr_phantom
from vila_m3_common.prompts import CXR_FINDINGS, CXR_TRAINED_ORDER, cxr_feedback


def ensemble(trained=CXR_FINDINGS):
    targets = [name if name in trained else "" for name in CXR_FINDINGS]
    return CxrEnsemble({"one": CxrMember(torch.nn.Identity(), 8, targets)})


def run_output(scores, tmp_path, question="Is there an effusion?", picture=None):
    path = tmp_path / "x.png"
    Image.fromarray(cxr_phantom(5, []).image if picture is None else picture).save(path)
    request = ExpertRequest((str(path),), question=question, output_dir=str(tmp_path), stem="cxr")
    return {"pred": torch.tensor(scores), "request": request.to_json()}


@pytest.mark.parametrize("name", list("abcde"))
def test_served_text_equals_the_reference(shared, tmp_path, name):
    run = json.loads((shared / "golden/experts/cxr/expert_text.json").read_text())["runs"][name]
    question = run["instruction"].split("prompt:\n")[1]
    output = run_output([run["averaged"][finding] for finding in CXR_FINDINGS], tmp_path, question)
    result = CxrFeedback(ensemble(), "served")(output)
    # The reference returns the predictions and the instruction apart; the turn is both.
    assert result.text == f"{run['text']}{run['instruction']}"


def test_served_text_of_edge_values_equals_the_reference(shared):
    for case in json.loads((shared / "golden/experts/cxr/expert_text.json").read_text())["format_made_up"]:
        scores = {name: float(value) for name, value in case["predictions"].items()}
        assert cxr_feedback(scores, "Q", "served").startswith(case["text"])


def test_trained_turns_equal_the_training_data_byte_for_byte(shared, tmp_path):
    folder = shared / "golden/data_eval/1_data_preparation/experts/cxr"
    records = [
        record
        for part in ("train", "test")
        for record in json.loads((folder / f"output/cxr_expert_{part}.json").read_text())
    ]
    assert records
    for record in records:
        scores = json.loads((folder / "input/pred" / f"{record['image']}.json").read_text())
        expected = record["conversations"][2]["value"]
        question = expected.split("this prompt:\n", 1)[1]
        assert cxr_feedback(scores, question, "trained") == expected
        if set(scores) == set(CXR_FINDINGS):
            # A record keeps the order of its file; what serves has the one order of the training data.
            in_order = {finding: scores[finding] for finding in CXR_TRAINED_ORDER}
            output = run_output([scores[finding] for finding in CXR_FINDINGS], tmp_path, question)
            assert CxrFeedback(ensemble())(output).text == cxr_feedback(in_order, question, "trained")


def test_feedback_carries_scores_and_chart_but_no_image_for_the_model(tmp_path):
    result = CxrFeedback(ensemble())(run_output([0.9] + [0.1] * 17, tmp_path))
    assert list(result.scores) == list(CXR_TRAINED_ORDER)
    assert result.scores["Atelectasis"] == pytest.approx(0.9)
    assert result.images == ()
    assert result.label_map_path is None
    assert result.notes == []
    assert result.overlay_path == tmp_path / "cxr_scores.png"
    assert Image.open(result.overlay_path).width > 100


def test_findings_without_training_are_named_in_one_sentence(tmp_path):
    network = ensemble([name for name in CXR_FINDINGS if name not in ("Hernia", "Pleural_Thickening")])
    result = CxrFeedback(network)(run_output([0.0] * 18, tmp_path))
    assert result.notes == [
        "The loaded weights have no trained and calibrated head for pleural thickening, hernia; "
        "a 'no' there is only a missing answer."
    ]
    assert "hernia: no\n" in result.text


CALIBRATION = Calibration(
    {
        "Edema": FindingCalibration("temperature", 0.2, (0.1, 0.3)),
        "Mass": FindingCalibration("temperature", 0.6, (0.5, 0.7)),
    }
)


def with_scores(**scores):
    return [scores.get(finding, 0.0) for finding in CXR_FINDINGS]


def test_calibration_moves_the_thresholds_of_text_and_scores(tmp_path):
    result = CxrFeedback(ensemble(), calibration=CALIBRATION)(run_output(with_scores(Edema=0.4, Mass=0.4), tmp_path))
    assert "edema: yes\n" in result.text
    assert "mass: no\n" in result.text
    assert result.scores["Edema"] == pytest.approx(1 - 0.6 / 1.6)
    assert result.scores["Mass"] == pytest.approx(0.4 / 1.2)
    assert result.measurements == [
        {"name": "edema", "probability": 0.4, "threshold": 0.2, "is_uncertain": False},
        {"name": "mass", "probability": 0.4, "threshold": 0.6, "is_uncertain": False},
    ]
    assert result.notes == []


def test_an_uncertain_finding_is_yes_or_no_for_a_vlm_that_never_saw_the_word(tmp_path):
    output = run_output(with_scores(Edema=0.25, Mass=0.55), tmp_path)
    plain = CxrFeedback(ensemble(), calibration=CALIBRATION)(output)
    assert "edema: yes\n" in plain.text
    assert "mass: no\n" in plain.text
    assert "uncertain" not in plain.text
    assert plain.notes == ["Uncertain by the calibration, whatever the answer says: edema, mass."]
    assert [row["is_uncertain"] for row in plain.measurements] == [True, True]
    trained = CxrFeedback(ensemble(), calibration=CALIBRATION, vlm_reads_uncertain=True)(output)
    assert "edema: uncertain\n" in trained.text
    assert "mass: uncertain\n" in trained.text
    assert trained.scores == plain.scores


def test_a_picture_that_is_no_film_gets_a_note_and_its_scores(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    result = CxrFeedback(ensemble())(run_output([0.9] + [0.1] * 17, tmp_path, picture=noise))
    assert result.notes == [
        "The scores hold for frontal chest X-rays only, but the picture does not look like a frontal chest X-ray."
    ]
    assert result.scores["Atelectasis"] == pytest.approx(0.9)


def test_unknown_variant_is_refused():
    with pytest.raises(UserError, match="unknown feedback_variant 'server'; valid: trained, served"):
        CxrFeedback(ensemble(), "server")


def test_request_is_one_picture():
    assert expert_request(ExpertRequest(("a.png",))) == {"image": "a.png"}
    with pytest.raises(UserError, match="CXR reads one frontal chest X-ray, but was given 2 images; give one"):
        expert_request(ExpertRequest(("a.png", "b.png")))
