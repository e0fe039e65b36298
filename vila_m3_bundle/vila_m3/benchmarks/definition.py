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

from ..data.record import Record, resolve_image

GRADERS = ("exact", "pathvqa")


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
        published: model -> published score in percent.
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
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Args:
        id: as predictions name it.
        text: without ``<image>``, before the suffix.
        answer: the true answer.
        image: path of its image below the images' folder.
        group: patient (or image) that intervals are drawn by; the question's own id where unknown.
        kind: ``CLOSED`` or ``OPEN``.
    """

    id: str
    text: str
    answer: str
    image: str
    group: str
    kind: str


def list_benchmarks(folder: str | Path) -> dict[str, Path]:
    """Return name -> file of every benchmark in a folder."""
    return {path.stem: path for path in sorted(Path(folder).glob("*.yaml"))}


def load_benchmark(name: str, folder: str | Path) -> Benchmark:
    """Read one benchmark.

    Raises:
        UserError: for an unknown name, a misspelt, missing or mistyped key, or an unknown grader.
    """
    known = list_benchmarks(folder)
    if name not in known:
        raise UserError(f"unknown benchmark {name!r}; {near_match_hint(name, list(known))}valid: {', '.join(known)}")
    try:
        row = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{known[name]} is not valid YAML: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{known[name]} holds no keys; see slake.yaml for an example")
    _check_keys(row, known[name])
    benchmark = Benchmark(name=name, **row)
    if benchmark.grader not in GRADERS:
        hint = near_match_hint(benchmark.grader, GRADERS)
        raise UserError(f"{known[name]}: unknown grader {benchmark.grader!r}; {hint}valid: {', '.join(GRADERS)}")
    return benchmark


def _check_keys(row: Mapping[str, Any], path: Path) -> None:
    valid = [item.name for item in fields(Benchmark) if item.name != "name"]
    for key in row:
        if key not in valid:
            raise UserError(f"{path}: unknown key {key!r}; {near_match_hint(str(key), valid)}valid: {', '.join(valid)}")
    needed = valid[: valid.index("options")]
    missing = [key for key in needed if not isinstance(row.get(key), str)]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} must be given as text")
    for key in ("options", "published"):
        if not isinstance(row.get(key, {}), dict):
            raise UserError(f"{path}: {key} must be a table of names and values")


def read_questions(benchmark: Benchmark, data_root: str | Path) -> list[Question]:
    """Read a benchmark's questions through its source module.

    Raises:
        UserError: if the source or the data is missing, or a row is unusable.
    """
    items = _reader(benchmark)(Path(data_root) / benchmark.folder, **benchmark.options)
    questions = []
    for item in items:
        if not hasattr(item, "record"):
            raise UserError(f"{benchmark.name}: row {item.row} of {item.file} cannot be used: {item.reason}")
        questions.append(_question(item.record))
    if not questions:
        raise UserError(
            f"{benchmark.name}: no questions in {Path(data_root) / benchmark.folder} for {benchmark.options}"
        )
    return questions


def _reader(benchmark: Benchmark) -> Callable[..., Iterable[Any]]:
    module, _, function = benchmark.source.rpartition(".")
    try:
        found: Callable[..., Iterable[Any]] = getattr(
            importlib.import_module(f"vila_m3.data.sources.{module}"), function
        )
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{benchmark.name}: source {benchmark.source!r} is no reader below vila_m3.data.sources ({error})"
        ) from error
    return found


def _question(record: Record) -> Question:
    asked, answered = record.messages[0], record.messages[1]
    return Question(
        id=record.id,
        text=asked.text.replace(IMAGE_TOKEN, "").strip(),
        answer=answered.text,
        image=record.images[0],
        group=str(record.metadata.get("patient") or record.id),
        kind=str(record.metadata.get("answer_type", "")).strip().upper(),
    )


def prompt_of(benchmark: Benchmark, question: Question) -> str:
    """Return the user turn: image, question, and the suffix where the reference appends one."""
    lines: Sequence[str] = [IMAGE_TOKEN, question.text, *([benchmark.suffix] if benchmark.suffix else [])]
    return "\n".join(lines)


def image_path(benchmark: Benchmark, question: Question, data_root: str | Path) -> Path:
    """Return the file of a question's image."""
    return resolve_image(question.image, Path(data_root) / benchmark.folder / benchmark.images)
