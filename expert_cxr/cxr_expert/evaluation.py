"""AUROC, F1 and calibration per finding, with confidence intervals, as a metric for MONAI's engines."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.metrics import compute_roc_auc
from monai.utils import evenly_divisible_all_gather
from sklearn.metrics import brier_score_loss

from vila_m3_common.errors import exits_with_message
from vila_m3_common.prompts import CXR_FINDINGS
from vila_m3_common.training import is_main_process

from .calibration import Calibration, expected_calibration_error
from .network import CxrEnsemble

Row = dict[str, Any]
Table = dict[str, Row]

# Bounds of the confidence intervals in percent.
INTERVAL = (2.5, 97.5)


def tabulate_findings(scores: np.ndarray, labels: np.ndarray, threshold: float = 0.5) -> Table:
    """Compare scores with labels, finding by finding.

    Args:
        scores: ``(N, 18)`` in 0..1.
        labels: ``(N, 18)``, 1, 0, or NaN for unknown.
        threshold: scores above it count as "yes" in F1.

    Returns:
        finding -> ``positives``, ``negatives``, ``auroc`` and ``f1``; the last two are None where the labels hold
        no yes or no no.
    """
    table: Table = {}
    for index, finding in enumerate(CXR_FINDINGS):
        known = ~np.isnan(labels[:, index])
        truth, score = labels[known, index], scores[known, index]
        positives = int(truth.sum())
        negatives = len(truth) - positives
        has_both = positives > 0 and negatives > 0
        table[finding] = {
            "positives": positives,
            "negatives": negatives,
            "auroc": float(compute_roc_auc(torch.from_numpy(score), torch.from_numpy(truth))) if has_both else None,
            "f1": weighted_f1(score > threshold, truth == 1, np.ones(len(truth))) if has_both else None,
        }
    return table


def weighted_f1(predicted: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """Return F1 of two ``(N,)`` bool arrays, each image counted ``weights`` times; 0 without a yes in either."""
    hits = weights[predicted & truth].sum()
    said = weights[predicted].sum() + weights[truth].sum()
    return float(2 * hits / said) if said else 0.0


def weighted_auroc(score: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> float:
    """Return the area under the ROC curve, each image counted ``weights`` times; ties count half.

    It is the share of pairs of a positive and a negative image that the scores put in order.

    Args:
        score: ``(N,)``.
        truth: ``(N,)`` bool.
        weights: ``(N,)``, how often each image counts; NaN is returned if only one kind is left.
    """
    _, ranks = np.unique(score, return_inverse=True)
    positives = np.bincount(ranks, weights * truth)
    negatives = np.bincount(ranks, weights * ~truth)
    pair_count = positives.sum() * negatives.sum()
    below = np.cumsum(negatives) - negatives / 2
    return float(positives @ below / pair_count) if pair_count else float("nan")


def resample_weights(groups: Sequence[Any], count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Draw the groups with replacement; yield how often each image counts, ``(N,)``.

    Images of one patient resemble each other, so patients are drawn and not images.
    """
    names, members = np.unique(np.asarray(groups), return_inverse=True)
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[members]


def add_intervals(
    table: Table,
    scores: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Any],
    averaged: Sequence[str],
    threshold: float = 0.5,
    resample_count: int = 1000,
) -> list[float] | None:
    """Add ``auroc_interval`` and ``f1_interval`` to a table: 95 %, percentiles over resampled patients.

    Args:
        table: from :func:`tabulate_findings`, changed in place.
        scores: ``(N, 18)``.
        labels: ``(N, 18)``.
        groups: ``(N,)``, the patient of each image.
        averaged: the findings of the mean.
        threshold: as for the table.
        resample_count: how many resamples.

    Returns:
        The interval of the mean AUROC; None if no finding is averaged.
    """
    measured = [finding for finding, row in table.items() if row["auroc"] is not None]
    draws = {finding: np.full((2, resample_count), np.nan) for finding in measured}
    for number, weights in enumerate(resample_weights(groups, resample_count)):
        for finding in measured:
            index = CXR_FINDINGS.index(finding)
            known = ~np.isnan(labels[:, index])
            truth, score, weight = labels[known, index] == 1, scores[known, index], weights[known]
            draws[finding][0, number] = weighted_auroc(score, truth, weight)
            draws[finding][1, number] = weighted_f1(score > threshold, truth, weight)
    for finding in measured:
        table[finding]["auroc_interval"] = percentiles(draws[finding][0])
        table[finding]["f1_interval"] = percentiles(draws[finding][1])
    if not averaged:
        return None
    with warnings.catch_warnings():
        # A resample of a very small set may hold no finding with both kinds; its mean is left out.
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return percentiles(np.nanmean([draws[finding][0] for finding in averaged], axis=0))


