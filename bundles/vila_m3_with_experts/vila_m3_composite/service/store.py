"""Files of the service: each in a folder with a random name, erased after a stated time."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from vila_m3_common.errors import UserError
from vila_m3_common.standalone import make_output_dir
from vila_m3_common.volumes import forget_volumes

from .errors import ApiError, room_checked
from .schemas import FILE_ID_PATTERN

logger = logging.getLogger(__name__)

Kind = Literal["volume", "dicom", "picture", "series", "sequences", "result"]
_META = "meta.json"
_ID = re.compile(FILE_ID_PATTERN)
_LONGEST_NAME = 120


@dataclass(frozen=True)
class StoredFile:
    """One file, or the files of one archive.

    Args:
        id: random, ``file-`` and 32 hexadecimal digits.
        kind: what it is, as its content tells.
        name: of the file inside its folder; never what a client called it.
        filename: what the client called it, for the client alone.
        owner: who may read it; see :func:`.access.owner_of`.
        byte_count: on disk.
        created_at: seconds since 1970.
        expires_at: seconds since 1970.
        purpose: as in OpenAI's API.
        details: of a label map, its labels and their colours.
    """

    id: str
    kind: Kind
    name: str
    filename: str
    owner: str
    byte_count: int
    created_at: float
    expires_at: float
    purpose: str = "user_data"
    details: dict[str, Any] = field(default_factory=dict)

    def to_api(self) -> dict[str, Any]:
        """Return the file as OpenAI's API describes one."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.byte_count,
            "created_at": int(self.created_at),
            "expires_at": int(self.expires_at),
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "kind": self.kind,
        }


class FileStore:
    """The files below one folder.

    ``incoming/`` holds what is not complete and is emptied at the start; ``files/<id>/`` appears by one rename, with
    everything in it; ``conversations/`` holds the working folders of conversations that live in memory.

    Args:
        root: folder, created when missing; two services may not share it.
        max_bytes: of all files together.
        seconds: after which a file is erased.
        clock: seconds since 1970.

    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, root: Path, max_bytes: float, seconds: float, clock: Callable[[], float] = time.time) -> None:
        self.root = make_output_dir(root)
        self.max_bytes, self.seconds, self.clock = max_bytes, seconds, clock
        self._lock = threading.Lock()
        self._files: dict[str, StoredFile] = {}
        self._folders: dict[Path, float] = {}
        for name in ("incoming", "conversations"):
            shutil.rmtree(self.root / name, ignore_errors=True)
            (self.root / name).mkdir(mode=0o700)
        (self.root / "files").mkdir(mode=0o700, exist_ok=True)
        for folder in (self.root / "files").iterdir():
            self._read(folder)

    def _read(self, folder: Path) -> None:
        """Take up a file of an earlier run; what is not whole is erased."""
        try:
            stored = StoredFile(**json.loads((folder / _META).read_text()))
            if stored.id != folder.name or not _ID.match(stored.id) or not (folder / stored.name).exists():
                raise ValueError("not as it was written")
        except (OSError, ValueError, TypeError):
            logger.warning("a damaged entry of the store was erased")
            shutil.rmtree(folder, ignore_errors=True)
            return
        self._files[stored.id] = stored

    @property
    def byte_count(self) -> int:
        """Bytes of all files."""
        with self._lock:
            return sum(stored.byte_count for stored in self._files.values())

    @contextmanager
    def incoming(self) -> Iterator[Path]:
        """Give a folder to write to; what is left in it afterwards is erased."""
        folder = self.root / "incoming" / secrets.token_hex(16)
        with room_checked():
            folder.mkdir(mode=0o700)
        try:
            with room_checked():
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def add(
        self,
        content: Path,
        kind: Kind,
        filename: str,
        owner: str,
        purpose: str = "user_data",
        details: dict[str, Any] | None = None,
    ) -> StoredFile:
        """Move a file or folder of :meth:`incoming` into the store.

        Args:
            content: the file or folder; its parent folder becomes the file's folder and holds nothing else.
            kind: what it is.
            filename: what the client calls it.
            owner: who may read it.
            purpose: as in OpenAI's API.
            details: see :class:`StoredFile`.

        Raises:
            ApiError: if the store is full.
        """
        paths = [content, *content.rglob("*")] if content.is_dir() else [content]
        size = sum(path.stat().st_size for path in paths if path.is_file())
        if self.byte_count + size > self.max_bytes:
            raise ApiError(
                507, "the store of the server is full; erase files or try again later", "insufficient_storage"
            )
        now = self.clock()
        stored = StoredFile(
            f"file-{secrets.token_hex(16)}",
            kind,
            content.name,
            clean_name(filename),
            owner,
            size,
            now,
            now + self.seconds,
            purpose,
            details or {},
        )
        with room_checked():
            (content.parent / _META).write_text(json.dumps(asdict(stored)))
            content.parent.rename(self._folder(stored.id))
        with self._lock:
            self._files[stored.id] = stored
        return stored

    def add_result(self, path: Path, owner: str, details: dict[str, Any] | None = None) -> StoredFile:
        """Put a file that an expert wrote into the store; it takes no further room on disk."""
        with self.incoming() as folder:
            os.link(path, folder / path.name)
            return self.add(folder / path.name, "result", path.name, owner, "assistants_output", details)

    def get(self, file_id: str, owner: str) -> StoredFile:
        """Return a file.

        Raises:
            ApiError: if there is none with this id for this owner, or its time is over.
        """
        with self._lock:
            stored = self._files.get(file_id)
        if stored is None or stored.owner != owner or stored.expires_at <= self.clock():
            raise ApiError(404, f"there is no file {file_id[:60]!r}; it was erased or never uploaded", "file_not_found")
        return stored

    def path(self, stored: StoredFile) -> Path:
        """Return where a file, or the folder of an archive, lies."""
        return self._folder(stored.id) / stored.name

    def _folder(self, file_id: str) -> Path:
        if not _ID.match(file_id):
            raise UserError(f"{file_id[:60]!r} is no file id")
        return self.root / "files" / file_id

    def delete(self, file_id: str, owner: str) -> None:
        """Erase a file; see :meth:`get` for what is raised."""
        self._erase(self.get(file_id, owner).id)
        forget_volumes()

    def _erase(self, file_id: str) -> None:
        with self._lock:
            self._files.pop(file_id, None)
        shutil.rmtree(self._folder(file_id), ignore_errors=True)

    def new_folder(self) -> Path:
        """Make a working folder for a conversation."""
        folder = self.root / "conversations" / secrets.token_hex(16)
        with room_checked():
            folder.mkdir(mode=0o700)
        with self._lock:
            self._folders[folder] = self.clock()
        return folder

    def drop_folder(self, folder: Path) -> None:
        """Erase a working folder."""
        with self._lock:
            self._folders.pop(folder, None)
        shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> int:
        """Erase everything whose time is over; return how many files that were."""
        now = self.clock()
        with self._lock:
            old = [stored.id for stored in self._files.values() if stored.expires_at <= now]
            # A conversation may begin at the end of its file's time.
            folders = [folder for folder, made in self._folders.items() if made + 2 * self.seconds <= now]
        for file_id in old:
            self._erase(file_id)
        for folder in folders:
            self.drop_folder(folder)
        if old:
            forget_volumes()
        return len(old)


def clean_name(filename: str) -> str:
    """Return a client's file name without folders and characters that a shell, header or page could misread."""
    last = re.split(r"[\\/]", filename)[-1]
    kept = re.sub(r"[^\w .()+-]", "_", last, flags=re.ASCII).strip(" .")
    return kept[-_LONGEST_NAME:] or "file"
