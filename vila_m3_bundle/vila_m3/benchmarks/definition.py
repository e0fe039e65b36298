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

from ..data.record import Message, Record, resolve_image

GRADERS = ("exact", "pathvqa", "choice", "trigger")
ASKS = ("question", "conversation")


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
        asks: ``question`` puts each question as the reference does; ``conversation`` gives the record's own turns, as
            they are, up to its last.
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
    asks: str = "question"
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Args:
        id: as predictions name it.
        text: without ``<image>``, before the suffix.
        answer: the true answer.
        image: path of its first image below the images' folder; empty for a question about text alone.
        group: patient (or image) that intervals are drawn by; the question's own id where unknown.
        kind: ``CLOSED`` or ``OPEN``, or what else the benchmark's scores are told apart by.
        record: what it was read from.
    """

    id: str
    text: str
    answer: str
    image: str
    group: str
    kind: str
    record: Record | None = None


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
    for key, valid in (("grader", GRADERS), ("asks", ASKS)):
        value = getattr(benchmark, key)
        if value not in valid:
            hint = near_match_hint(str(value), valid)
            raise UserError(f"{known[name]}: unknown {key} {value!r}; {hint}valid: {', '.join(valid)}")
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
    asked, answered = record.messages[0], record.messages[-1]
    return Question(
        id=record.id,
        text=asked.text.replace(IMAGE_TOKEN, "").strip(),
        answer=answered.text,
        image=record.images[0] if record.images else "",
        group=str(record.metadata.get("patient") or record.id),
        kind=str(record.metadata.get("answer_type", "")).strip().upper(),
        record=record,
    )


def prompt_of(benchmark: Benchmark, question: Question) -> str:
    """Return the user turn: image where there is one, question, and the suffix where the reference appends one."""
    lines: Sequence[str] = [IMAGE_TOKEN if question.image else "", question.text, benchmark.suffix]
    return "\n".join(line for line in lines if line)


def turns_of(benchmark: Benchmark, question: Question) -> tuple[Message, ...]:
    """Return what is asked: one user turn, or the record's own turns up to the one that is to be answered."""
    if benchmark.asks == "conversation" and question.record is not None:
        return question.record.messages[:-1]
    return (Message("user", prompt_of(benchmark, question)),)


def image_paths(benchmark: Benchmark, question: Question, data_root: str | Path) -> list[Path]:
    """Return the files of a question's images, in the order of their placeholders."""
    if benchmark.asks == "conversation" and question.record is not None:
        names: Sequence[str] = question.record.images
    else:
        names = [question.image] if question.image else []
    return [resolve_image(name, Path(data_root) / benchmark.folder / benchmark.images) for name in names]
