import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss

from cxr_expert.calibration import (
    Calibration,
    FindingCalibration,
    choose_band,
    choose_threshold,
    expected_calibration_error,
    fingerprint,
    fit_calibration,
    fit_finding,
    load_calibration,
    reliability,
    save_calibration,
    split_groups,
)
from cxr_expert.figure import draw_reliability
from cxr_expert.fitting import compare, cross_fit, reliability_curves, render_comparison
from cxr_expert.network import CxrEnsemble, CxrMember
from vila_m3_common.errors import UserError
from vila_m3_common.prompts import CXR_FINDINGS

NAN = float("nan")
EDEMA = CXR_FINDINGS.index("Edema")


def sigmoid(values):
    return 1 / (1 + np.exp(-values))


@pytest.fixture(scope="module")
def overconfident():
    """4,000 images whose true logit is 0.5 * the network's logit - 1."""
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, 4000)
    truth = (rng.random(4000) < sigmoid(0.5 * logits - 1)).astype(float)
    return sigmoid(logits), truth


def in_column(values, filler, column=EDEMA):
    table = np.full((len(values), 18), filler)
    table[:, column] = values
    return table


def test_a_temperature_fit_finds_the_temperature_and_the_bias(overconfident):
    fitted = fit_finding(*overconfident, "temperature")
    assert fitted.slope == pytest.approx(0.5, abs=0.05)
    assert fitted.bias == pytest.approx(-1, abs=0.1)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_calibration_lowers_ece_and_brier_score(overconfident, method):
    score, truth = overconfident
    probability = fit_finding(score[::2], truth[::2], method).probability(score[1::2])
    before, after = (expected_calibration_error(truth[1::2], values) for values in (score[1::2], probability))
    assert before > 0.15
    assert after < 0.04
    assert brier_score_loss(truth[1::2], probability) < brier_score_loss(truth[1::2], score[1::2]) - 0.03


def test_an_isotonic_fit_never_falls_and_stays_between_0_and_1(overconfident):
    probability = fit_finding(*overconfident, "isotonic").probability(np.linspace(0, 1, 101))
    assert (np.diff(probability) >= 0).all()
    assert probability.min() >= 0
    assert probability.max() <= 1


def test_the_threshold_parts_best_and_lies_between_the_images():
    probability = np.array([0.1, 0.2, 0.3, 0.5, 0.7, 0.9])
    assert choose_threshold(probability, np.array([0, 0, 0, 1, 1, 1])) == pytest.approx(0.4)
    assert choose_threshold(probability, np.array([0, 1, 1, 1, 1, 0])) == pytest.approx(0.15)


def test_the_band_keeps_the_share_of_positives_and_negatives_on_their_side():
    rng = np.random.default_rng(1)
    probability = np.concatenate([rng.uniform(0, 0.7, 1000), rng.uniform(0.3, 1, 1000)])
    truth = np.repeat([0, 1], 1000)
    low, high = choose_band(probability, truth, 0.5, kept=0.95)
    assert (probability[truth == 1] <= low).mean() <= 0.05
    assert (probability[truth == 0] > high).mean() <= 0.05
    assert (low, high) == pytest.approx((0.335, 0.665), abs=0.02)


def test_the_band_is_empty_where_the_findings_are_parted_well():
    assert choose_band(np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1]), 0.5, 0.95) == (0.5, 0.5)


def test_ece_and_reliability_equal_scikit_learns_curve(overconfident):
    score, truth = overconfident
    points = reliability(truth, score)
    true, stated = calibration_curve(truth, score, n_bins=10)
    np.testing.assert_allclose([point[1] for point in points], stated)
    np.testing.assert_allclose([point[2] for point in points], true)
    assert sum(point[0] for point in points) == pytest.approx(1)
    assert expected_calibration_error(np.array([1.0, 0.0]), np.array([0.8, 0.4])) == pytest.approx(0.3)


def test_findings_with_too_few_labels_or_scores_that_fall_keep_their_score(overconfident):
    score, truth = overconfident
    scores, labels = in_column(score, 0.3), in_column(truth, NAN)
    scores[:, 0], labels[:, 0] = 1 - score, truth
    labels[:9, 1] = [1, 1, 0, 0, 0, 0, 0, 0, 0]
    calibration = fit_calibration(scores, labels)
    assert list(calibration.findings) == ["Edema"]
    np.testing.assert_array_equal(np.delete(calibration.probabilities(scores), EDEMA, 1), np.delete(scores, EDEMA, 1))
    np.testing.assert_allclose(np.delete(calibration.decide(scores), EDEMA, 1), np.delete(scores, EDEMA, 1))


def test_a_set_without_enough_labels_is_explained():
    with pytest.raises(UserError, match="no finding could be calibrated: none has 8 images with and 8 without it"):
        fit_calibration(np.full((4, 18), 0.5), np.ones((4, 18)))


