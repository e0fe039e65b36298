"""Both gradings of a predictions file, with intervals; the ``grade`` command."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vila_m3_common.errors import exits_with_message
from vila_m3_common.standalone import make_output_dir

from ..resumable_files import write_atomically
from . import graders
from .definition import Benchmark, Question, image_path, load_benchmark, read_questions
from .page import html_page
from .predictions import Predictions, read_predictions
from .statistics import Measure, measure_interval, value_of
from .tables import markdown_table
from .triggers import describe_triggers, trigger_items


def grade(benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions) -> dict[str, Any]:
    """Grade a benchmark.

    Returns:
        Every score as ``{value, interval, count}``, ``corrected_*`` by the corrected grading; ``metrics`` (names in
        the order of tables), ``unparsable``, ``counts``, ``notes`` (also why a score is missing) and ``details``.
    """
    graded = graders.TABLE[benchmark.grader](benchmark, questions, predictions)
    return summarise(benchmark, questions, predictions, graded)


def grade_to_file(
    path: Path, benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions, data_root: str | Path
) -> dict[str, Any]:
    """Return what :func:`grade` returns, and write what each question was graded; nothing is graded twice."""
    graded = graders.TABLE[benchmark.grader](benchmark, questions, predictions)
    write_items(path, benchmark, questions, predictions, graded, data_root)
    return summarise(benchmark, questions, predictions, graded)


def summarise(
    benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions, graded: graders.Graded
) -> dict[str, Any]:
    """Return what :func:`grade` writes of a graded benchmark."""
    groups = [question.group for question in questions]
    results: dict[str, Any] = {}
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, measure in graded.measures.items():
        if isinstance(measure, str):
            reasons[measure].append(name)
            results[name] = {"value": None, "interval": None, "count": 0}
        else:
            results[name] = _entry(measure, groups, graded.exact.get(name))
    notes = [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
    right = {name: bool(value) for name, value in graded.corrected.items()} if benchmark.grader != "report" else {}
    details: dict[str, Any] = {"reliability": reliability(predictions.confidences, right)}
    results |= {
        "metrics": list(benchmark.metrics),
        "unparsable": graded.unparsable,
        "counts": benchmark.counts,
        "notes": [*predictions.notes, *notes],
        "details": details,
    }
    if benchmark.grader == "trigger":
        told = describe_triggers(questions, predictions)
        details["confusion"] = told.pop("confusion")
        results |= told
    return results


def _entry(measure: Measure, groups: Sequence[str], exact: float | None) -> dict[str, Any]:
    value = value_of(measure) if exact is None else exact
    interval = measure_interval(measure, groups)
    is_known = math.isfinite(value) and all(map(math.isfinite, interval))
    return {
        "value": value if math.isfinite(value) else None,
        "interval": list(interval) if is_known else None,
        "count": measure.count,
    }


def reliability(confidences: Mapping[str, float], right: Mapping[str, bool], bin_count: int = 10) -> dict[str, Any]:
    """Return how often answers are right, by the model's confidence in them, and the expected calibration error.

    Returns:
        ``bins`` (mean confidence, accuracy, count of each that is not empty) and ``expected_calibration_error``; empty
        when no confidences are known.
    """
    names = [name for name in right if name in confidences]
    if not names:
        return {}
    sure = np.array([confidences[name] for name in names])
    hits = np.array([right[name] for name in names])
    places = np.minimum((sure * bin_count).astype(int), bin_count - 1)
    bins = [
        {
            "confidence": float(sure[places == place].mean()),
            "accuracy": float(hits[places == place].mean()),
            "count": int((places == place).sum()),
        }
        for place in np.unique(places)
    ]
    error = sum(abs(row["confidence"] - row["accuracy"]) * row["count"] for row in bins) / len(names)
    return {"bins": bins, "expected_calibration_error": error}


def majority_predictions(questions: Sequence[Question]) -> Predictions:
    """Answer every question with the commonest true answer to its wording, as a model that never sees would at best.

    Counted on the benchmark itself, so it is an upper bound for blind answers; a wording asked once is answered
    with the commonest answer of its kind (open, closed).
    """
    return _commonest(questions, questions, least=2)


def prior_predictions(questions: Sequence[Question], training: Sequence[Question]) -> Predictions:
    """Answer every question with the commonest answer to its wording among training questions.

    A wording that training does not know is answered with the commonest training answer of its kind.
    """
    return _commonest(questions, training, least=1)


def _commonest(questions: Sequence[Question], known: Sequence[Question], least: int) -> Predictions:
    """Answer from the counts of ``known``; a wording counts when it stands there ``least`` times."""
    worded: dict[str, Counter[str]] = defaultdict(Counter)
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    for question in known:
        worded[question.text.lower()][question.answer] += 1
        kinds[question.kind][question.answer] += 1
    everything = sum(kinds.values(), Counter())
    lines = []
    for question in questions:
        answers = worded.get(question.text.lower(), Counter())
        if sum(answers.values()) < least:
            answers = kinds.get(question.kind) or everything
        lines.append((question.id, answers.most_common(1)[0][0]))
    return Predictions(tuple(lines))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step; NaN is refused."""
    write_atomically(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


@exits_with_message
def run_grading(benchmark: str, predictions: str, data_root: str, output_dir: str, benchmarks_dir: str) -> None:
    """Grade a predictions file without a model; write ``results.json``, tables, a report and ``predictions/``.

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
    kept = folder / "predictions" / f"{benchmark}.jsonl"
    kept.parent.mkdir(exist_ok=True)
    if Path(predictions).resolve() != kept.resolve():
        shutil.copyfile(predictions, kept)
    results = grade_to_file(kept.with_suffix(".items.jsonl"), definition, questions, read, data_root)
    write_outputs(folder, [definition], {benchmark: results})


def write_outputs(folder: Path, definitions: Sequence[Benchmark], results: Mapping[str, Any]) -> None:
    """Write ``results.json``, ``results.md`` and ``report.html``, and print the headline scores."""
    write_json(folder / "results.json", results)
    write_atomically(folder / "results.md", markdown_table(definitions, results))
    write_atomically(folder / "report.html", html_page(definitions, results, folder / "predictions"))
    print_scores(results)
    print(f"written to {folder / 'results.json'}, results.md and report.html")


def write_items(
    path: Path,
    definition: Benchmark,
    questions: Sequence[Question],
    read: Predictions,
    graded: graders.Graded,
    data_root: str | Path,
) -> None:
    """Write what each question was graded, one line each, with what a reader needs to judge it."""
    calls = trigger_items(questions, read) if definition.grader == "trigger" else ()
    more = {row["question_id"]: row for row in calls}
    rows = (
        {
            "question_id": question.id,
            "group": question.group,
            "question": question.text,
            "image": str(image_path(definition, question, data_root)) if question.image else None,
            "answer": question.answer,
            "text": read.texts.get(question.id),
            "confidence": read.confidences.get(question.id),
            "published": graded.published.get(question.id),
            "corrected": graded.corrected.get(question.id),
            **more.get(question.id, {}),
        }
        for question in questions
    )
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def print_scores(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the headline scores of every benchmark in both gradings, and the notes."""
    for name, row in results.items():
        for metric in row.get("metrics", ()):
            for key in (metric, f"corrected_{metric}"):
                if row.get(key, {}).get("interval"):
                    low, high = row[key]["interval"]
                    print(f"{name:24} {key:24} {row[key]['value']:.4f} [{low:.4f}, {high:.4f}]  n {row[key]['count']}")
        for note in row.get("notes", ()):
            print(f"note: {name}: {note}")
