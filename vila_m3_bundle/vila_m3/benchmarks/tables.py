"""Results as Markdown, and what tables and pages share: which rows a benchmark has, how a score is written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .definition import Benchmark

# What the names of a benchmark's baselines end with.
BLANK_ENDING, PRIOR_ENDING, MAJORITY_ENDING = "_blank", "_prior", "_majority"
ROWS = {
    "": "this model",
    BLANK_ENDING: "this model, blank image",
    PRIOR_ENDING: "majority answer per question in training",
    MAJORITY_ENDING: "majority answer per question (upper bound)",
}
CORRECTED = "corrected_"


def table_rows(definition: Benchmark, results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (label, metric -> score) of this run's rows and of the published models, which have no interval."""
    for ending, label in ROWS.items():
        row = results.get(f"{definition.name}{ending}")
        if row:
            yield label, row
    for model, scores in definition.published_scores().items():
        told = {name: {"value": value / 100, "interval": None, "count": None} for name, value in scores.items()}
        yield f"{model} (published)", told


def columns_of(definition: Benchmark, results: Mapping[str, Any]) -> list[str]:
    """Return the metrics of a benchmark's table, each followed by its corrected form where there is one."""
    known = results.get(definition.name, {})
    names = [name for metric in definition.metrics for name in (metric, CORRECTED + metric)]
    return [name for name in names if name in known or name in definition.metrics]


def percent(score: Mapping[str, Any] | None) -> str:
    """Return a score in percent with its interval; nothing when there is none."""
    if not score or score.get("value") is None:
        return ""
    interval = score["interval"]
    return f"{100 * score['value']:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def heading(metric: str) -> str:
    """Return a metric's name for people."""
    name = metric.removeprefix(CORRECTED).replace("_", " ")
    return f"{name}, {'corrected' if metric.startswith(CORRECTED) else 'as published'}"


def markdown_table(definitions: Sequence[Benchmark], results: Mapping[str, Any]) -> str:
    """Return one table per benchmark: both gradings in percent with 95 % intervals, beside the published scores."""
    lines: list[str] = []
    for definition in definitions:
        columns = columns_of(definition, results)
        lines += [f"## {definition.title}", "", f"The published grading counts: {definition.counts}.", ""]
        lines += [f"| | {' | '.join(map(heading, columns))} |", f"| --- {'| --- ' * len(columns)}|"]
        for label, row in table_rows(definition, results):
            lines.append(f"| {label} | {' | '.join(percent(row.get(name)) for name in columns)} |")
        own = results.get(definition.name, {})
        lines += ["", f"Unparsable answers: {own.get('unparsable', 0)}.", ""]
        lines += [f"- {note}" for note in own.get("notes", ())] + [""] * bool(own.get("notes"))
    return "\n".join(lines)
