"""Results as one self-contained HTML page: tables, plots, and a gallery of failures with their images."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vila_m3_common.errors import UserError
from vila_m3_common.volumes import load_picture

from .definition import Benchmark
from .tables import (
    BLANK_ENDING,
    CORRECTED,
    MAJORITY_ENDING,
    PRIOR_ENDING,
    ROWS,
    columns_of,
    heading,
    percent,
    table_rows,
)

GALLERY_SIZE = 12
THUMBNAIL_PIXELS = 176
_COLORS = {
    "": "#2f6f9f",
    BLANK_ENDING: "#c9a227",
    PRIOR_ENDING: "#5f5f5f",
    MAJORITY_ENDING: "#8a8a8a",
    "published": "#b9cfdd",
}
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64em;margin:2em auto;padding:0 1em;color:#222}
h2{margin-top:2.2em;border-bottom:1px solid #ccc}table{border-collapse:collapse;margin:1em 0}
th,td{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:right}th:first-child,td:first-child{text-align:left}
figure{margin:1em 0}svg{max-width:100%;height:auto}.note{color:#844}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(14em,1fr));gap:1em}
.gallery div{border:1px solid #ddd;padding:.6em;font-size:13px;overflow-wrap:anywhere}.gallery img{display:block}
"""


def html_page(definitions: Sequence[Benchmark], results: Mapping[str, Any], predictions: Path) -> str:
    """Return the page; it loads nothing from elsewhere.

    Args:
        definitions: the benchmarks.
        results: what :func:`vila_m3.benchmarks.grading.grade` returned, by name; other entries with a confusion matrix
            in their details (``{"labels": [...], "matrix": [[...]]}``) are drawn too.
        predictions: folder of the ``<name>.items.jsonl`` files.
    """
    parts = [_expert_section(definitions, results)]
    parts += [_section(definition, results, predictions) for definition in definitions]
    parts += [_confusion_section(name, row) for name, row in results.items()]
    head = f"<!doctype html><html lang='en'><meta charset='utf-8'><title>Benchmarks</title><style>{_STYLE}</style>"
    return f"{head}<body><h1>Benchmarks</h1>{''.join(parts)}</body></html>\n"


def _section(definition: Benchmark, results: Mapping[str, Any], predictions: Path) -> str:
    own = results.get(definition.name, {})
    parts = [f"<h2>{html.escape(definition.title)}</h2>"]
    parts.append(f"<p>The published grading counts: {html.escape(definition.counts)}.</p>")
    parts.append(_table(definition, results))
    parts.append(f"<p>Unparsable answers: {own.get('unparsable', 0)}.</p>")
    parts += [f"<p class='note'>{html.escape(note)}</p>" for note in own.get("notes", ())]
    parts.append(_figure(_draw_bars(definition, results), f"{definition.title}: scores with 95 % intervals"))
    curve = own.get("details", {}).get("reliability")
    if curve:
        told = f"Confidence against accuracy; expected calibration error {curve['expected_calibration_error']:.3f}"
        parts.append(_figure(_draw_reliability(curve), told))
    parts.append(_gallery(predictions / f"{definition.name}.items.jsonl"))
    return "".join(parts)


