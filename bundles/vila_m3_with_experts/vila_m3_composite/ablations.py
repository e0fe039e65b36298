"""One training in several variants and seeds, each measured on the same benchmarks, and the table of them."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vila_m3_common.errors import UserError, check_choice, exits_with_message

from .training_chain import run_chain


@dataclass(frozen=True)
class Variant:
    """What differs from the base.

    Args:
        name: of the variant.
        benchmarks: it is measured on.
        changes: command of the study -> overrides of it that differ from the base's.
    """

    name: str
    benchmarks: Sequence[str]
    changes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def start(self) -> str:
        """Name of what its trainings start from; variants that change the training alone share it."""
        return self.name if set(self.changes) - {"training"} else "base"

    def of(self, command: str) -> Mapping[str, Any]:
        """Return its overrides of a command."""
        return self.changes.get(command, {})


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


def plan_start(variant: Variant, seed: int, commands: Mapping[str, Command], work: Path) -> list[dict[str, Any]]:
    """Return the steps to what trainings start from: a new model, and the stages that it has gone through before.

    Args:
        variant: one of those that start from it.
        seed: of the new weights and of the stages.
        commands: ``model``, then the stages, each from the weights of the one before, up to ``training``.
        work: folder of all runs.
    """
    folder = start_folder(work, variant.start)
    weights = str(folder / "new")
    told = {**variant.of("model"), "output_dir": weights, "seed": seed}
    steps = [commands["model"].step("model", [weights], told)]
    for stage in _stages(commands):
        steps.append(_training_step(stage, commands, folder, weights, seed, variant))
        weights = str(folder / stage)
    return steps


def plan_run(variant: Variant, seed: int, commands: Mapping[str, Command], work: Path) -> list[dict[str, Any]]:
    """Return the steps of one run: its training and its measurement.

    Args:
        variant: what differs from the base.
        seed: of the training.
        commands: those of :func:`plan_start`, then ``training`` and ``evaluation``.
        work: folder of all runs.
    """
    folder = run_folder(work, variant.name, seed)
    start = str(start_folder(work, variant.start) / ["new", *_stages(commands)][-1])
    training = _training_step("training", commands, folder, start, seed, variant)
    trained, results = training["overrides"]["checkpoint_out"], str(folder / "results")
    measured = {"checkpoint": trained, "benchmarks": list(variant.benchmarks), "output_dir": results}
    told = {**variant.of("evaluation"), **measured}
    return [training, commands["evaluation"].step("evaluation", [results], told)]


def _stages(commands: Mapping[str, Command]) -> list[str]:
    return [name for name in commands if name not in ("model", "training", "evaluation")]


def _training_step(
    name: str, commands: Mapping[str, Command], folder: Path, start: str, seed: int, variant: Variant
) -> dict[str, Any]:
    out, state = str(folder / name), str(folder / f"{name}_state")
    told = {**variant.of(name), "start_checkpoint": start, "checkpoint_out": out, "ckpt_dir": state, "seed": seed}
    return {**commands[name].step(name, [out, state], told), "inputs": [start]}


def run_folder(work: Path, variant: str, seed: int) -> Path:
    """Return the folder of one training."""
    return work / "runs" / f"{variant}_{seed}"


def start_folder(work: Path, name: str) -> Path:
    """Return the folder of what trainings start from."""
    return work / "starts" / name


@dataclass(frozen=True)
class _Job:
    """A chain of one folder, and the folder of the chain that must be done before it."""

    steps: Sequence[Mapping[str, Any]]
    folder: Path
    after: Path | None = None


def _plan(
    variants: Sequence[Variant], seeds: Sequence[int], commands: Mapping[str, Command], work: Path
) -> Iterator[_Job]:
    """Yield the starts, and the runs seed by seed: a study that is cut off has compared all variants at least once."""
    for name, variant in {variant.start: variant for variant in variants}.items():
        yield _Job(plan_start(variant, seeds[0], commands, work), start_folder(work, name))
    for seed in seeds:
        for variant in variants:
            folder, after = run_folder(work, variant.name, seed), start_folder(work, variant.start)
            yield _Job(plan_run(variant, seed, commands, work), folder, after)


def _run_jobs(jobs: Sequence[_Job], pool: ProcessPoolExecutor, at_a_time: int) -> None:
    """Run chains in their order, but for those whose start is not done yet."""
    waiting, going, done = list(jobs), dict[Future[None], Path](), set[Path | None]([None])
    with tqdm(total=len(jobs), desc="runs") as progress:
        while waiting or going:
            for job in [job for job in waiting if job.after in done][: at_a_time - len(going)]:
                waiting.remove(job)
                going[pool.submit(_run_logged, job.steps, str(job.folder))] = job.folder
            for ended in wait(going, return_when=FIRST_COMPLETED).done:
                ended.result()
                done.add(going.pop(ended))
                progress.update()


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
        seeds: of the trainings; what they start from is of the first.
        commands: ``model``, any stages that trainings share, ``training`` and ``evaluation``, each the arguments of
            :class:`Command`.
        work: folder; gets ``ablations.csv``, ``ablations.json`` and ``ablations.png``, and ``log.txt`` of every run.
        jobs: runs at a time, each a process with its share of the processor.

    Raises:
        UserError: without variants or seeds, for less than one job, or for a change of an unknown command.
    """
    if not variants or not seeds:
        raise UserError("no variants or no seeds are given; name at least one of each")
    if jobs < 1:
        raise UserError(f"jobs {jobs} is not a whole number from 1 on; give how many runs go on at a time")
    known = [Variant(name=name, **given) for name, given in variants.items()]
    told = {name: Command(**given) for name, given in commands.items()}
    for changed in (name for variant in known for name in variant.changes):
        check_choice(changed, list(told), "command")
    folder = Path(work)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        try:
            _run_jobs(list(_plan(known, seeds, told, folder)), pool, jobs)
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

    panels_of: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        panels_of.setdefault(row["benchmark"], []).append(row)
    height = 1 + 0.3 * len(rows) + 0.4 * len(panels_of)
    figure = Figure(figsize=(8, height), layout="constrained")
    ratios = [1 + len(shown) for shown in panels_of.values()]
    panels = figure.subplots(len(panels_of), squeeze=False, height_ratios=ratios)[:, 0]
    for panel, (benchmark, shown) in zip(panels, panels_of.items(), strict=True):
        means = np.array([row["mean"] for row in shown])
        spans = np.array([[row["mean"] - row["least"], row["most"] - row["mean"]] for row in shown]).T
        spans = spans.clip(min=0)  # the mean of equal values may round beyond them
        panel.barh(range(len(shown)), means, xerr=spans, height=0.6, color="tab:blue", ecolor="black")
        panel.set_yticks(range(len(shown)), [row["variant"] for row in shown])
        panel.invert_yaxis()
        panel.set_xlim(0, 1)
        panel.set_title(f"{benchmark}, {shown[0]['metric']}", loc="left", fontsize=9)
    figure.savefig(path, dpi=120)
