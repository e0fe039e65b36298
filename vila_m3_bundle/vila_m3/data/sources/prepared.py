"""Rows of data sets that are prepared already, to be converted once more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from vila_m3_common.errors import UserError, near_match_hint

from ..record import Record
from ..source import Item, Pending


def read_prepared(folder: Path, name: str, convert: Callable[[bytes], Record]) -> Iterator[Item]:
    """Yield the rows of a prepared data set in their order, each still to be converted.

    Args:
        folder: of the prepared files.
        name: ``<data set>_<split>``.
        convert: line -> record; it is pickled for other processes.

    Raises:
        UserError: if there are no such files.
    """
    for file in find_files(folder, name):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield Pending(number, partial(convert, line), file.name)


def find_files(folder: Path, name: str) -> list[Path]:
    """Return the file of a prepared data set, or its shards.

    Raises:
        UserError: if there are none.
    """
    whole = folder / f"{name}.jsonl"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].jsonl"))
    if not files:
        prepared = sorted(path.name for path in folder.glob("*.jsonl") if not path.name.endswith(".rejected.jsonl"))
        hint = near_match_hint(whole.name, prepared)
        raise UserError(f"{folder} has no {whole.name}; {hint}prepare it first, or set options#input_name and split")
    return files
