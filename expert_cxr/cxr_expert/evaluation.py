"""AUROC and F1 per finding, as a metric for MONAI's engines and as ``metrics.json``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.metrics import compute_roc_auc

from vila_m3_common.errors import exits_with_message
from vila_m3_common.prompts import CXR_FINDINGS

from .network import CxrEnsemble

Table = dict[str, dict[str, float | int | None]]


def tabulate_findings(scores: torch.Tensor, labels: torch.Tensor, threshold: float = 0.5) -> Table:
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
        known = ~labels[:, index].isnan()
        truth, score = labels[known, index], scores[known, index]
        positives, negatives = int(truth.sum()), int((1 - truth).sum())
        has_both = positives > 0 and negatives > 0
        table[finding] = {
            "positives": positives,
            "negatives": negatives,
            "auroc": float(compute_roc_auc(score, truth)) if has_both else None,
            "f1": _f1(score > threshold, truth == 1) if has_both else None,
        }
    return table


def _f1(predicted: torch.Tensor, truth: torch.Tensor) -> float:
    hits = int((predicted & truth).sum())
    return 2 * hits / (int(predicted.sum()) + int(truth.sum()))


def average_auroc(table: Table, min_positives: int, untrained: Sequence[str] = ()) -> float:
    """Return the mean AUROC of the trained findings with at least ``min_positives`` positives; NaN if there is none."""
    values = [
        row["auroc"]
        for finding, row in table.items()
        if row["auroc"] is not None and (row["positives"] or 0) >= min_positives and finding not in untrained
    ]
    return sum(values) / len(values) if values else float("nan")


class FindingMetrics(Metric):
    """Mean AUROC over the findings; the full table stands in ``report`` afterwards.

    Args:
        min_positives: findings with fewer positives do not enter the mean.
        threshold: for F1.
        network: tells which findings have no trained head; None takes all as trained.
        output_transform: picks ``(pred, label)`` from the engine's output, such as
            ``from_engine(["pred", "label"])``.
    """

    def __init__(
        self,
        min_positives: int = 8,
        threshold: float = 0.5,
        network: CxrEnsemble | None = None,
        output_transform: Callable = lambda output: output,
    ) -> None:
        self.min_positives = min_positives
        self.threshold = threshold
        self.network = network
        self.report: dict[str, Any] = {}
        super().__init__(output_transform=output_transform)

    def reset(self) -> None:
        """Forget the images seen so far."""
        self._scores: list[torch.Tensor] = []
        self._labels: list[torch.Tensor] = []

    def update(self, output: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        """Add images: two sequences of ``(18,)``, scores and labels."""
        for score, label in zip(*output, strict=True):
            self._scores.append(torch.as_tensor(score).detach().cpu().float())
            self._labels.append(torch.as_tensor(label).detach().cpu().float())

    def compute(self) -> float:
        """Return the mean AUROC and fill ``report``."""
        table = tabulate_findings(torch.stack(self._scores), torch.stack(self._labels), self.threshold)
        untrained = self.network.untrained_findings if self.network is not None else ()
        mean = average_auroc(table, self.min_positives, untrained)
        self.report = {
            "mean_auroc": mean if mean == mean else None,
            "image_count": len(self._scores),
            "min_positives": self.min_positives,
            "threshold": self.threshold,
            "untrained_findings": list(untrained),
            "findings": {finding: row for finding, row in table.items() if finding not in untrained},
        }
        return mean


class WriteReport:
    """Handler that writes the ``report`` of a :class:`FindingMetrics` as JSON when the engine is done."""

    def __init__(self, metric: FindingMetrics, path: str) -> None:
        self.metric = metric
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Register at the end of a run; list it after the metric, which is attached with the engine."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.metric.report, indent=2))


@exits_with_message
def run_evaluation(evaluator: Any, metric: FindingMetrics, path: str) -> None:
    """Run an evaluator and print the table that it wrote to ``path``."""
    evaluator.run()
    print(render_report(metric.report))
    print(f"written to {path}")


def render_report(report: dict[str, Any]) -> str:
    """Return a report as a plain table, one line per finding that the labels cover."""
    lines = [f"{'finding':<28}{'positives':>10}{'AUROC':>8}{'F1':>8}"]
    lines += [
        f"{finding:<28}{row['positives']:>10}{row['auroc']:>8.3f}{row['f1']:>8.3f}"
        for finding, row in report["findings"].items()
        if row["auroc"] is not None
    ]
    mean = report["mean_auroc"]
    shown = "none: too few positives" if mean is None else f"{mean:.3f}"
    return "\n".join([*lines, f"mean AUROC of findings with at least {report['min_positives']} positives: {shown}"])
