import json

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from sklearn.metrics import f1_score, roc_auc_score

from cxr_expert.calibration import Calibration, FindingCalibration
from cxr_expert.evaluation import (
    FindingMetrics,
    WriteReport,
    add_intervals,
    average_auroc,
    render_report,
    resample_weights,
    tabulate_findings,
    weighted_auroc,
    weighted_f1,
)
from cxr_expert.network import CxrEnsemble, CxrMember
from vila_m3_common.prompts import CXR_FINDINGS

NAN = float("nan")


def in_column_0(values, filler):
    table = np.full((len(values), 18), filler)
    table[:, 0] = values
    return table


def table_of(scores, labels):
    """Put images with one finding each into column 0; all other labels are unknown."""
    return tabulate_findings(in_column_0(scores, 0.0), in_column_0(labels, NAN))


def test_auroc_counts_ordered_pairs_and_f1_cuts_above_one_half():
    row = table_of([0.9, 0.5, 0.6, 0.1], [1.0, 1.0, 0.0, 0.0])["Atelectasis"]
    assert row == {"positives": 2, "negatives": 2, "auroc": 0.75, "f1": pytest.approx(0.5)}


def test_unknown_labels_are_left_out():
    row = table_of([0.9, 0.1, 0.2], [1.0, 0.0, NAN])["Atelectasis"]
    assert (row["positives"], row["negatives"], row["auroc"]) == (1, 1, 1.0)


def test_finding_without_a_yes_has_no_figures():
    table = table_of([0.9, 0.1], [0.0, 0.0])
    assert table["Atelectasis"]["auroc"] is None
    assert table["Mass"] == {"positives": 0, "negatives": 0, "auroc": None, "f1": None}


def test_mean_takes_findings_with_enough_positives():
    rows = {"Mass": (0.9, 8), "Edema": (0.1, 7), "Hernia": (0.5, 9), "Nodule": (None, 9)}
    table = {name: {"positives": count, "auroc": auroc} for name, (auroc, count) in rows.items()}
    assert average_auroc(table, 8) == pytest.approx(0.7)
    assert np.isnan(average_auroc(table, 10))


@pytest.mark.parametrize("digits", [1, 9])
def test_weighted_figures_equal_scikit_learns(digits):
    """Rounding to one digit makes ties."""
    rng = np.random.default_rng(0)
    truth, weights = rng.random(200) < 0.3, rng.integers(0, 4, 200)
    score = (rng.random(200) + 0.3 * truth).round(digits)
    assert weighted_auroc(score, truth, weights) == pytest.approx(roc_auc_score(truth, score, sample_weight=weights))
    expected = f1_score(truth, score > 0.6, sample_weight=weights)
    assert weighted_f1(score > 0.6, truth, weights) == pytest.approx(expected)


def test_a_sample_of_one_kind_has_no_auroc_and_no_yes_gives_f1_0():
    nothing = np.zeros(2, bool)
    assert np.isnan(weighted_auroc(np.array([0.1, 0.2]), nothing, np.ones(2)))
    assert weighted_f1(nothing, nothing, np.ones(2)) == 0


def test_resampling_draws_patients_and_keeps_their_images_together():
    groups = ["a", "a", "b", "c", "c", "c"]
    draws = np.array(list(resample_weights(groups, 200)))
    assert (draws[:, 0] == draws[:, 1]).all()
    assert (draws[:, 3] == draws[:, 5]).all()
    assert (draws[:, 0] + draws[:, 2] + draws[:, 3] == 3).all()
    assert draws[:, 2].mean() == pytest.approx(1, abs=0.15)


