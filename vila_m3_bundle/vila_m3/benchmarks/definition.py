"""A benchmark is one YAML file; this reads it, and the questions that it names."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vila_m3_common.conversation import IMAGE_TOKEN
from vila_m3_common.errors import UserError, near_match_hint
from vila_m3_common.prompts import EXPERT_FORMS, FINDING_FORMS

from ..data.record import Record, resolve_image
from ..data.source import Item, Rejected, finish
from .report_metrics import METRICS

GRADERS = ("exact", "pathvqa", "diff_vqa", "chestxray14", "chexpert", "report", "choice", "trigger")
PROMPTS = ("question", "report", "conversation", *FINDING_FORMS)
INCLUDE = "include"


@dataclass(frozen=True)
class Benchmark:
    """What a YAML file says.

    Args:
        name: as given to ``--benchmarks``; the file's name.
        title: for tables.
        source: reader of the data set, ``module.function`` below ``vila_m3.data.sources``.
        folder: of the data set, below ``data_root``.
        images: of its images, below ``folder``.
        grader: the published grading.
        counts: what the published score counts, told beside it.
        options: arguments of the reader, such as ``split``.
        suffix: sentence that the reference appends to every question.
        published: model -> published score in percent, or -> metric -> score.
        prompt: form of the question; those of findings are :data:`vila_m3_common.prompts.FINDING_FORMS`, and
            ``conversation`` gives the record's own turns, as they are, up to its last.
        expert: folder of an expert's saved findings, below ``data_root``; empty asks without an expert.
        metrics: what tables show, the headline first.
        training: what differs in ``options`` to read the questions that models may learn from; their commonest answers
            are a baseline. Empty where there are none.
    """

    name: str
    title: str
    source: str
    folder: str
    images: str
    grader: str
    counts: str
    options: Mapping[str, Any] = field(default_factory=dict)
    suffix: str = ""
    published: Mapping[str, float | Mapping[str, float]] = field(default_factory=dict)
    prompt: str = "question"
    expert: str = ""
    metrics: Sequence[str] = ("accuracy",)
    training: Mapping[str, Any] = field(default_factory=dict)

    def published_scores(self) -> dict[str, dict[str, float]]:
        """Return model -> metric -> published score in percent; a bare number is the headline's."""
        return {
            model: {name: float(value) for name, value in given.items()}
            if isinstance(given, Mapping)
            else {self.metrics[0]: float(given)}
            for model, given in self.published.items()
        }


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Args:
        id: as predictions name it.
        text: without ``<image>``, before the suffix.
        answer: the true answer.
        image: path of its (first) image below the images' folder; empty for a question about text alone.
        group: patient (or image) that intervals are drawn by; the question's own id where unknown.
        kind: ``CLOSED`` or ``OPEN``.
        category: type of the question, where a data set has them.
        finding: what a question for one finding asks for.
        findings: names in the order of their letters, where there are options.
        record: what it was read from.
    """

    id: str
    text: str
    answer: str
    image: str
    group: str
    kind: str
    category: str = ""
    finding: str = ""
    findings: tuple[str, ...] = ()
    record: Record | None = None


def list_benchmarks(folder: str | Path) -> dict[str, Path]:
    """Return name -> file of every benchmark in a folder."""
    return {path.stem: path for path in sorted(Path(folder).glob("*.yaml"))}


def load_benchmark(name: str, folder: str | Path) -> Benchmark:
    """Read one benchmark; a file that says ``include: other`` holds only what differs from that one.

    Raises:
        UserError: for an unknown name, a misspelt, missing or mistyped key, or an unknown grader, prompt or metric.
    """
    known = list_benchmarks(folder)
    row = _read_file(name, known)
    _check_keys(row, known[name])
    benchmark = Benchmark(name=name, **row)
    _check_choice(benchmark.grader, GRADERS, "grader", known[name])
    _check_choice(benchmark.prompt, PROMPTS, "prompt", known[name])
    for metric in benchmark.metrics if benchmark.grader == "report" else ():
        _check_choice(metric, list(METRICS), "metric", known[name])
    if benchmark.prompt in EXPERT_FORMS and not benchmark.expert:
        raise UserError(
            f"{known[name]}: prompt {benchmark.prompt} tells an expert's findings; give their folder as expert"
        )
    return benchmark


def _read_file(name: str, known: Mapping[str, Path], seen: Sequence[str] = ()) -> dict[str, Any]:
    if name not in known:
        raise UserError(f"unknown benchmark {name!r}; {near_match_hint(name, list(known))}valid: {', '.join(known)}")
    if name in seen:
        raise UserError(f"{known[name]} includes itself through {' -> '.join(seen)}")
    try:
        row = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{known[name]} is not valid YAML: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{known[name]} holds no keys; see slake.yaml for an example")
    if INCLUDE not in row:
        return row
    base = _read_file(str(row.pop(INCLUDE)), known, (*seen, name))
    if isinstance(row.get("options"), dict):
        row["options"] = {**base.get("options", {}), **row["options"]}
    return {**base, **row}


def _check_choice(value: str, valid: Sequence[str], what: str, path: Path) -> None:
    if value not in valid:
        raise UserError(
            f"{path}: unknown {what} {value!r}; {near_match_hint(str(value), valid)}valid: {', '.join(valid)}"
        )


def _check_keys(row: Mapping[str, Any], path: Path) -> None:
    valid = [item.name for item in fields(Benchmark) if item.name != "name"]
    allowed = [*valid, INCLUDE]
    for key in row:
        if key not in valid:
            hint = near_match_hint(str(key), allowed)
            raise UserError(f"{path}: unknown key {key!r}; {hint}valid: {', '.join(allowed)}")
    needed = valid[: valid.index("options")]
    missing = [key for key in needed if not isinstance(row.get(key), str)]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} must be given as text")
    for key in ("options", "published", "training"):
        if not isinstance(row.get(key, {}), dict):
            raise UserError(f"{path}: {key} must be a table of names and values")
    if not isinstance(row.get("metrics", []), list) or "metrics" in row and not row["metrics"]:
        raise UserError(f"{path}: metrics must be a list of names, the headline first")


def read_questions(benchmark: Benchmark, data_root: str | Path) -> list[Question]:
    """Read a benchmark's questions through its source module.

    Raises:
        UserError: if the source or the data is missing, or a row is unusable.
    """
    return _read(benchmark, benchmark.options, data_root)


def read_training_questions(benchmark: Benchmark, data_root: str | Path) -> list[Question]:
    """Read the questions that models may learn from, none where the benchmark names none.

    Raises:
        UserError: as :func:`read_questions` does.
    """
    return _read(benchmark, {**benchmark.options, **benchmark.training}, data_root) if benchmark.training else []


def _read(benchmark: Benchmark, options: Mapping[str, Any], data_root: str | Path) -> list[Question]:
    items = _reader(benchmark)(Path(data_root) / benchmark.folder, **options)
    questions = []
    for item in map(finish, items):
        if isinstance(item, Rejected):
            raise UserError(f"{benchmark.name}: row {item.row} of {item.file} cannot be used: {item.reason}")
        questions.append(_question(item.record))
    if not questions:
        raise UserError(f"{benchmark.name}: no questions in {Path(data_root) / benchmark.folder} for {options}")
    return questions


def _reader(benchmark: Benchmark) -> Callable[..., Iterable[Item]]:
    module, _, function = benchmark.source.rpartition(".")
    try:
        found: Callable[..., Iterable[Item]] = getattr(
            importlib.import_module(f"vila_m3.data.sources.{module}"), function
        )
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{benchmark.name}: source {benchmark.source!r} is no reader below vila_m3.data.sources ({error})"
        ) from error
    return found


def _question(record: Record) -> Question:
    asked, answered, told = record.messages[0], record.messages[-1], record.metadata
    kind = str(told.get("answer_type", "")).strip().upper()
    return Question(
        id=record.id,
        text=asked.text.replace(IMAGE_TOKEN, "").strip(),
        answer=answered.text,
        image=record.images[0] if record.images else "",
        group=str(told.get("patient") or record.id),
        kind="CLOSED" if kind in ("CLOSED", "YES/NO") else "OPEN",
        category=str(told.get("question_type", "")),
        finding=str(told.get("finding", "")),
        findings=tuple(told.get("findings", ())),
        record=record,
    )


def prompt_of(benchmark: Benchmark, question: Question) -> str:
    """Return the user turn: image where there is one, question, and the suffix where the reference appends one."""
    lines: Sequence[str] = [IMAGE_TOKEN if question.image else "", question.text, benchmark.suffix]
    return "\n".join(line for line in lines if line)


def image_path(benchmark: Benchmark, question: Question, data_root: str | Path) -> Path:
    """Return the file of a question's image."""
    return resolve_image(question.image, image_root(benchmark, data_root))


def image_root(benchmark: Benchmark, data_root: str | Path) -> Path:
    """Return the folder that a benchmark's images lie below."""
    return Path(data_root) / benchmark.folder / benchmark.images
