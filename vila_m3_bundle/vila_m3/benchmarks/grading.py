"""Both gradings of a predictions file, with intervals; the ``grade`` command."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_m3_common.errors import exits_with_message
from vila_m3_common.standalone import make_output_dir

from ..resumable_files import write_atomically
from .answers import is_right
from .choice import is_choice_right
from .definition import Benchmark, Question, load_benchmark, read_questions
from .predictions import Predictions, read_predictions
from .published import exact_match, pathvqa_match
from .statistics import bootstrap_interval
from .triggers import grade_triggers, trigger_items


def score(values: Sequence[float], groups: Sequence[str]) -> dict[str, Any]:
    """Return ``{value, interval, count}`` of a mean, the interval at 95 %."""
    if not values:
        return {"value": None, "interval": None, "count": 0}
    return {
        "value": sum(values) / len(values),
        "interval": list(bootstrap_interval(values, groups)),
        "count": len(values),
    }


def published_items(benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions) -> dict[str, bool]:
    """Return question id -> right, as the reference's grader says."""
    if benchmark.grader == "pathvqa":
        closed = {question.id: question.answer for question in questions if question.answer.lower() in ("yes", "no")}
        return pathvqa_match(closed, predictions.lines)
    return exact_match({question.id: question.answer for question in questions}, predictions.lines)


def corrected_items(
    benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions
) -> dict[str, bool | None]:
    """Return question id -> right by the grammar of :mod:`.answers`; None is unparsable, a missing answer wrong.

    Ids are compared as text, so that the number 1 is the id "1".
    """
    texts = {str(name): text for name, text in predictions.lines}
    return {
        question.id: _is_right(benchmark, question, texts[question.id]) if question.id in texts else False
        for question in questions
    }


def _is_right(benchmark: Benchmark, question: Question, text: str) -> bool | None:
    if benchmark.grader == "choice":
        return is_choice_right(question.text, question.answer, text)
    return is_right(question.answer, text)


def grade(benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions) -> dict[str, Any]:
    """Grade a benchmark.

    Returns:
        ``accuracy`` (as published) and ``corrected_accuracy`` with interval and count, closed and open apart,
        ``unparsable``, ``counts`` and ``notes``.
    """
    if benchmark.grader == "trigger":
        return grade_triggers(benchmark, questions, predictions)
    groups = {question.id: question.group for question in questions}
    published = published_items(benchmark, questions, predictions)
    corrected = corrected_items(benchmark, questions, predictions)
    results: dict[str, Any] = {
        "accuracy": score([float(right) for right in published.values()], [groups[name] for name in published]),
        "corrected_accuracy": score([float(bool(right)) for right in corrected.values()], list(groups.values())),
    }
    for kind in ("CLOSED", "OPEN"):
        names = [question.id for question in questions if question.kind == kind]
        results[f"corrected_accuracy_{kind.lower()}"] = score(
            [float(bool(corrected[name])) for name in names], [groups[name] for name in names]
        )
    results["unparsable"] = sum(right is None for right in corrected.values())
    return results | {"counts": benchmark.counts, "notes": list(predictions.notes)}


def majority_predictions(questions: Sequence[Question]) -> Predictions:
    """Answer every question with the commonest true answer to its wording, as a model that never sees would at best.

    Counted on the benchmark itself, so it is an upper bound for blind answers; a wording asked once is answered
    with the commonest answer of its kind (open, closed).
    """
    worded: dict[str, Counter[str]] = defaultdict(Counter)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        worded[question.text.lower()][question.answer] += 1
        kinds[question.kind][question.answer] += 1
    lines = []
    for question in questions:
        answers = worded[question.text.lower()]
        if sum(answers.values()) == 1:
            answers = kinds[question.kind]
        lines.append((question.id, answers.most_common(1)[0][0]))
    return Predictions(tuple(lines))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step; NaN is refused."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@exits_with_message
def run_grading(benchmark: str, predictions: str, data_root: str, output_dir: str, benchmarks_dir: str) -> None:
    """Grade a predictions file without a model and write ``results.json`` and ``items.jsonl``.

    Args:
        benchmark: name of a YAML file.
        predictions: JSONL file with ``question_id`` and ``text``.
        data_root: folder with the data sets' folders.
        output_dir: where to write.
        benchmarks_dir: folder of the YAML files.
    """
    definition = load_benchmark(benchmark, benchmarks_dir)
    questions = read_questions(definition, data_root)
    read = read_predictions(predictions, [question.id for question in questions])
    folder = make_output_dir(output_dir)
    results = {benchmark: grade(definition, questions, read)}
    write_items(folder / "items.jsonl", definition, questions, read)
    write_json(folder / "results.json", results)
    print_scores(results)
    print(f"written to {folder / 'results.json'}")


def write_items(path: Path, definition: Benchmark, questions: Sequence[Question], read: Predictions) -> None:
    """Write what each question was graded, one line each."""
    if definition.grader == "trigger":
        graded = trigger_items(questions, read)
        path.write_text("".join(json.dumps(row) + "\n" for row in graded), encoding="utf-8")
        return
    published, corrected = published_items(definition, questions, read), corrected_items(definition, questions, read)
    rows = (
        {
            "question_id": question.id,
            "group": question.group,
            "published": published.get(question.id),
            "corrected": corrected[question.id],
        }
        for question in questions
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def print_scores(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the two gradings of every benchmark, and the notes."""
    for name, row in results.items():
        for key in ("accuracy", "corrected_accuracy"):
            low, high = row[key]["interval"]
            print(f"{name:16} {key:20} {row[key]['value']:.4f} [{low:.4f}, {high:.4f}]  n {row[key]['count']}")
        for note in row["notes"]:
            print(f"note: {name}: {note}")
