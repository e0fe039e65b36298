"""What a record must fulfil to be written, and the line it becomes."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vila_m3_common.errors import check_choice

from .record import Message, Record, find_count_problem, find_image_problem, format_row
from .source import Item, Rejected, finish

# An HTML entity where a character should be: the text came out of a web page and was not decoded.
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-fA-F]{1,6}|[A-Za-z]{2,8});")
_SURROGATE = re.compile("[\ud800-\udfff]")
ENTITY_CHOICES = ("refuse", "decode", "keep")


@dataclass(frozen=True)
class RowChecks:
    """What a record must fulfil to be written.

    Args:
        image_root: folder of the images.
        checks_images: whether every image must exist.
        max_characters: longest text of one message.
        allows_empty: whether a message may be empty (recorded reports with an empty text).
        allows_repeated_ids: whether an id may come again (the recorded PathVQA ids are image names).
        allows_count_faults: whether placeholders and images may differ in number (faults of recorded data).
        entities: what happens to HTML entities: refuse, decode or keep.
    """

    image_root: str | Path
    checks_images: bool = True
    max_characters: int = 100_000
    allows_empty: bool = False
    allows_repeated_ids: bool = False
    allows_count_faults: bool = False
    entities: str = "refuse"

    def __post_init__(self) -> None:
        check_choice(self.entities, ENTITY_CHOICES, "treatment of entities")

    def check(self, record: Record) -> Record | str:
        """Return the record as it is to be written, or why it is refused."""
        for message in record.messages:
            problem = self._find_text_problem(message.text)
            if problem:
                return problem
        if self.entities == "decode":
            record = _decode_entities(record)
        if not self.allows_count_faults and (problem := find_count_problem(record)):
            return problem
        return find_image_problem(record, self.image_root, self.checks_images) or record

    def _find_text_problem(self, text: str) -> str:
        if len(text) > self.max_characters:
            return f"a text has {len(text)} characters; {self.max_characters} are allowed"
        if not self.allows_empty and (not text or text.isspace()):
            return "a text is empty"
        if not text.isascii() and _SURROGATE.search(text):
            return "a text is not UTF-8"
        if self.entities == "refuse" and "&" in text and (entity := _ENTITY.search(text)):
            return f"a text holds the HTML entity {entity.group()}; set entities to decode, or to keep"
        return ""


def _decode_entities(record: Record) -> Record:
    messages = tuple(
        Message(message.role, html.unescape(message.text), message.in_context) if "&" in message.text else message
        for message in record.messages
    )
    return Record(record.id, messages, record.images, record.metadata)


class Line(NamedTuple):
    """A good row as it is written, and where it came from; a tuple because millions go from process to process."""

    row: int
    file: str
    id: str
    text: bytes


def make_lines(items: Sequence[Item], checks: RowChecks) -> list[Line | Rejected]:
    """Convert, check and format rows."""
    return [_make_line(item, checks) for item in items]


def _make_line(item: Item, checks: RowChecks) -> Line | Rejected:
    finished = finish(item)
    if isinstance(finished, Rejected):
        return finished
    checked = checks.check(finished.record)
    if isinstance(checked, str):
        return Rejected(finished.row, checked, finished.file)
    try:
        text = format_row(checked).encode()
    except UnicodeEncodeError:
        return Rejected(finished.row, "a field is not UTF-8", finished.file)
    return Line(finished.row, finished.file, checked.id, text)
