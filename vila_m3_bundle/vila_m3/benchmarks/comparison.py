"""The ``compare`` command: two runs against each other, question by question, and against the published scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vila_m3_common.errors import UserError, exits_with_message, near_match_hint
from vila_m3_common.standalone import make_output_dir

from ..resumable_files import write_atomically
from . import graders
from .definition import Benchmark, Question, list_benchmarks, load_benchmark, read_questions
from .grading import grade, write_json
from .page import expert_pairs
from .predictions import Predictions, read_predictions
from .statistics import PERMUTATIONS, Measure, SumMeasure, compare
from .tables import BLANK_ENDING, PRIOR_ENDING, columns_of, heading, percent

# A rank is computed anew for every exchange, a sum is not.
_RANK_PERMUTATIONS = 1000


def find_runs(source: str | Path) -> dict[str, Path]:
    """Return name -> predictions of a folder that ``evaluate`` or ``grade`` wrote, or of one file, named by its stem.

    Raises:
        UserError: if there are none.
    """
    path = Path(source)
    if path.is_file():
        return {path.stem: path}
    files = [*sorted((path / "predictions").glob("*.jsonl")), *sorted(path.glob("*.jsonl"))]
    runs = {file.stem: file for file in reversed(files) if ".shard" not in file.name and ".items" not in file.name}
    if not runs:
        raise UserError(f"{path} holds no predictions; give a folder that evaluate or grade wrote, or a JSONL file")
    return dict(sorted(runs.items()))


def default_pairs(first: Mapping[str, Path], second: Mapping[str, Path], is_same: bool) -> list[tuple[str, str]]:
    """Return what to compare: equal names of two runs; within one run, baselines with it and without with expert."""
    if not is_same:
        return [(name, name) for name in first if name in second]
    names = list(first)
    baselines = [(name + ending, name) for name in names for ending in (BLANK_ENDING, PRIOR_ENDING)]
    return [pair for pair in baselines if pair[0] in names] + expert_pairs(names)


class _Runs:
    """Predictions, definitions and questions, each read once."""

    def __init__(self, data_root: str, benchmarks_dir: str) -> None:
        self.data_root, self.benchmarks_dir = data_root, benchmarks_dir
        self._known = list_benchmarks(benchmarks_dir)
        self._questions: dict[str, list[Question]] = {}

    def read(self, name: str, path: Path) -> tuple[Benchmark, list[Question], Predictions]:
        """Return the benchmark of a run (``slake_blank`` is of ``slake``), its questions and the predictions."""
        known = name if name in self._known else name.removesuffix(BLANK_ENDING).removesuffix(PRIOR_ENDING)
        benchmark = load_benchmark(known, self.benchmarks_dir)
        if benchmark.name not in self._questions:
            self._questions[benchmark.name] = read_questions(benchmark, self.data_root)
        questions = self._questions[benchmark.name]
        return benchmark, questions, read_predictions(path, [question.id for question in questions])


def compare_pair(
    first: tuple[Benchmark, Sequence[Question], Predictions], second: tuple[Benchmark, Sequence[Question], Predictions]
) -> dict[str, Any]:
    """Compare two runs on the questions that both benchmarks ask.

    Returns:
        ``metrics``: name -> :class:`vila_m3.benchmarks.statistics.Comparison` as a table; ``notes``.

    Raises:
        UserError: if they ask no common question.
    """
    (one, asked_one, said_one), (two, asked_two, said_two) = first, second
    by_id = {question.id: question for question in asked_two}
    common = [question for question in asked_one if question.id in by_id]
    if not common:
        raise UserError(f"{one.name} and {two.name} have no question id in common; compare runs of the same questions")
    graded_one = graders.TABLE[one.grader](one, common, said_one)
    graded_two = graders.TABLE[two.grader](two, [by_id[question.id] for question in common], said_two)
    groups = [question.group for question in common]
    metrics, notes = {}, [*said_one.notes, *said_two.notes]
    if len(common) < max(len(asked_one), len(asked_two)):
        notes.append(f"compared on {len(common)} common questions of {len(asked_one)} and {len(asked_two)}")
    for name in _shared_metrics(one, graded_one.measures, graded_two.measures):
        measures = graded_one.measures[name], graded_two.measures[name]
        reasons = [measure for measure in measures if isinstance(measure, str)]
        if reasons:
            notes.append(f"{name}: {reasons[0]}")
        else:
            metrics[name] = _compared(*measures, groups)  # type: ignore[arg-type]
    return {"metrics": metrics, "notes": list(dict.fromkeys(notes))}


def _shared_metrics(benchmark: Benchmark, one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    return [name for name in columns_of(benchmark, {benchmark.name: one}) if name in one and name in two]


def _compared(one: Measure, two: Measure, groups: Sequence[str]) -> dict[str, Any]:
    permutations = PERMUTATIONS if isinstance(one, SumMeasure) else _RANK_PERMUTATIONS
    row = asdict(compare(one, two, groups, permutations=permutations))
    # JSON has no NaN.
    return {
        name: [_known(bound) for bound in value] if isinstance(value, tuple) else _known(value)
        for name, value in row.items()
    }


def _known(value: float) -> float | None:
    return value if value == value else None


def against_published(benchmark: Benchmark, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one row per published score: ours with its interval, the difference, and whether ours could be theirs.

    The published models' answers are not known, so that there is no paired test.
    """
    rows = []
    for model, scores in benchmark.published_scores().items():
        for metric, published in scores.items():
            ours = results.get(metric) or {}
            if ours.get("value") is None:
                continue
            low, high = ours["interval"] or (ours["value"], ours["value"])
            rows.append(
                {
                    "model": model,
                    "metric": metric,
                    "ours": ours["value"],
                    "interval": [low, high],
                    "published": published / 100,
                    "difference": ours["value"] - published / 100,
                    "is_inside_interval": low <= published / 100 <= high,
                }
            )
    return rows