def test_the_interval_of_the_auroc_covers_as_the_theory_says():
    """Against the standard error of Hanley and McNeil, Radiology 1982, for two normal distributions."""
    rng = np.random.default_rng(3)
    truth = np.repeat([0.0, 1.0], [200, 100])
    score = rng.normal(0, 1, 300) + truth
    table = table_of(score, truth)
    mean_interval = add_intervals(
        table, in_column_0(score, 0.0), in_column_0(truth, NAN), range(300), ["Atelectasis"], resample_count=1000
    )
    area = table["Atelectasis"]["auroc"]
    both, twice = area / (2 - area), 2 * area**2 / (1 + area)
    error = np.sqrt((area * (1 - area) + 99 * (both - area**2) + 199 * (twice - area**2)) / (100 * 200))
    low, high = table["Atelectasis"]["auroc_interval"]
    assert (low, high) == pytest.approx((area - 1.96 * error, area + 1.96 * error), abs=0.01)
    assert mean_interval == [low, high]
    f1_low, f1_high = table["Atelectasis"]["f1_interval"]
    assert f1_low < table["Atelectasis"]["f1"] < f1_high


def test_images_of_one_patient_widen_the_interval():
    rng = np.random.default_rng(4)
    truth = np.repeat((rng.random(60) < 0.4).astype(float), 10)
    score = np.repeat(rng.normal(0, 1, 60), 10) + truth

    def width(groups):
        table = table_of(score, truth)
        add_intervals(table, in_column_0(score, 0.0), in_column_0(truth, NAN), groups, [], resample_count=300)
        low, high = table["Atelectasis"]["auroc_interval"]
        return high - low

    assert width(np.repeat(np.arange(60), 10)) > 2 * width(range(600))


def test_report_marks_findings_that_the_network_does_not_know(tmp_path):
    network = CxrEnsemble({"a": CxrMember(torch.nn.Identity(), 8, ["Atelectasis"] + [""] * 17)})
    metric = FindingMetrics(min_positives=1, network=network, items=[{"patient": 5}, {"patient": 5}])
    labels = torch.zeros(2, 18)
    labels[0] = 1
    engine = Engine(lambda engine, batch: (batch, list(labels)))
    metric.attach(engine, "mean_auroc")
    WriteReport(metric, str(tmp_path / "new" / "metrics.json")).attach(engine)
    known, unknown = torch.zeros(18), torch.zeros(18)
    known[0], unknown[0] = 0.8, 0.3
    engine.run([[known, unknown]])
    report = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert report["findings"]["Atelectasis"]["auroc"] == 1.0
    assert report["findings"]["Mass"]["auroc"] == 0.5
    assert report["mean_auroc"] == pytest.approx((1 + 17 * 0.5) / 18)
    assert (report["image_count"], report["patient_count"], report["models"]) == (2, 1, ["a"])
    assert report["untrained_findings"] == list(CXR_FINDINGS[1:])
    lines = render_report(report).splitlines()
    assert lines[1].startswith("Atelectasis ")
    assert lines[2].endswith("no trained head")
    assert lines[-1].endswith("at least 1 positives: 0.528")


def test_mean_without_enough_positives_is_null_in_the_report():
    metric = FindingMetrics(min_positives=8, resample_count=10)
    metric.update(([torch.zeros(18)], [torch.zeros(18)]))
    assert np.isnan(metric.compute())
    assert metric.report["mean_auroc"] is None
    assert metric.report["mean_auroc_interval"] is None
    assert render_report(metric.report).endswith("none: too few positives")


def test_a_calibration_moves_f1_to_its_threshold_and_adds_brier_and_ece():
    fitted = FindingCalibration("temperature", 0.2, (0.1, 0.3))
    metric = FindingMetrics(min_positives=1, calibration=Calibration({"Atelectasis": fitted}), resample_count=20)
    scores, labels = torch.zeros(4, 18), torch.full((4, 18), NAN)
    scores[:, 0], labels[:, 0] = torch.tensor([0.1, 0.15, 0.25, 0.3]), torch.tensor([0.0, 0.0, 1.0, 1.0])
    metric.update((list(scores), list(labels)))
    assert metric.compute() == 1.0
    row = metric.report["findings"]["Atelectasis"]
    assert row["f1"] == 1.0
    assert row["auroc_interval"] == [1.0, 1.0]
    assert row["brier"] == pytest.approx(np.mean([0.1**2, 0.15**2, 0.75**2, 0.7**2]))
    assert row["ece"] == pytest.approx((0.25 + 0.75 + 0.7) / 4, abs=1e-6)
    assert metric.report["calibrated_findings"] == ["Atelectasis"]
    assert "(1.000, 1.000)" in render_report(metric.report)
