"""Messages of a request -> a session of the agent: continued from memory, or built from the messages alone."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vila_m3_common.agent import Agent, Results, Session
from vila_m3_common.conversation import Conversation, Turn, neutralise
from vila_m3_common.study import Study, open_study

from .errors import ApiError, room_checked
from .pictures import write_picture
from .schemas import FilePart, ImagePart, Message, StudyOptions
from .settings import Settings
from .store import FileStore

MANY_NOTE = "Earlier images and what was said about them are not read: the last images begin a new study."
SYSTEM_NOTE = "System messages are not read: the model was trained with one fixed system text."
FORGOTTEN_NOTE = "The state of this conversation was not kept; earlier results of experts are not read again."


@dataclass
class Kept:
    """What is kept of one conversation, at one point of it.

    Args:
        id: random, for the client that asked.
        owner: who may continue or read it.
        session: the agent's session; copied before it goes on, so that one point can be continued twice.
        results: expert results that may be reused.
        expires_at: seconds since 1970.
    """

    id: str
    owner: str
    session: Session
    results: Results
    expires_at: float


class Memory:
    """Conversations by what was said in them, and by id.

    A client of OpenAI's API sends the whole conversation each time; what it sent and what it was answered find the
    state that the agent left. Nothing is found for another owner.

    Args:
        size: how many are kept.
        on_forgotten: is told of every working folder that no kept conversation has any more.
        clock: seconds since 1970.
    """

    def __init__(self, size: int, on_forgotten: Callable[[Path], None], clock: Callable[[], float] = time.time) -> None:
        self._size, self._on_forgotten, self._clock = size, on_forgotten, clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, key: str) -> Kept | None:
        """Return a conversation by the digest of its messages."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None or kept.expires_at <= self._clock():
                return None
            self._kept.move_to_end(key)
            return kept

    def by_id(self, conversation_id: str, owner: str) -> Kept:
        """Return a conversation by its id.

        Raises:
            ApiError: if there is none with this id for this owner.
        """
        with self._lock:
            for kept in self._kept.values():
                if kept.id == conversation_id and kept.owner == owner and kept.expires_at > self._clock():
                    return kept
        raise ApiError(404, "there is no conversation with this id; it was forgotten or never held", "not_found")

    def keep(self, key: str, kept: Kept) -> None:
        """Keep a conversation, in place of the oldest ones where there are too many."""
        with self._lock:
            self._kept[key] = kept
            self._kept.move_to_end(key)
            oldest = list(self._kept)[: max(0, len(self._kept) - self._size)]
            self._forget(oldest)

    def sweep(self) -> None:
        """Forget what is over its time."""
        with self._lock:
            now = self._clock()
            self._forget([key for key, kept in self._kept.items() if kept.expires_at <= now])

    def _forget(self, keys: Sequence[str]) -> None:
        folders = {self._kept.pop(key).session.output_dir for key in keys}
        for folder in folders - {kept.session.output_dir for kept in self._kept.values()} if folders else ():
            self._on_forgotten(folder)


def new_id() -> str:
    """Return a random id of a conversation."""
    return f"conv-{secrets.token_hex(16)}"


def spoken(messages: Sequence[Message]) -> list[Message]:
    """Return the messages that make the conversation.

    Left out are system texts, the expert turns of a transcript that was sent back, and what came before the last
    images.
    """
    said = [
        message
        for message in messages
        if message.role == "user" or (message.role == "assistant" and not message.tool_calls)
    ]
    start = max((index for index, message in enumerate(said) if message.images), default=0)
    return said[start:]


def digest(messages: Sequence[Message], options: StudyOptions, owner: str) -> str:
    """Return what tells one conversation from another."""
    told = [[message.role, message.text.strip(), *(_address(part) for part in message.images)] for message in messages]
    return hashlib.sha256(json.dumps([owner, options.model_dump(), told]).encode()).hexdigest()


def _address(part: ImagePart | FilePart) -> str:
    if isinstance(part, FilePart):
        return part.file.file_id
    return hashlib.sha256(part.image_url.url.encode()).hexdigest()


