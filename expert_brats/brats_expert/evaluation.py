"""Metrics per BraTS region and per case, written as one JSON file."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics import compute_dice, compute_hausdorff_distance

from vila_m3_common.errors import UserError
from vila_m3_common.standalone import make_output_dir
from vila_m3_common.training import gather_rows, is_main_process

from .labels import REGIONS


class RegionReport:
    """Collects Dice and HD95 of every case during an evaluation and writes ``metrics.json`` at its end.

    Of several processes each measures its own cases, and rank 0 writes those of all.

    The evaluator's output holds ``pred`` and ``label``, each ``(3, X, Y, Z)`` of 0 and 1 in the order of
    ``REGIONS``, on the grid of the label file.

    Args:
        output_dir: folder for ``metrics.json``; created when missing.
        with_hd95: whether to compute the 95th percentile of the Hausdorff distance.
    """

    def __init__(self, output_dir: str | Path, with_hd95: bool = True) -> None:
        self.output_dir = make_output_dir(output_dir)
        self.with_hd95 = with_hd95
        self.cases: list[dict[str, Any]] = []

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator."""
        engine.add_event_handler(Events.STARTED, lambda _: self.cases.clear())
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add_cases)
        engine.add_event_handler(Events.COMPLETED, self._write)

    def _add_cases(self, engine: Engine) -> None:
        for item in engine.state.output:
            self.cases.append(measure_case(item["pred"], item["label"], self.with_hd95))

    def _write(self, _engine: Engine) -> None:
        cases = sorted(gather_rows(self.cases), key=lambda case: case["case"])
        if not is_main_process():
            return
        report = {**summarize(cases), "cases": cases}
        path = self.output_dir / "metrics.json"
        path.write_text(json.dumps(report, indent=2))
        print(json.dumps({key: value for key, value in report.items() if key != "cases"}, indent=2))
        print(f"written to {path}")


def measure_case(prediction: MetaTensor, truth: MetaTensor, with_hd95: bool = True) -> dict[str, Any]:
    """Measure one case.

    Args:
        prediction: ``(3, X, Y, Z)`` of 0 and 1.
        truth: the same, not a number in a region that the data does not label; its affine gives the voxel size in mm.
        with_hd95: whether to compute the surface distance.

    Returns:
        ``case``, ``has_tumor`` and ``is_found`` (any voxel of whole tumour in truth and in prediction),
        ``dice`` and, if asked for, ``hd95_mm``, each region -> value. Dice is None where the region is empty
        in the truth or not labelled, HD95 also where it is empty in the prediction.
    """
    predicted, true = (volume.as_tensor()[None] > 0 for volume in (prediction, truth))
    whole = REGIONS.index("whole tumor")
    row: dict[str, Any] = {
        "case": _case_name(truth),
        "has_tumor": bool(true[0, whole].any()),
        "is_found": bool(predicted[0, whole].any()),
        "dice": _by_region(compute_dice(predicted, true)),
    }
    if with_hd95:
        spacing = [float(step) for step in truth.pixdim]
        row["hd95_mm"] = _by_region(_hausdorff95(predicted, true, spacing))
    return row


def _hausdorff95(predicted: torch.Tensor, true: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
    """Return HD95 in mm, ``(1, 3)``, not a number where a region is empty on either side; unlabelled ones are."""
    both = [bool(predicted[0, channel].any() and true[0, channel].any()) for channel in range(len(REGIONS))]
    distances = torch.full((1, len(REGIONS)), math.nan)
    if any(both):
        shown = compute_hausdorff_distance(
            predicted[:, both], true[:, both], include_background=True, percentile=95, spacing=spacing
        )
        distances[:, both] = shown.to(distances.dtype)
    return distances


def _by_region(values: torch.Tensor) -> dict[str, float | None]:
    return {
        region: None if math.isnan(value) else round(value, 4)
        for region, value in zip(REGIONS, values[0].tolist(), strict=True)
    }


def _case_name(truth: MetaTensor) -> str:
    path = Path(str(truth.meta.get("filename_or_obj", "")))
    return os.path.join(path.parent.name, path.name)


def summarize(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Average over cases.

    Args:
        cases: rows of :func:`measure_case`.

    Returns:
        ``case_count``, the means of ``dice`` and ``hd95_mm`` over the cases that have a value (with the
        number of them), ``sensitivity`` (tumour cases in which anything was found) and ``specificity``
        (tumour-free cases in which nothing was found), None without such cases.

    Raises:
        UserError: if there are no cases.
    """
    if not cases:
        raise UserError("no case was evaluated; give a dataset with at least one case")
    with_tumor = [case["is_found"] for case in cases if case["has_tumor"]]
    without_tumor = [not case["is_found"] for case in cases if not case["has_tumor"]]
    summary: dict[str, Any] = {
        "case_count": len(cases),
        "tumor_case_count": len(with_tumor),
        "sensitivity": float(np.mean(with_tumor)) if with_tumor else None,
        "specificity": float(np.mean(without_tumor)) if without_tumor else None,
    }
    for metric in ("dice", "hd95_mm"):
        if metric in cases[0]:
            summary[metric] = {region: _mean(cases, metric, region) for region in REGIONS}
    return summary


def _mean(cases: Sequence[Mapping[str, Any]], metric: str, region: str) -> dict[str, Any]:
    values = [case[metric][region] for case in cases if case[metric][region] is not None]
    return {"mean": round(float(np.mean(values)), 4) if values else None, "case_count": len(values)}
