"""report.html: one page that needs no other file, for people."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #1c2733; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.turn { margin: .6rem 0; padding: .6rem .9rem; border-radius: .5rem; white-space: pre-wrap; }
.user { background: #eef3f8; } .assistant { background: #e8f5e9; } .expert { background: #fff6e0; }
.error { background: #fdecea; } .who { font-weight: 600; margin-right: .5rem; }
.meta { color: #66727f; font-size: .85em; } .note { color: #7a4b00; }
img { max-width: 100%; background: #000; } .row img { height: 15rem; width: auto; margin: .2rem; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid #d5dde5; padding: .3rem .7rem; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
footer { margin-top: 2.5rem; color: #66727f; font-size: .85em; }
"""

_COLUMNS = (
    ("name", "structure"),
    ("volume_ml", "volume (mL)"),
    ("component_count", "lesions or parts"),
    ("longest_diameter_mm", "longest in-plane diameter (mm)"),
    ("perpendicular_diameter_mm", "perpendicular (mm)"),
    ("diameter_slice", "measured in slice"),
    ("mean_hu", "mean (HU)"),
    ("side", "side"),
    ("largest_slice", "largest in slice"),
    ("probability", "probability"),
    ("threshold", "threshold"),
    ("is_uncertain", "uncertain"),
)


def render_report(record: Mapping[str, Any], folder: Path) -> str:
    """Render a case.

    Args:
        record: the content of ``conversation.json``.
        folder: where its pictures lie; they are embedded.
    """
    parts = [
        f"<h1>{html.escape(record['case'])}</h1>",
        f"<p>{html.escape(_summary(record))}</p>",
        *(f'<p class="note">{html.escape(note)}</p>' for note in record["notes"]),
        "<h2>Images that the model saw</h2>",
        _pictures([name for turn in record["turns"] if turn["role"] == "user" for name in turn["images"]], folder),
        "<h2>Conversation</h2>",
        *(_turn(turn) for turn in record["turns"]),
    ]
    for turn in record["turns"]:
        if "expert" in turn and not turn["expert"]["is_reused"]:
            parts += _expert(turn["expert"], folder)
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    footer = f"<footer>For research; not for diagnosis. Made with {html.escape(versions)}.</footer>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(record["case"])}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}{footer}</body></html>"
    )


def _summary(record: Mapping[str, Any]) -> str:
    images = ", ".join(record["images"])
    place = ""
    if record["slice_index"] is not None:
        axis = ("sagittal", "coronal", "axial")[record["axis"]]
        place = f", {axis} slice {record['slice_index']}"
    return f"{record['modality']} (known from: {record['modality_source']}), {images}{place}"


def _turn(turn: Mapping[str, Any]) -> str:
    failed = " error" if turn.get("expert", {}).get("is_error") else ""
    who = turn["role"]
    if "expert" in turn:
        call = turn["expert"]
        who = f"expert {call['name']}({call['argument']})" + (", earlier result" if call["is_reused"] else "")
    cards = "[model cards] " if turn["has_model_cards"] else ""
    return (
        f'<div class="turn {turn["role"]}{failed}"><span class="who">{html.escape(who)}</span>'
        f'<span class="meta">{turn["seconds"]:.1f} s</span><br>{html.escape(cards + turn["text"].strip())}</div>'
    )


def _expert(call: Mapping[str, Any], folder: Path) -> list[str]:
    if not (call["overlay"] or call["measurements"] or call["scores"]):
        return []
    parts = [f"<h2>{html.escape(call['name'])}({html.escape(call['argument'])})</h2>"]
    if call["overlay"]:
        parts.append(_embed(folder / call["overlay"]))
    if call["label_map"]:
        parts.append(f'<p class="meta">label map: {html.escape(call["label_map"])}</p>')
    if call["measurements"]:
        parts.append(_measurement_table(call["measurements"]))
    if call["scores"]:
        rows = "".join(
            f'<tr><td>{html.escape(name)}</td><td class="number">{score:.2f}</td></tr>'
            for name, score in sorted(call["scores"].items(), key=lambda item: -item[1])
        )
        parts.append(f"<table><tr><th>finding</th><th>score</th></tr>{rows}</table>")
    return parts


def _measurement_table(rows: Sequence[Mapping[str, Any]]) -> str:
    columns = [(key, title) for key, title in _COLUMNS if any(key in row for row in rows)]
    head = "".join(f"<th>{title}</th>" for _, title in columns)
    body = "".join("<tr>" + "".join(_cell(row.get(key, "")) for key, _ in columns) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(value: Any) -> str:
    kind = ' class="number"' if isinstance(value, (int, float)) else ""
    return f"<td{kind}>{html.escape(str(value))}</td>"


def _pictures(names: Sequence[str], folder: Path) -> str:
    return f'<div class="row">{"".join(_embed(folder / name) for name in names)}</div>'


def _embed(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{html.escape(path.stem)}" src="data:image/png;base64,{data}">'