def test_an_unknown_method_is_explained():
    with pytest.raises(UserError, match="unknown calibration method 'platt'; valid: temperature, isotonic"):
        fit_calibration(np.zeros((1, 18)), np.zeros((1, 18)), "platt")


def test_decisions_have_the_threshold_at_one_half_and_keep_the_order(overconfident):
    calibration = fit_calibration(in_column(overconfident[0], 0.3), in_column(overconfident[1], NAN))
    fitted = calibration.findings["Edema"]
    scores = np.sort(overconfident[0])
    decisions = calibration.decide(in_column(scores, 0.3))[:, EDEMA]
    assert (np.diff(decisions) >= 0).all()
    assert ((decisions > 0.5) == (fitted.probability(scores) > fitted.threshold)).all()


def test_uncertain_are_the_findings_inside_their_band():
    fitted = FindingCalibration("temperature", 0.3, (0.2, 0.6))
    scores = in_column([0.1, 0.3, 0.5, 0.7], 0.4)
    assert Calibration({"Edema": fitted}).uncertain(scores) == [[], ["Edema"], ["Edema"], []]


def ensemble(value=0.0):
    head = torch.nn.Linear(2, 18)
    torch.nn.init.constant_(head.weight, value)
    torch.nn.init.zeros_(head.bias)
    return CxrEnsemble({"nano": CxrMember(head, 8)})


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_a_saved_calibration_is_read_as_it_was(overconfident, tmp_path, method):
    scores = in_column(overconfident[0], 0.3)
    calibration = fit_calibration(scores, in_column(overconfident[1], NAN), method)
    path = save_calibration(calibration, tmp_path / "new" / "calibration.json", ensemble(), {"method": method})
    assert json.loads(path.read_text())["models"] == ["nano"]
    loaded = load_calibration(path, ensemble())
    assert loaded.findings == calibration.findings
    np.testing.assert_array_equal(loaded.probabilities(scores), calibration.probabilities(scores))


def test_a_calibration_of_other_weights_is_left_out_with_a_warning(tmp_path, caplog):
    fitted = FindingCalibration("temperature", 0.3, (0.2, 0.6))
    path = save_calibration(Calibration({"Edema": fitted}), tmp_path / "calibration.json", ensemble(0.0), {})
    assert fingerprint(ensemble(0.0)) != fingerprint(ensemble(1.0))
    with caplog.at_level(logging.WARNING):
        assert load_calibration(path, ensemble(1.0)) is None
    assert "calibration.json was fitted for other weights and is left out" in caplog.text


def test_no_file_is_no_calibration(tmp_path):
    assert load_calibration(tmp_path / "none.json", ensemble()) is None
    assert load_calibration(None, ensemble()) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "calibration.json is no calibration"),
        ("{}", "calibration.json is no calibration"),
        (
            '{"weights": "", "findings": {"Lump": '
            '{"method": "temperature", "threshold": 0.5, "band": [0, 1], "curve": []}}}',
            r"calibrates unknown findings \['Lump'\]; fit it with configs/calibrate.json",
        ),
    ],
)
def test_a_damaged_calibration_is_explained(tmp_path, text, message):
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_calibration(tmp_path / "calibration.json", ensemble())


def test_halves_keep_the_images_of_a_patient_together():
    groups = np.repeat([str(number) for number in range(20)], 3)
    halves = split_groups(groups)
    assert halves.sum() == 30
    assert all(len(set(halves[groups == name])) == 1 for name in groups)


def test_cross_fitted_figures_improve_and_are_told(overconfident):
    scores, labels = in_column(overconfident[0], 0.3), in_column(overconfident[1], NAN)
    probabilities, decisions = cross_fit(scores, labels, range(len(scores)), "temperature", 4, 0.95)
    report = compare(scores, labels, probabilities, decisions)
    assert list(report) == ["Edema"]
    assert report["Edema"]["after"]["ece"] < report["Edema"]["before"]["ece"] / 3
    assert report["Edema"]["after"]["brier"] < report["Edema"]["before"]["brier"] - 0.03
    assert f"Edema {report['Edema']['positives']:>32}" in render_comparison(report)


def test_the_reliability_plot_has_a_panel_per_finding(overconfident):
    scores, labels = in_column(overconfident[0], 0.3), in_column(overconfident[1], NAN)
    curves = reliability_curves(scores, scores, labels, ["Edema"])
    assert len(curves["Edema"][0]) == 10
    few, many = draw_reliability(curves), draw_reliability(dict.fromkeys("abcde", curves["Edema"]))
    assert many.height > few.height
    colors = {color for _, color in Image.Image.getcolors(few, 1 << 16)}
    assert (70, 110, 160) in colors
