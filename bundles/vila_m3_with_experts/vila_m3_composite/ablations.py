"""One training in several variants and seeds, each measured on the same benchmarks, and the table of them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vila_m3_common.errors import UserError, exits_with_message

from .training_chain import run_chain


@dataclass(frozen=True)
class Variant:
    """What differs from the base.

    Args:
        name: of the variant.
        model: overrides of the new model that its trainings start from; empty takes the base's.
        training: overrides of the training.
        benchmarks: it is measured on.
        reads: whether it first learns to read the expert's turns, where the study has a command for that.
    """

    name: str
    benchmarks: Sequence[str]
    model: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    reads: bool = True


@dataclass(frozen=True)
class Command:
    """A command of the chain, of which variants change overrides: its configs, its overrides, the minutes it takes."""

    config_file: Sequence[str]
    overrides: Mapping[str, Any]
    minutes: float

    def step(self, name: str, outputs: Sequence[str], more: Mapping[str, Any]) -> dict[str, Any]:
        """Return it as a step of :func:`.training_chain.run_chain`."""
        overrides = {**self.overrides, **more}
        files = list(self.config_file)
        return {
            "name": name,
            "config_file": files,
            "overrides": overrides,
            "outputs": list(outputs),
            "minutes": self.minutes,
        }


def plan_run(variant: Variant, seed: int, commands: Mapping[str, Command], work: Path) -> list[dict[str, Any]]:
    """Return the steps of one run: a new model, its trainings and its measurement.

    Args:
        variant: what differs from the base.
        seed: of the new weights and of the training.
        commands: ``model``, ``reading`` (may be missing), ``training`` and ``evaluation``.
        work: folder of all runs.
    """
    folder = run_folder(work, variant.name, seed)
    start, results = str(folder / "start"), str(folder / "results")
    steps = [commands["model"].step("model", [start], {**variant.model, "output_dir": start, "seed": seed})]
    changed: dict[str, Mapping[str, Any]] = {"reading": {}, "training": variant.training}
    for name in ("reading", "training") if "reading" in commands and variant.reads else ("training",):
        out, state = str(folder / name), str(folder / f"{name}_state")
        trained = {"start_checkpoint": start, "checkpoint_out": out, "ckpt_dir": state, "seed": seed}
        steps.append(commands[name].step(name, [out, state], {**changed[name], **trained}))
        start = out
    measured = {"checkpoint": start, "benchmarks": list(variant.benchmarks), "output_dir": results}
    return [*steps, commands["evaluation"].step("evaluation", [results], measured)]


def run_folder(work: Path, variant: str, seed: int) -> Path:
    """Return the folder of one training."""
    return work / "runs" / f"{variant}_{seed}"


@exits_with_message
def run_ablations(
    variants: Mapping[str, Mapping[str, Any]],
    seeds: Sequence[int],
    commands: Mapping[str, Mapping[str, Any]],
    work: str,
    jobs: int = 1,
) -> None:
    """Train and measure every variant with every seed, resumable step by step, and write the table and its chart.

    Args:
        variants: name -> arguments of :class:`Variant`, in the order of the table.
        seeds: of the new weights and the trainings.
        commands: ``model``, ``reading`` (may be missing), ``training`` and ``evaluation``, each the arguments of
            :class:`Command`.
        work: folder; gets ``ablations.csv``, ``ablations.json`` and ``ablations.png``, and ``log.txt`` of every run.
        jobs: runs at a time, each a process with its share of the processor.

    Raises:
        UserError: without variants or seeds, or for less than one job.
    """
    if not variants or not seeds:
        raise UserError("no variants or no seeds are given; name at least one of each")
    if jobs < 1:
        raise UserError(f"jobs {jobs} is not a whole number from 1 on; give how many runs go on at a time")
    known = [Variant(name=name, **given) for name, given in variants.items()]
    told = {name: Command(**given) for name, given in commands.items()}
    folder = Path(work)
    # Seed by seed, so that a study that is cut off has compared all variants at least once.
    planned = [(seed, variant) for seed in seeds for variant in known]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        going = [
            pool.submit(_run_logged, plan_run(variant, seed, told, folder), str(run_folder(folder, variant.name, seed)))
            for seed, variant in planned
        ]
        try:
            for done in tqdm(as_completed(going), "runs", len(going)):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else the error would be told only when all others have run
            raise
    rows = summarise(known, seeds, folder)
    (folder / "ablations.json").write_text(json.dumps(rows, indent=2) + "\n")
    with (folder / "ablations.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    draw_bars(rows, folder / "ablations.png")
    for row in rows:
        print(
            f"{row['variant']}, {row['benchmark']}, {row['metric']}: {row['mean']:.3f} (from {row['least']:.3f} to "
            f"{row['most']:.3f}, {row['runs']} runs)"
        )


def _run_logged(steps: Sequence[Mapping[str, Any]], folder: str) -> None:
    """Run a chain whose progress goes to ``log.txt``, as several would write over each other's."""
    path = Path(folder) / "log.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            run_chain(steps, folder)
        except SystemExit as error:
            raise UserError(f"{error}; see {path}") from error


def summarise(variants: Sequence[Variant], seeds: Sequence[int], work: Path) -> list[dict[str, Any]]:
    """Return, for each variant and benchmark, the headline score of the corrected grading over the seeds."""
    rows = []
    for variant in variants:
        found = [
            json.loads((run_folder(work, variant.name, seed) / "results/results.json").read_text()) for seed in seeds
        ]
        for benchmark in variant.benchmarks:
            metric = found[0][benchmark]["metrics"][0]
            values = [results[benchmark][f"corrected_{metric}"]["value"] for results in found]
            told = {"variant": variant.name, "benchmark": benchmark, "metric": metric, "runs": len(values)}
            rows.append({**told, "mean": float(np.mean(values)), "least": min(values), "most": max(values)})
    return rows


def draw_bars(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the mean of each variant as a bar, one panel a benchmark; the line spans the runs."""
    from matplotlib.figure import Figure  # slow to import, and only the chart needs it

    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    height = 1 + 0.3 * len(rows) + 0.4 * len(benchmarks)
    figure = Figure(figsize=(8, height), layout="constrained")
    panels = figure.subplots(len(benchmarks), squeeze=False)[:, 0]
    for panel, benchmark in zip(panels, benchmarks, strict=True):
        shown = [row for row in rows if row["benchmark"] == benchmark]
        means = np.array([row["mean"] for row in shown])
        spans = np.array([[row["mean"] - row["least"], row["most"] - row["mean"]] for row in shown]).T
        panel.barh(range(len(shown)), means, xerr=spans, height=0.6, color="tab:blue", ecolor="black")
        panel.set_yticks(range(len(shown)), [row["variant"] for row in shown])
        panel.invert_yaxis()
        panel.set_xlim(0, 1)
        panel.set_title(f"{benchmark}, {shown[0]['metric']}", loc="left", fontsize=9)
    figure.savefig(path, dpi=120)