def percentiles(draws: np.ndarray) -> list[float]:
    """Return the bounds of the 95 % interval of ``(resamples,)``; NaN stands for a resample of one kind only."""
    return [float(bound) for bound in np.nanpercentile(draws, INTERVAL)]


def averaged_findings(table: Table, min_positives: int) -> list[str]:
    """Return the findings with at least ``min_positives`` positives, whose AUROCs make the mean."""
    return [name for name, row in table.items() if row["auroc"] is not None and row["positives"] >= min_positives]


def average_auroc(table: Table, min_positives: int) -> float:
    """Return the mean AUROC of the findings with at least ``min_positives`` positives; NaN if there is none.

    A finding that the network has no trained head for counts with what it is reported as: the same score for
    every image, an AUROC of 0.5.
    """
    values = [table[name]["auroc"] for name in averaged_findings(table, min_positives)]
    return sum(values) / len(values) if values else float("nan")


class FindingMetrics(Metric):
    """Mean AUROC over the findings.

    Afterwards the full table stands in ``report``, and ``scores`` and ``labels``, ``(N, 18)``, and ``groups`` hold
    what it was made of.

    Of several processes each sees the images that an unshuffled ``DistributedSampler`` deals out to it, and all of them
    return the figure of the whole.

    Args:
        min_positives: findings with fewer positives do not enter the mean.
        threshold: for F1.
        network: tells which findings have no trained head; None takes all as trained.
        calibration: turns the network's scores into probabilities and moves each threshold to 0.5.
        items: the images in the order in which they come; their ``patient`` is the unit of the resampling. Without
            it each image is its own patient.
        resample_count: resamples for the confidence intervals; 0 leaves them out.
        output_transform: picks ``(pred, label)`` from the engine's output, such as
            ``from_engine(["pred", "label"])``.
    """

    def __init__(
        self,
        min_positives: int = 8,
        threshold: float = 0.5,
        network: CxrEnsemble | None = None,
        calibration: Calibration | None = None,
        items: Sequence[Mapping[str, Any]] | None = None,
        resample_count: int = 0,
        output_transform: Callable = lambda output: output,
    ) -> None:
        self.min_positives = min_positives
        self.threshold = threshold
        self.network = network
        self.calibration = calibration
        self.items = items
        self.resample_count = resample_count
        self.report: dict[str, Any] = {}
        self.scores = self.labels = np.empty((0, len(CXR_FINDINGS)))
        self.groups: list[str] = []
        super().__init__(output_transform=output_transform)

    def reset(self) -> None:
        """Forget the images seen so far."""
        self._scores: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def update(self, output: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        """Add images: two sequences of ``(18,)``, scores and labels."""
        for score, label in zip(*output, strict=True):
            self._scores.append(torch.as_tensor(score).detach().float())
            self._labels.append(torch.as_tensor(label).detach().float())

    def compute(self) -> float:
        """Return the mean AUROC and fill ``report``."""
        self.scores, self.labels = _in_order(self._scores), _in_order(self._labels)
        items = self.items if self.items is not None else [{}] * len(self.scores)
        self.groups = [str(item.get("patient", index)) for index, item in enumerate(items)]
        self.report = self._report(self.scores, self.labels, self.groups)
        mean = self.report["mean_auroc"]
        return float("nan") if mean is None else mean

    def _report(self, scores: np.ndarray, labels: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
        decisions = self.calibration.decide(scores) if self.calibration else scores
        table = tabulate_findings(decisions, labels, self.threshold)
        averaged = averaged_findings(table, self.min_positives)
        interval = None
        if self.resample_count:
            interval = add_intervals(table, decisions, labels, groups, averaged, self.threshold, self.resample_count)
        if self.calibration:
            add_calibration_errors(table, self.calibration.probabilities(scores), labels)
        return {
            "mean_auroc": average_auroc(table, self.min_positives) if averaged else None,
            "mean_auroc_interval": interval,
            "averaged_findings": averaged,
            "image_count": len(scores),
            "patient_count": len(set(groups)),
            "min_positives": self.min_positives,
            "threshold": self.threshold,
            "models": list(self.network.classifiers) if self.network is not None else [],
            "untrained_findings": list(self.network.untrained_findings) if self.network is not None else [],
            "calibrated_findings": list(self.calibration.findings) if self.calibration else [],
            "resample_count": self.resample_count,
            "findings": table,
        }


def _in_order(rows: Sequence[torch.Tensor]) -> np.ndarray:
    """Return the ``(18,)`` rows of all processes as ``(N, 18)`` float64, in the order of the items."""
    gathered = evenly_divisible_all_gather(torch.stack(list(rows))).cpu().numpy().astype(np.float64)
    count, world_size = len(gathered), idist.get_world_size()
    dealt = np.concatenate([np.arange(rank, count, world_size) for rank in range(world_size)])
    return gathered[np.argsort(dealt)]


def add_calibration_errors(table: Table, probabilities: np.ndarray, labels: np.ndarray) -> None:
    """Add ``brier`` and ``ece`` (10 bins) to a table's rows, from ``(N, 18)`` probabilities."""
    for index, finding in enumerate(CXR_FINDINGS):
        known = ~np.isnan(labels[:, index])
        if table[finding]["auroc"] is None:
            continue
        truth, probability = labels[known, index], probabilities[known, index]
        table[finding]["brier"] = float(brier_score_loss(truth, probability))
        table[finding]["ece"] = expected_calibration_error(truth, probability)


class WriteReport:
    """Handler that writes the ``report`` of a :class:`FindingMetrics` as JSON when the engine is done.

    Of several processes rank 0 writes.
    """

    def __init__(self, metric: FindingMetrics, path: str) -> None:
        self.metric = metric
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Register at the end of a run; list it after the metric, which is attached with the engine."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the file."""
        if not is_main_process():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.metric.report, indent=2))