def _table(definition: Benchmark, results: Mapping[str, Any]) -> str:
    columns = columns_of(definition, results)
    head = "".join(f"<th>{html.escape(heading(name))}</th>" for name in columns)
    rows = "".join(
        f"<tr><td>{html.escape(label)}</td>{''.join(f'<td>{percent(row.get(name))}</td>' for name in columns)}</tr>"
        for label, row in table_rows(definition, results)
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def _figure(figure: Figure | None, caption: str) -> str:
    """Return a drawing as inline SVG; its letters stay text."""
    if figure is None:
        return ""
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": caption}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    drawing = buffer.getvalue()
    caption = html.escape(caption)
    return f"<figure>{drawing[drawing.index('<svg') :]}<figcaption>{caption}</figcaption></figure>"


def _headline(definition: Benchmark, results: Mapping[str, Any]) -> str:
    """Return the metric that is drawn: the first that this run has a number for."""
    own = results.get(definition.name, {})
    known = [name for name in columns_of(definition, results) if own.get(name, {}).get("value") is not None]
    return known[0] if known else definition.metrics[0]


def _draw_bars(definition: Benchmark, results: Mapping[str, Any]) -> Figure | None:
    metric = _headline(definition, results)
    names = [metric, CORRECTED + metric] if not metric.startswith(CORRECTED) else [metric]
    bars: list[tuple[str, Mapping[str, Any], str]] = []
    kinds = {label: ending for ending, label in ROWS.items()}
    for label, row in table_rows(definition, results):
        for name in names:
            if (row.get(name) or {}).get("value") is not None:
                told = f"{label}, corrected" if name.startswith(CORRECTED) else label
                bars.append((told, row[name], _COLORS[kinds.get(label, "published")]))
    if not bars:
        return None
    figure = Figure(figsize=(8, 0.34 * len(bars) + 0.9))
    _bars(figure.add_subplot(), bars, heading(metric).split(",")[0])
    return figure


def _bars(axes: Axes, bars: Sequence[tuple[str, Mapping[str, Any], str]], label: str) -> None:
    for place, (_, score, color) in enumerate(bars):
        value = 100 * score["value"]
        axes.barh(place, value, color=color, height=0.7)
        end = value
        if score["interval"]:
            low, high = (100 * bound for bound in score["interval"])
            axes.plot([low, high], [place, place], color="black", linewidth=1.4)
            end = max(value, high)
        axes.text(end + 1, place, f"{value:.1f}", va="center", fontsize=8)
    axes.set_yticks(range(len(bars)), [told for told, _, _ in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 108)
    axes.set_xlabel(f"{label} (%)", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _expert_section(definitions: Sequence[Benchmark], results: Mapping[str, Any]) -> str:
    """Draw every benchmark that was asked with an expert beside the same without."""
    bars: list[tuple[str, Mapping[str, Any], str]] = []
    by_name = {definition.name: definition for definition in definitions}
    for plain, told in expert_pairs(list(by_name)):
        metric = _headline(by_name[told], results)
        for name, color in ((plain, _COLORS[MAJORITY_ENDING]), (told, _COLORS[""])):
            if results.get(name, {}).get(metric, {}).get("value") is not None:
                bars.append((f"{name} ({heading(metric)})", results[name][metric], color))
    if not bars:
        return ""
    figure = Figure(figsize=(8, 0.34 * len(bars) + 0.9))
    _bars(figure.add_subplot(), bars, "score")
    return f"<h2>Without and with the expert</h2>{_figure(figure, 'Grey: without the expert. Blue: with it.')}"


def expert_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return (without, with) of the benchmarks whose names differ in ``_expert`` alone."""
    return [
        (name.replace("_expert", ""), name)
        for name in names
        if "_expert" in name and name.replace("_expert", "") in names
    ]


def _draw_reliability(curve: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(4.2, 3.6))
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color="#999", linewidth=1, linestyle="--")
    bins = curve["bins"]
    most = max(row["count"] for row in bins)
    sizes = [20 + 180 * row["count"] / most for row in bins]
    axes.plot([row["confidence"] for row in bins], [row["accuracy"] for row in bins], color=_COLORS[""], linewidth=1)
    axes.scatter([row["confidence"] for row in bins], [row["accuracy"] for row in bins], sizes, color=_COLORS[""])
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="confidence in the answer", ylabel="share that is right")
    return figure


def _confusion_section(name: str, row: Any) -> str:
    table = row.get("details", {}).get("confusion") if isinstance(row, Mapping) else None
    if not table:
        return ""
    figure = draw_confusion(table["labels"], table["matrix"])
    return f"<h2>{html.escape(name)}: confusion</h2>{_figure(figure, 'Rows: the right call. Columns: the call made.')}"


def draw_confusion(labels: Sequence[str], matrix: Sequence[Sequence[float]]) -> Figure:
    """Draw a confusion matrix: rows are the truth, columns what was done, shades the share of a row."""
    counts = np.asarray(matrix, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(1.6 + 0.7 * len(labels), 1.2 + 0.6 * len(labels)))
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    for row, column in np.ndindex(*counts.shape):
        shade = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{counts[row, column]:g}", ha="center", va="center", color=shade, fontsize=8)
    return figure


def _gallery(items: Path) -> str:
    cards = "".join(map(_card, _pick_failures(items)))
    return f"<h3>Failures, the surest first</h3><div class='gallery'>{cards}</div>" if cards else ""


def _pick_failures(items: Path) -> list[dict[str, Any]]:
    """Return wrong answers, the most confident first, one per image."""
    if not items.is_file():
        return []
    rows = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
    wrong = [row for row in rows if row["text"] is not None and (row["corrected"] or 0) < 0.5]
    wrong.sort(key=lambda row: -(row["confidence"] or 0))
    first: dict[str, dict[str, Any]] = {}
    for row in wrong:
        first.setdefault(row["image"] or row["question_id"], row)
    return list(first.values())[:GALLERY_SIZE]


def _card(row: Mapping[str, Any]) -> str:
    sure = f" ({100 * row['confidence']:.0f} % sure)" if row["confidence"] is not None else ""
    verdict = "unparsable" if row["corrected"] is None else "wrong"
    told = {"Question": row["question"], "Truth": row["answer"], f"Answer, {verdict}{sure}": row["text"]}
    lines = "".join(f"<p><b>{html.escape(name)}:</b> {html.escape(text[:400])}</p>" for name, text in told.items())
    return f"<div>{''.join(_thumbnail(row['image'])) if row['image'] else ''}{lines}</div>"


def _thumbnail(path: str) -> Iterator[str]:
    """Yield the image as a data URI; nothing when it cannot be read, for the page must still be written."""
    try:
        picture = Image.fromarray(load_picture(Path(path)))
    except (UserError, OSError):
        return
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    yield f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"
