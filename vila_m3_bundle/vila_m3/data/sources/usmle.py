"""USMLE-style multiple choice (Jin et al., 2021), JSONL with question, options and answer_idx; no images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vila_m3_common.errors import check_choice

from ..record import Record
from ..source import Item, Located, Rejected, RowProblem, ask, check_folder, find_file, get_text

SPLITS = ("train", "dev", "test")


def read_usmle(source: str | Path, split: str) -> Iterator[Item]:
    """Yield the questions with lettered options; the answer is the letter and its text.

    Args:
        source: folder with ``train.jsonl``, ``dev.jsonl``, ``test.jsonl``.
        split: train, dev or test.

    Raises:
        UserError: for an unknown split or a missing file.
    """
    file = find_file(check_folder(source), f"{check_choice(split, SPLITS, 'split')}.jsonl")
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    yield Located(number, _convert(line, number, split), file.name)
                except RowProblem as problem:
                    yield Rejected(number, str(problem), file.name)


def _convert(line: str, number: int, split: str) -> Record:
    try:
        row: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise RowProblem(f"is not valid JSON ({error})") from error
    question = get_text(row, "question")
    options = row.get("options")
    if not isinstance(options, dict) or len(options) < 2:
        raise RowProblem("has no options, an object of letters and texts")
    letter = get_text(row, "answer_idx", "") or next((key for key in options if options[key] == row.get("answer")), "")
    if letter not in options:
        raise RowProblem(f"answer {letter!r:.20} is none of the options {', '.join(options)}")
    choices = "\n".join(f"{key}. {get_text(options, key)}" for key in options)
    metadata = {
        "dataset": "usmle",
        "split": split,
        "answer_type": "CLOSED",
        "answer_letter": letter,
        "question": question,
        "content_type": get_text(row, "meta_info", ""),
    }
    messages = ask(f"{question}\n{choices}", f"{letter}. {options[letter]}", None)
    return Record(f"{split}-{number}", messages, (), metadata)
