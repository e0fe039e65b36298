"""Conversations in this project's own JSONL, such as a generator or a preparation has written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from vila_m3_common.errors import UserError

from ..record import parse_row
from ..source import Item, Located, Rejected, check_folder, find_file


def read_conversations(source: str | Path, file: str) -> Iterator[Item]:
    """Yield the records of a file; the last turn of each is the assistant's.

    Args:
        source: folder with the file and its images.
        file: name of the JSONL file.

    Raises:
        UserError: if the folder or the file is missing.
    """
    with find_file(check_folder(source), file).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _read(line, number, file)


def _read(line: str, number: int, file: str) -> Item:
    try:
        record = parse_row(line)
    except UserError as problem:
        return Rejected(number, str(problem), file)
    if len(record.messages) < 2 or record.messages[-1].role != "assistant":
        return Rejected(number, "needs at least a question, and an assistant turn at its end", file)
    return Located(number, record, file)
