"""Forgetting: the same questions to a checkpoint before and after a training stage, and the paired drop.

The VILA-M3 paper reports that expert-guided fine-tuning costs 4 to 23 % on general benchmarks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.standalone import make_output_dir

from ..answer import Answerer
from ..checkpoint import load_processor
from ..inference import load_network
from ..resumable_files import write_atomically
from .grading import write_json
from .runner import benchmark_names, run_benchmarks
from .statistics import bootstrap_interval, permutation_p_value
from .tables import percent

STATES = ("before", "after")
PAPER = "The VILA-M3 paper reports that fine-tuning with experts costs 4 to 23 % on general benchmarks."


def paired_drop(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Compare two runs on the same questions.

    Args:
        before: items of the first run (``question_id``, ``group`` and ``key``: right, wrong, or None).
        after: items of the second.
        key: ``published`` or ``corrected``.

    Returns:
        ``before``, ``after`` and ``drop`` (before minus after) in 0..1, ``interval`` of the drop (95 %, by group),
        ``relative_drop`` (None where nothing was right before), ``p_value`` of the paired permutation test, ``lost``
        and ``gained`` questions, ``count``.

    Raises:
        UserError: if the runs did not answer the same questions.
    """
    first = {row["question_id"]: row for row in before if row.get(key) is not None or key == "corrected"}
    second = {row["question_id"]: row for row in after if row.get(key) is not None or key == "corrected"}
    if first.keys() != second.keys() or not first:
        raise UserError("the two runs did not answer the same questions; give both the same benchmarks and data_root")
    one = [float(bool(first[name][key])) for name in first]
    two = [float(bool(second[name][key])) for name in first]
    groups = [str(row["group"]) for row in first.values()]
    differences = [left - right for left, right in zip(one, two, strict=True)]
    drop = sum(differences) / len(differences)
    return {
        "before": sum(one) / len(one),
        "after": sum(two) / len(two),
        "drop": drop,
        "interval": list(bootstrap_interval(differences, groups)),
        "relative_drop": drop * len(one) / sum(one) if any(one) else None,
        "p_value": permutation_p_value(one, two, groups),
        "lost": sum(difference > 0 for difference in differences),
        "gained": sum(difference < 0 for difference in differences),
        "count": len(differences),
    }


def forgetting_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a Markdown table of the drops, in percent."""
    lines = ["# Forgetting", "", PAPER, ""]
    lines += ["| benchmark | n | before | after | drop | relative drop | lost, gained | p |", "| --- |" + " --- |" * 7]
    for name, gradings in results.items():
        row = gradings["corrected"]
        drop = percent({"value": row["drop"], "interval": row["interval"]})
        relative = "" if row["relative_drop"] is None else f"{100 * row['relative_drop']:.1f}"
        lines.append(
            f"| {name} | {row['count']} | {100 * row['before']:.1f} | {100 * row['after']:.1f} | "
            f"{drop} | {relative} | "
            f"{row['lost']}, {row['gained']} | {row['p_value']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def _read_items(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / "predictions" / f"{name}.items.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _ask(checkpoint: str, options: Mapping[str, Any], max_new_tokens: int, **arguments: Any) -> None:
    """Run the benchmarks with one checkpoint; its memory is free again afterwards."""
    network = load_network(checkpoint, **options)
    processor = load_processor(checkpoint, options.get("chat_template"))
    answerer = Answerer(network, processor, max_new_tokens, kept_conversations=0)
    told = {name: value for name, value in options.items() if name != "device"}
    settings = {"checkpoint": checkpoint, "max_new_tokens": max_new_tokens, **told}
    run_benchmarks(answerer=answerer, settings=settings, blank_baseline=False, **arguments)


@exits_with_message
def run_forgetting(
    before: str,
    after: str,
    benchmarks: Any,
    data_root: str,
    output_dir: str,
    benchmarks_dir: str,
    options: Mapping[str, Any] | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 16,
) -> None:
    """Ask two checkpoints the same questions; write ``forgetting.json``, ``forgetting.md`` and both runs.

    A run that was cut off goes on.

    Args:
        before: checkpoint before the stage.
        after: checkpoint after it.
        benchmarks: names of YAML files.
        data_root: folder with the data sets' folders.
        output_dir: where to write.
        benchmarks_dir: folder of the YAML files.
        options: of :func:`vila_m3.inference.load_network`, for both.
        max_new_tokens: longest answer.
        batch_size: questions at once.
    """
    if not before or not after:
        raise UserError("two checkpoints are compared; give --before <folder> and --after <folder>")
    folder = make_output_dir(output_dir)
    names = benchmark_names(benchmarks)
    for state, checkpoint in zip(STATES, (before, after), strict=True):
        _ask(
            checkpoint,
            dict(options or {}),
            max_new_tokens,
            benchmarks=names,
            data_root=data_root,
            output_dir=str(folder / state),
            benchmarks_dir=benchmarks_dir,
            batch_size=batch_size,
        )
    results = {}
    for name in names:
        first, second = (_read_items(folder / state, name) for state in STATES)
        results[name] = {key: paired_drop(first, second, key) for key in ("published", "corrected")}
    write_json(folder / "forgetting.json", results)
    table = forgetting_table(results)
    write_atomically(folder / "forgetting.md", table)
    print(table)
    print(f"written to {folder / 'forgetting.json'} and forgetting.md")
