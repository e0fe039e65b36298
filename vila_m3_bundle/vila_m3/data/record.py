"""One conversation on disk: a JSONL row in LLaVA's form, and how it becomes a Conversation."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from vila_m3_common.conversation import IMAGE_TOKEN, Conversation, Role
from vila_m3_common.errors import UserError

# LLaVA's names of the speakers; "expert" is this project's, and is written as "human" for other readers.
SPEAKERS: dict[str, Role] = {"human": "user", "gpt": "assistant", "expert": "expert"}
_NAMES = {role: speaker for speaker, role in SPEAKERS.items()}
# A name that certainly stays below its folder; any other goes through the full check.
_PLAIN_NAME = re.compile(r"[\w-][\w. -]*(?:/[\w-][\w. -]*)*", re.ASCII)
# Made once: `json.dumps` makes a new encoder for every row. A row is built here and cannot contain itself.
_encode = json.JSONEncoder(ensure_ascii=False, check_circular=False).encode


@dataclass(frozen=True)
class Message:
    """One turn as text, with ``<image>`` placeholders.

    Args:
        role: who speaks.
        text: what is said.
        in_context: False for feedback that is recorded but not read by the model (see ``Turn``).
    """

    role: Role
    text: str
    in_context: bool = True


@dataclass(frozen=True)
class Record:
    """One conversation of a data set.

    Args:
        id: unique within its file.
        messages: the turns in order.
        images: paths below the data set's image folder, with ``/``, in the order of their placeholders.
        metadata: what splits, reports and graders need: ``patient``, ``study``, ``question_type``, ...
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def placeholder_count(self) -> int:
        """Number of ``<image>`` placeholders in all turns."""
        return sum(message.text.count(IMAGE_TOKEN) for message in self.messages)

    def to_row(self) -> dict[str, Any]:
        """Return the row as it stands in a JSONL file; one image is ``image``, several are ``images``."""
        row: dict[str, Any] = {"id": self.id}
        if len(self.images) == 1:
            row["image"] = self.images[0]
        elif self.images:
            row["images"] = list(self.images)
        row["conversations"] = [_message_row(message) for message in self.messages]
        if self.metadata:
            row["metadata"] = dict(self.metadata)
        return row

    @classmethod
    def from_row(cls, row: Any) -> Record:
        """Read a row, ours or any in LLaVA's form.

        Raises:
            UserError: if a field is missing or of another type; the message names it.
        """
        if not isinstance(row, dict):
            raise UserError(f"a row is a JSON object with id and conversations, not {type(row).__name__}")
        turns = row.get("conversations")
        if not isinstance(turns, list) or not turns:
            raise UserError("the row has no conversations, a list of {from, value}")
        images = row.get("images", row.get("image")) or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise UserError(f"images {images!r} is neither a path nor a list of paths")
        metadata = row.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise UserError(f"metadata is a JSON object, not {type(metadata).__name__}")
        return cls(str(row.get("id", "")), tuple(map(_read_message, turns)), tuple(images), metadata)


def _message_row(message: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"from": _NAMES[message.role], "value": message.text}
    if not message.in_context:
        row["in_context"] = False
    return row


def _read_message(turn: Any) -> Message:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if speaker not in SPEAKERS or not isinstance(turn.get("value"), str):
        raise UserError(f"turn {turn!r:.200} needs a speaker in 'from' ({', '.join(SPEAKERS)}) and a text in 'value'")
    return Message(SPEAKERS[speaker], turn["value"], bool(turn.get("in_context", True)))


def parse_row(line: str) -> Record:
    """Read one line of a JSONL file.

    Raises:
        UserError: if it is not JSON or not a record.
    """
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"the line is not valid JSON: {error}") from error
    return Record.from_row(row)


def format_row(record: Record) -> str:
    """Return the line of a JSONL file that :func:`parse_row` reads, without its line break."""
    return _encode(record.to_row())


def resolve_image(name: str, root: str | Path) -> Path:
    """Return the file of an image name, which must lie below ``root``.

    Raises:
        UserError: if the name is absolute, has a back-slash or a drive, or leaves the folder.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name:
        raise UserError(f"image name {name!r} leaves the image folder; give a path below it, such as p10/s1/a.png")
    resolved = (Path(root) / path).resolve()
    if not resolved.is_relative_to(Path(root).resolve()):
        raise UserError(f"image name {name!r} leaves the image folder through a link; copy the file into it")
    return resolved


def find_count_problem(record: Record) -> str:
    """Return how placeholders and images differ in number, or an empty string."""
    if record.placeholder_count == len(record.images):
        return ""
    return f"{record.placeholder_count} {IMAGE_TOKEN} placeholders for {len(record.images)} images"


def find_image_problem(record: Record, root: str | Path, must_exist: bool = True, decodes: bool = False) -> str:
    """Return why an image of a record cannot be used, or an empty string.

    Args:
        record: its image names must stay below ``root`` in any case.
        root: folder of the images.
        must_exist: whether the files are looked for.
        decodes: whether they are read.
    """
    for name in record.images:
        try:
            if not must_exist and _PLAIN_NAME.fullmatch(name):
                continue
            path = resolve_image(name, root)
            if must_exist and not _is_there(path):
                return f"image {name} is missing"
            if decodes:
                load_image(path)
        except (UserError, OSError, ValueError) as error:
            reason = str(error) if isinstance(error, UserError) else f"image {name} cannot be read: {error}"
            return reason.encode("utf-8", "replace").decode()
    return ""


def _is_there(path: Path) -> bool:
    """Whether a path is a file, or a folder with files: a DICOM series."""
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def load_image(path: Path) -> np.ndarray:
    """Read what a row may show as ``(H, W, 3)`` uint8, rendered as a served study is.

    Pictures are read as they are; of a volume (NIfTI, a DICOM series) the middle axial slice is shown, CT in its soft
    tissue window, MRI from its least to its largest value.

    Raises:
        UserError: if the file is no image, or shows several.
    """
    # The readers take seconds and 300 MB to import; most of data preparation reads no image.
    from vila_m3_common.study import open_study, render_images
    from vila_m3_common.volumes import RADIOGRAPH_SUFFIXES, has_suffix, load_picture

    if has_suffix(path, RADIOGRAPH_SUFFIXES):
        return load_picture(path)
    images, _ = render_images(open_study(path))
    if len(images) != 1:
        raise UserError(f"{path.name} shows {len(images)} images; give one sequence per placeholder")
    return images[0]


def to_conversation(record: Record, root: str | Path, load: Callable[[Path], np.ndarray] = load_image) -> Conversation:
    """Return the record as the conversation that training, serving and evaluation render.

    Args:
        record: its placeholders and images must agree in number.
        root: folder of its images.
        load: reads a file as ``(H, W, 3)`` uint8.

    Raises:
        UserError: for images that cannot be read, or too few or too many of them.
    """
    if problem := find_count_problem(record):
        raise UserError(f"record {record.id} has {problem}; they must be equal")
    images = iter([load(resolve_image(name, root)) for name in record.images])
    conversation = Conversation()
    for message in record.messages:
        shown: Sequence[np.ndarray] = [next(images) for _ in range(message.text.count(IMAGE_TOKEN))]
        conversation.add(message.role, message.text, shown, message.in_context)
    return conversation
