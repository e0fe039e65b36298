"""What every source shares: rows that cannot be used, and safe readers of folders, CSV and JSON files."""

from __future__ import annotations

import csv
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vila_m3_common.conversation import IMAGE_TOKEN
from vila_m3_common.errors import UserError, near_match_hint

from .record import Message, Record


@dataclass(frozen=True)
class Rejected:
    """A row that makes no record.

    Args:
        row: number of the row in its file, from 1 (without a header).
        reason: what is wrong with it.
        file: name of its file.
    """

    row: int
    reason: str
    file: str = ""


@dataclass(frozen=True)
class Located:
    """A record and where it came from, so that later checks can name the row."""

    row: int
    record: Record
    file: str = ""


@dataclass(frozen=True)
class Pending:
    """A row whose conversion takes time, such as reading a file; it may be done in another process.

    Args:
        row: number of the row in its file.
        convert: makes the record or raises :class:`RowProblem`; a module's function or a ``partial`` of one.
        file: name of the file.
    """

    row: int
    convert: Callable[[], Record]
    file: str = ""


Item = Located | Rejected | Pending


class RowProblem(ValueError):
    """One row cannot be used; the reader turns it into a :class:`Rejected`."""


def finish(item: Item) -> Located | Rejected:
    """Return an item with its conversion done."""
    if not isinstance(item, Pending):
        return item
    try:
        return Located(item.row, item.convert(), item.file)
    except RowProblem as problem:
        return Rejected(item.row, str(problem), item.file)


def check_folder(source: str | Path) -> Path:
    """Return the folder of an unpacked release.

    Raises:
        UserError: if it is missing, or is the archive instead of its contents.
    """
    folder = Path(source)
    if folder.is_file():
        kind = "a zip archive" if zipfile.is_zipfile(folder) else "a file"
        raise UserError(f"source {folder} is {kind}; unpack the release and give its folder")
    if not folder.is_dir():
        raise UserError(f"source folder {folder} does not exist; give the folder of the unpacked release")
    return folder


def find_file(folder: Path, *names: str) -> Path:
    """Return the first of several names of one file that exists below ``folder``.

    Raises:
        UserError: if none does.
    """
    for name in names:
        if (folder / name).is_file():
            return folder / name
    archives = [str(path.name) for path in sorted(folder.glob("*.zip"))] + [
        name + ".gz" for name in names if (folder / f"{name}.gz").is_file()
    ]
    hint = f"; unpack {', '.join(archives)} first" if archives else "; give the folder that holds it"
    raise UserError(f"{folder} has no {' or '.join(names)}{hint}")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; bytes that are not UTF-8 become surrogates.

    Raises:
        UserError: if the file is cut off.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8-sig", errors="surrogateescape"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be cut off: download it again") from error


def read_json_list(path: Path) -> list[Any]:
    """Return the rows of a JSON file that holds one list.

    Raises:
        UserError: if the file is cut off or is no list.
    """
    rows = read_json(path)
    if not isinstance(rows, list):
        raise UserError(f"{path} holds a {type(rows).__name__}; a list of rows is needed")
    return rows


def read_csv_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | str]]:
    """Yield ``(row, fields)`` of a CSV file with a header, or ``(row, reason)`` for a row that is broken.

    The file is streamed: memory does not grow with it. A field has at most 131,072 characters (``csv``'s limit),
    so an unclosed quotation mark cannot swallow the file.

    Args:
        path: the CSV file.
        columns: names that the header must have.

    Raises:
        UserError: if the header lacks a column.
    """
    header, rows = open_csv(path, columns)
    for row, values in rows:
        yield row, values if isinstance(values, str) else dict(zip(header, values, strict=True))


CsvRow = tuple[int, list[str] | str]


def open_csv(path: Path, columns: Sequence[str]) -> tuple[list[str], Iterator[CsvRow]]:
    """Return the header, and the rows as :func:`read_csv_rows` gives them, but as lists: for tables of great length.

    Raises:
        UserError: if the header lacks a column.
    """
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        header = _read_header(csv.reader(file, strict=True), path, columns)
    return header, _read_values(path, len(header))


def _read_values(path: Path, width: int) -> Iterator[CsvRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        reader = csv.reader(file, strict=True)
        next(reader)
        row, last_line = 0, reader.line_num
        while True:
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row += 1
                lines = f"lines {last_line + 1} to {reader.line_num}"
                yield row, f"{lines} are not CSV ({error}); the file may be cut off"
            else:
                if values:
                    row += 1
                    yield row, values if len(values) == width else _width_problem(len(values), width)
            last_line = reader.line_num


def _read_header(reader: Any, path: Path, columns: Sequence[str]) -> list[str]:
    try:
        header = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UserError(f"{path} has no CSV header ({error})") from error
    missing = [name for name in columns if name not in header]
    if missing:
        hints = "".join(near_match_hint(name, header) for name in missing)
        raise UserError(f"{path} lacks the columns {', '.join(missing)}; {hints}its header: {', '.join(header)[:500]}")
    return header


def _width_problem(count: int, width: int) -> str:
    return f"has {count} fields, the header has {width}; the file may be cut off"


def get_text(row: Any, name: str, default: str | None = None) -> str:
    """Return a text of a row; numbers become text, as in the original converters.

    Raises:
        RowProblem: if the field is missing (and has no default) or is no text.
    """
    value = row.get(name, default) if isinstance(row, dict) else None
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowProblem(f"field {name!r} is {'missing' if value is None else type(value).__name__}; it must be a text")
    return str(value)


def ask(question: str, answer: str, image_first: bool | None, suffix: str = "") -> tuple[Message, Message]:
    """Return a question and its answer.

    ``<image>`` within the question is refused: it would claim an image that is not there.

    Args:
        question: the user's question.
        answer: the assistant's answer.
        image_first: whether the image stands before the question or behind it; None for a question without one.
        suffix: sentence behind the question, on a line of its own, as benchmarks append one.

    Raises:
        RowProblem: if the question holds the placeholder.
    """
    if IMAGE_TOKEN in question or IMAGE_TOKEN in answer:
        raise RowProblem(f"the text holds {IMAGE_TOKEN}, which only stands for an image")
    question = f"{question}\n{suffix}" if suffix else question
    if image_first is not None:
        question = f"{IMAGE_TOKEN}\n{question}" if image_first else f"{question}\n{IMAGE_TOKEN}"
    return Message("user", question), Message("assistant", answer)