@exits_with_message
def run_evaluation(evaluator: Any, metric: FindingMetrics, path: str) -> None:
    """Run an evaluator and print the table that it wrote to ``path``."""
    evaluator.run()
    if is_main_process():
        print(render_report(metric.report))
        print(f"written to {path}")


def render_report(report: dict[str, Any]) -> str:
    """Return a report as a plain table, one line per finding that the labels cover; intervals are 95 %."""
    lines = [f"{'finding':<28}{'positives':>10}{'AUROC':>8}{'interval':>16}{'F1':>8}{'interval':>16}"]
    for finding, row in report["findings"].items():
        if row["auroc"] is not None:
            auroc = f"{row['auroc']:>8.3f}{_render_interval(row.get('auroc_interval')):>16}"
            f1 = f"{row['f1']:>8.3f}{_render_interval(row.get('f1_interval')):>16}"
            mark = "  no trained head" if finding in report["untrained_findings"] else ""
            lines.append(f"{finding:<28}{row['positives']:>10}{auroc}{f1}{mark}")
    mean = report["mean_auroc"]
    shown = "none: too few positives" if mean is None else f"{mean:.3f}"
    interval = _render_interval(report["mean_auroc_interval"])
    words = f"mean AUROC of findings with at least {report['min_positives']} positives: {shown} {interval}"
    return "\n".join([*lines, words.rstrip()])


def _render_interval(interval: Sequence[float] | None) -> str:
    return f"({interval[0]:.3f}, {interval[1]:.3f})" if interval else ""