@exits_with_message
def run_comparison(
    first: str,
    second: str,
    data_root: str,
    output_dir: str,
    benchmarks_dir: str,
    pairs: Sequence[Sequence[str]] = (),
) -> None:
    """Compare two runs and write ``comparison.json`` and ``comparison.md``.

    Args:
        first: folder of a run, or a predictions file named after its benchmark.
        second: the other; the same folder compares a run with itself: with against without expert, image against blank.
        data_root: folder with the data sets' folders.
        output_dir: where to write.
        benchmarks_dir: folder of the YAML files.
        pairs: (name in the first, name in the second); empty takes what :func:`default_pairs` finds.
    """
    one, two = find_runs(first), find_runs(second)
    is_same = Path(first).resolve() == Path(second).resolve()
    chosen = [(pair[0], pair[1]) for pair in pairs] or default_pairs(one, two, is_same)
    if not chosen:
        raise UserError(
            f"nothing to compare: {first} has {', '.join(one)}; {second} has {', '.join(two)}; give --pairs"
        )
    _check_names([pair[0] for pair in chosen], one)
    _check_names([pair[1] for pair in chosen], two)
    reader = _Runs(data_root, benchmarks_dir)
    folder = make_output_dir(output_dir)
    compared: dict[str, Any] = {}
    published: dict[str, Any] = {}
    for name_one, name_two in chosen:
        runs = reader.read(name_one, one[name_one]), reader.read(name_two, two[name_two])
        compared[f"{name_one} -> {name_two}"] = compare_pair(*runs)
        for title, (benchmark, questions, said) in zip(("first", "second"), runs, strict=True):
            name = name_one if title == "first" else name_two
            label = name if is_same else f"{name} ({title})"
            if label not in published and benchmark.published:
                published[label] = against_published(benchmark, grade(benchmark, questions, said))
    write_json(folder / "comparison.json", {"pairs": compared, "published": published})
    text = comparison_table(compared, published)
    write_atomically(folder / "comparison.md", text)
    print(text)
    print(f"written to {folder / 'comparison.json'} and comparison.md")


def _check_names(names: Sequence[str], runs: Mapping[str, Path]) -> None:
    for name in names:
        if name not in runs:
            hint = near_match_hint(name, list(runs))
            raise UserError(f"no predictions for {name!r}; {hint}there are: {', '.join(runs)}")


def comparison_table(compared: Mapping[str, Any], published: Mapping[str, Any]) -> str:
    """Return the comparison as Markdown, in percent."""
    lines = ["## Run against run", "", "| runs | score | first | second | second - first [95 %] | p | questions |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for pair, row in compared.items():
        for metric, found in row["metrics"].items():
            change = percent({"value": found["difference"], "interval": _whole(found["interval"])})
            values = [percent({"value": found[name], "interval": None}) for name in ("first", "second")]
            p_value = "" if found["p_value"] is None else f"{found['p_value']:.4f}"
            cells = [pair, heading(metric), *values, change, p_value, str(found["count"])]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", *(f"- {pair}: {note}" for pair, row in compared.items() for note in row["notes"]), ""]
    if any(published.values()):
        lines += [
            "## Against the published scores",
            "",
            "| run | model | score | ours [95 %] | published | ours - published |",
        ]
        lines.append("| --- | --- | --- | --- | --- | --- |")
    for name, rows in published.items():
        for row in rows:
            ours = percent({"value": row["ours"], "interval": row["interval"]})
            told = f"{100 * row['published']:.1f}{' (inside our interval)' if row['is_inside_interval'] else ''}"
            cells = [name, row["model"], heading(row["metric"]), ours, told, f"{100 * row['difference']:+.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _whole(interval: Sequence[float | None]) -> Sequence[float | None] | None:
    return None if None in interval else interval
