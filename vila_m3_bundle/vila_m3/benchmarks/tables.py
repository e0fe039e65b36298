"""Results as a Markdown table and as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .definition import Benchmark

ROWS = {
    "": "this model",
    "_blank": "this model, blank image",
    "_majority": "majority answer per question (upper bound)",
}


def _rows(definition: Benchmark, results: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None, Any]]:
    for ending, label in ROWS.items():
        row = results.get(f"{definition.name}{ending}")
        if row:
            yield label, row["accuracy"], row["corrected_accuracy"]
    for model, percent in definition.published.items():
        yield f"{model} (published)", {"value": percent / 100, "interval": None, "count": None}, None


def _percent(score: Mapping[str, Any] | None) -> str:
    if score is None or score["value"] is None:
        return ""
    interval = score["interval"]
    return f"{100 * score['value']:.1f}" + (f" [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]" if interval else "")


def markdown_table(definitions: Sequence[Benchmark], results: Mapping[str, Any]) -> str:
    """Return one table per benchmark: both gradings in percent with 95 % intervals, beside the published scores."""
    lines = []
    for definition in definitions:
        count = results[definition.name]["accuracy"]["count"]
        lines += [
            f"## {definition.title}",
            "",
            f"{count} questions. The published grading counts: {definition.counts}.",
            "",
        ]
        lines += ["| | as published | corrected |", "| --- | --- | --- |"]
        lines += [f"| {label} | {_percent(one)} | {_percent(two)} |" for label, one, two in _rows(definition, results)]
        lines += ["", f"Unparsable answers: {results[definition.name]['unparsable']}.", ""]
    return "\n".join(lines)


def html_page(definitions: Sequence[Benchmark], results: Mapping[str, Any]) -> str:
    """Return a page with bars and intervals, drawn as SVG; it loads nothing."""
    parts = [_section(definition, results) for definition in definitions]
    style = "body{font:15px sans-serif;max-width:60em;margin:2em auto}text{font:12px sans-serif}"
    return f"<!doctype html><meta charset='utf-8'><title>Benchmarks</title><style>{style}</style>{''.join(parts)}\n"


def _section(definition: Benchmark, results: Mapping[str, Any]) -> str:
    bars = []
    for place, (label, published, _) in enumerate(_rows(definition, results)):
        if published is not None and published["value"] is not None:
            bars.append(_bar(place, label, published))
    height = 26 * len(bars) + 10
    head = f"<h2>{html.escape(definition.title)}</h2><p>As published: {html.escape(definition.counts)}.</p>"
    return f"{head}<svg width='880' height='{height}' role='img'>{''.join(bars)}</svg>"


def _bar(place: int, label: str, score: Mapping[str, Any]) -> str:
    left, scale, top = 300, 480, 26 * place + 6
    whisker = ""
    if score["interval"]:
        low, high = (left + scale * bound for bound in score["interval"])
        whisker = f"<path d='M{low:.1f} {top + 8}H{high:.1f}' stroke='black' stroke-width='2'/>"
    return (
        f"<text x='0' y='{top + 12}'>{html.escape(label)}</text>"
        f"<rect x='{left}' y='{top}' width='{scale * score['value']:.1f}' height='16' fill='#69c'/>{whisker}"
        f"<text x='{left + scale + 8}' y='{top + 12}'>{_percent(score)}</text>"
    )
