"""Prepared conversations with experts as they are without: what a comparison with and without experts needs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from vila_m3_common.conversation import IMAGE_TOKEN
from vila_m3_common.errors import UserError
from vila_m3_common.trigger import parse_triggers

from ..record import Message, Record, parse_row
from ..source import Item, RowProblem, check_folder
from .prepared import read_prepared


def read_without_expert(source: str | Path, split: str, input_name: str, cards: str, dataset: str) -> Iterator[Item]:
    """Return the rows of a prepared data set without model cards, calls, feedback and the pictures in it.

    Rows that are about a call alone (a segmentation request, an expert that failed) are refused.

    Args:
        source: folder of the prepared files, ``<input_name>_<split>.jsonl`` or its shards.
        split: of the prepared data set.
        input_name: name of the prepared data set, such as ``phantom``.
        cards: text of the model cards.
        dataset: for the metadata.

    Raises:
        UserError: if there are no such files.
    """
    convert = partial(_convert, cards=cards, dataset=dataset)
    return read_prepared(check_folder(source), f"{input_name}_{split}", convert)


def _convert(line: bytes, cards: str, dataset: str) -> Record:
    try:
        record = parse_row(line.decode("utf-8", "surrogateescape"))
    except UserError as error:
        raise RowProblem(str(error)) from error
    return without_expert(record, cards, dataset)


def without_expert(record: Record, cards: str, dataset: str) -> Record:
    """Return a conversation without what an expert had to do with it (see :func:`read_without_expert`).

    Raises:
        RowProblem: if nothing is left to answer.
    """
    images = iter(record.images)
    messages: list[Message] = []
    kept: list[str] = []
    for message in record.messages:
        shown = [next(images) for _ in range(message.text.count(IMAGE_TOKEN))]
        if message.role == "expert":
            if message.text.startswith("The expert "):
                raise RowProblem("is about an expert that gave no result")
            continue
        if message.role == "assistant" and parse_triggers(message.text):
            continue
        messages.append(replace(message, text=message.text.removeprefix(cards)))
        kept += shown
    pairs = list(zip(messages, messages[1:], strict=False))
    if not pairs or messages[-1].role != "assistant" or any(one.role == other.role for one, other in pairs):
        raise RowProblem("is about a call of an expert alone")
    metadata = {**record.metadata, "dataset": dataset}
    metadata.pop("expert", None)
    return replace(record, messages=tuple(messages), images=tuple(kept), metadata=metadata)
