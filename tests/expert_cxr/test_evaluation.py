import json

import pytest
import torch
from ignite.engine import Engine

from cxr_expert.evaluation import FindingMetrics, WriteReport, average_auroc, render_report, tabulate_findings
from cxr_expert.network import CxrEnsemble, CxrMember
from vila_m3_common.prompts import CXR_FINDINGS


def table_of(scores, labels):
    """Put four images with one finding each into column 0; all other labels are unknown."""
    full_scores, full_labels = torch.zeros(len(scores), 18), torch.full((len(scores), 18), float("nan"))
    full_scores[:, 0], full_labels[:, 0] = torch.tensor(scores), torch.tensor(labels)
    return tabulate_findings(full_scores, full_labels)


def test_auroc_counts_ordered_pairs_and_f1_cuts_above_one_half():
    row = table_of([0.9, 0.5, 0.6, 0.1], [1.0, 1.0, 0.0, 0.0])["Atelectasis"]
    assert row == {"positives": 2, "negatives": 2, "auroc": 0.75, "f1": pytest.approx(0.5)}


def test_unknown_labels_are_left_out():
    row = table_of([0.9, 0.1, 0.2], [1.0, 0.0, float("nan")])["Atelectasis"]
    assert (row["positives"], row["negatives"], row["auroc"]) == (1, 1, 1.0)


def test_finding_without_a_yes_has_no_figures():
    table = table_of([0.9, 0.1], [0.0, 0.0])
    assert table["Atelectasis"]["auroc"] is None
    assert table["Mass"] == {"positives": 0, "negatives": 0, "auroc": None, "f1": None}


def test_mean_takes_trained_findings_with_enough_positives():
    rows = {"Mass": (0.9, 8), "Edema": (0.1, 7), "Hernia": (0.5, 9)}
    table = {name: {"positives": count, "auroc": auroc} for name, (auroc, count) in rows.items()}
    assert average_auroc(table, 8, untrained=("Hernia",)) == pytest.approx(0.9)
    assert average_auroc(table, 10) != average_auroc(table, 10)


def test_report_leaves_out_findings_that_the_network_does_not_know(tmp_path):
    network = CxrEnsemble({"a": CxrMember(torch.nn.Identity(), 8, ["Atelectasis"] + [""] * 17)})
    metric = FindingMetrics(min_positives=1, network=network)
    labels = torch.zeros(2, 18)
    labels[0] = 1
    engine = Engine(lambda engine, batch: (batch, list(labels)))
    metric.attach(engine, "mean_auroc")
    WriteReport(metric, str(tmp_path / "new" / "metrics.json")).attach(engine)
    engine.run([[torch.full((18,), 0.8), torch.full((18,), 0.3)]])
    report = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert report["mean_auroc"] == 1.0
    assert report["image_count"] == 2
    assert list(report["findings"]) == ["Atelectasis"]
    assert report["untrained_findings"] == list(CXR_FINDINGS[1:])
    assert "Atelectasis" in render_report(report)
    assert render_report(report).endswith("at least 1 positives: 1.000")


def test_mean_without_enough_positives_is_null_in_the_report():
    metric = FindingMetrics(min_positives=8)
    metric.update(([torch.zeros(18)], [torch.zeros(18)]))
    metric.compute()
    assert metric.report["mean_auroc"] is None
    assert render_report(metric.report).endswith("none: too few positives")
