"""Fits a calibration on labelled radiographs and writes what it is worth."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vila_m3_common.errors import exits_with_message
from vila_m3_common.prompts import CXR_FINDINGS

from .calibration import (
    Method,
    fit_calibration,
    reliability,
    save_calibration,
    split_groups,
)
from .evaluation import FindingMetrics, Table, add_calibration_errors, tabulate_findings
from .figure import Curves, draw_reliability
from .network import CxrEnsemble


@exits_with_message
def run_calibration(
    evaluator: Any,
    metric: FindingMetrics,
    network: CxrEnsemble,
    calibration_out: str,
    output_dir: str,
    method: Method = "temperature",
    kept: float = 0.95,
) -> None:
    """Score the images, fit the calibration, and write it with ``calibration.json`` and ``reliability.png``.

    The file that is saved is fitted on all images. The figures in ``output_dir`` come from two halves of the patients:
    each half is judged by the fit on the other.

    Args:
        evaluator: runs the network over the labelled images.
        metric: collects its scores; its ``items`` tell the patients.
        network: the ensemble.
        calibration_out: file that inference reads.
        output_dir: folder for figures and plot.
        method: ``temperature`` or ``isotonic``.
        kept: share of the positives and negatives outside the uncertain band's wrong side, see ``choose_band``.
    """
    evaluator.run()
    scores, labels, groups = metric.scores, metric.labels, metric.groups
    calibration = fit_calibration(scores, labels, method, metric.min_positives, kept)
    crossed = cross_fit(scores, labels, groups, method, metric.min_positives // 2, kept)
    report = compare(scores, labels, *crossed)
    facts = {"method": method, "kept": kept, "image_count": len(scores), "patient_count": len(set(groups))}
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.json").write_text(json.dumps({**facts, "findings": report}, indent=2))
    draw_reliability(reliability_curves(scores, crossed[0], labels, list(calibration.findings))).save(
        folder / "reliability.png"
    )
    print(render_comparison(report))
    print(f"written to {save_calibration(calibration, calibration_out, network, facts)} and {folder}")


def cross_fit(
    scores: np.ndarray, labels: np.ndarray, groups: Sequence[Any], method: Method, min_positives: int, kept: float
) -> tuple[np.ndarray, np.ndarray]:
    """Calibrate each half of the patients by the fit on the other half.

    Returns:
        Probabilities and decisions (threshold at 0.5), both ``(N, 18)``.
    """
    is_first = split_groups(groups)
    probabilities, decisions = np.empty_like(scores), np.empty_like(scores)
    for half in (is_first, ~is_first):
        fitted = fit_calibration(scores[~half], labels[~half], method, max(min_positives, 1), kept)
        probabilities[half] = fitted.probabilities(scores[half])
        decisions[half] = fitted.decide(scores[half])
    return probabilities, decisions


def compare(scores: np.ndarray, labels: np.ndarray, probabilities: np.ndarray, decisions: np.ndarray) -> Table:
    """Return F1, Brier score and ECE of every finding before and after calibration, all ``(N, 18)``."""
    before, after = tabulate_findings(scores, labels), tabulate_findings(decisions, labels)
    add_calibration_errors(before, scores, labels)
    add_calibration_errors(after, probabilities, labels)
    return {
        finding: {
            "positives": row["positives"],
            "negatives": row["negatives"],
            "before": {name: row[name] for name in ("f1", "brier", "ece")},
            "after": {name: after[finding][name] for name in ("f1", "brier", "ece")},
        }
        for finding, row in before.items()
        if row["auroc"] is not None
    }


def reliability_curves(
    scores: np.ndarray, probabilities: np.ndarray, labels: np.ndarray, findings: Sequence[str]
) -> dict[str, Curves]:
    """Return the reliability of the findings before and after calibration, for a plot."""
    curves: dict[str, Curves] = {}
    for finding in findings:
        column = CXR_FINDINGS.index(finding)
        known = ~np.isnan(labels[:, column])
        truth = labels[known, column]
        curves[finding] = (
            [point[1:] for point in reliability(truth, scores[known, column])],
            [point[1:] for point in reliability(truth, probabilities[known, column])],
        )
    return curves


def render_comparison(report: Mapping[str, Any]) -> str:
    """Return the comparison as a plain table."""
    lines = [f"{'finding':<28}{'positives':>10}{'F1':>16}{'Brier':>16}{'ECE':>16}   before -> after, cross-fitted"]
    for finding, row in report.items():
        pairs = [f"{row['before'][name]:.3f} -> {row['after'][name]:.3f}" for name in ("f1", "brier", "ece")]
        lines.append(f"{finding:<28}{row['positives']:>10}" + "".join(f"{pair:>16}" for pair in pairs))
    return "\n".join(lines)