def check_messages(messages: Sequence[Message], settings: Settings) -> list[Message]:
    """Return what is said, or refuse it.

    Raises:
        ApiError: if there is too much of it, images stand where none can, or the last message asks nothing.
    """
    limits = settings.limits
    if len(messages) > limits.messages:
        raise ApiError(
            400,
            f"the conversation has {len(messages)} messages; allowed are {limits.messages}; start a new one",
            "context_length_exceeded",
            "messages",
        )
    for index, message in enumerate(messages):
        if len(message.text) > limits.message_characters:
            text = f"messages.{index} has {len(message.text)} characters; allowed are {limits.message_characters}"
            raise ApiError(400, text, "string_above_max_length", "messages")
        if message.images and message.role != "user":
            raise ApiError(400, f"messages.{index} is no user message, but holds images", "invalid_value", "messages")
    if messages[-1].role != "user":
        raise ApiError(400, "the last message must be of the role 'user'", "invalid_value", "messages")
    said = spoken(messages)
    for index, message in enumerate(said):
        if message.role == "user" and not neutralise(message.text).strip():
            which = "the last message" if index == len(said) - 1 else "an earlier user message"
            raise ApiError(400, f"{which} has no text; ask something about the image", "invalid_value", "messages")
    return said


def fork(session: Session) -> Session:
    """Return a session that grows apart from the given one."""
    return dataclasses.replace(
        session,
        conversation=Conversation(list(session.conversation.turns)),
        records=list(session.records),
        notes=list(session.notes),
    )


def replay(study: Study | None, said: Sequence[Message], options: StudyOptions, agent: Agent, folder: Path) -> Session:
    """Make a session of everything but the last message, which is still to be asked; ``folder`` is its own.

    Nothing in the messages calls an expert: only turns that the VLM writes are searched for triggers.
    """
    session = Session(study, folder, options.slice_index, options.axis)
    for message in said[:-1]:
        text = neutralise(message.text).strip()
        turn = agent.user_turn(session, text) if message.role == "user" else Turn("assistant", text)
        session.record(turn, 0.0)
    return session


class SessionBuilder:
    """Builds sessions from messages.

    Args:
        store: the files.
        settings: of the service.
    """

    def __init__(self, store: FileStore, settings: Settings) -> None:
        self._store, self._settings = store, settings

    def build(self, said: Sequence[Message], options: StudyOptions, owner: str, agent: Agent, folder: Path) -> Session:
        """Open the images of the first message and :func:`replay` what was said about them.

        Raises:
            ApiError, UserError: if an image cannot be used.
        """
        study = self.open_images(said[0].images, options.modality, owner, folder)
        return replay(study, said, options, agent, folder)

    def open_images(
        self, parts: Sequence[ImagePart | FilePart], modality: str | None, owner: str, folder: Path
    ) -> Study | None:
        """Open the images of one message as a study; None when there are none.

        Raises:
            ApiError, UserError: if one of them cannot be used.
        """
        ids = [_file_id(part) for part in parts]
        named = [file_id for file_id in ids if file_id]
        if not parts:
            return None
        if len(named) == len(ids):
            return self.open_files(named, modality, owner, folder)
        if len(parts) > 1:
            raise ApiError(
                400,
                "a message holds one picture, or files of one study; give one image_url",
                "invalid_value",
                "messages",
            )
        assert isinstance(parts[0], ImagePart)
        place = folder / "picture"
        with room_checked():
            place.mkdir()
        return open_study(
            write_picture(parts[0].image_url.url, place, self._settings.limits, self._settings.image_urls), modality
        )

    def open_files(self, ids: Sequence[str], modality: str | None, owner: str, folder: Path) -> Study:
        """Open uploaded files as one study; four MRI sequences are read in the order of the settings.

        Raises:
            ApiError, UserError: if they cannot be used together.
        """
        paths, order = self._find_paths(ids, owner, folder), self._settings.sequence_order
        study = open_study(paths, modality)
        return open_study(paths, modality, order) if order and study.has_brain_sequences else study

    def _find_paths(self, ids: Sequence[str], owner: str, folder: Path) -> Path | list[Path]:
        """Return what :func:`vila_m3_common.study.open_study` reads of uploaded files.

        Several DICOM files become the folder of a series; other files are the sequences of one MRI.
        """
        stored = [self._store.get(file_id, owner) for file_id in ids]
        paths = [self._store.path(entry) for entry in stored]
        if len(paths) == 1:
            return paths[0]
        if all(entry.kind == "dicom" for entry in stored):
            series = folder / "series"
            with room_checked():
                series.mkdir(exist_ok=True)
                for number, path in enumerate(paths):
                    (series / f"{number:05d}.dcm").hardlink_to(path)
            return series
        return paths


def _file_id(part: ImagePart | FilePart) -> str | None:
    if isinstance(part, FilePart):
        return part.file.file_id
    url = part.image_url.url
    return url if url.startswith("file-") else None
