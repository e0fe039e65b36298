"""What the service allows: sizes, numbers and times."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vila_m3_common.errors import UserError, near_match_hint
from vila_m3_common.study import check_sequence_order


@dataclass(frozen=True)
class Limits:
    """Bounds of the service; a request beyond one of them is refused with the bound in the message.

    Args:
        upload_mb: largest file of ``POST /v1/files``, in MiB.
        request_mb: largest body of every other request, in MiB.
        store_mb: of all files together, in MiB.
        image_pixels: of one picture, before it is decoded.
        volume_voxels: of one volume, all channels and frames, before it is decoded.
        archive_files: files in one zip.
        messages: in one conversation.
        message_characters: of the text of one message.
        new_tokens: longest answer; also what a request without ``max_tokens`` gets at most.
        expert_seconds: of one run of an expert.
        request_seconds: of one request, with waiting.
        idle_seconds: between two parts of an upload.
        running: conversations that are worked on at once.
        waiting: conversations that wait beside them; further ones get status 429.
        batch: turns that the VLM answers at once.
        kept_conversations: whose state is kept in memory; the oldest are forgotten first.
        file_minutes: after which files and conversations are erased.
    """

    upload_mb: float = 512
    request_mb: float = 32
    store_mb: float = 8192
    image_pixels: int = 36_000_000
    volume_voxels: int = 300_000_000
    archive_files: int = 4096
    messages: int = 200
    message_characters: int = 16_000
    new_tokens: int = 1024
    expert_seconds: float = 120
    request_seconds: float = 300
    idle_seconds: float = 30
    running: int = 16
    waiting: int = 64
    batch: int = 8
    kept_conversations: int = 256
    file_minutes: float = 24 * 60

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
                raise UserError(f"limit {entry.name} is {value!r}; give a number above 0")

    @classmethod
    def from_config(cls, given: Mapping[str, Any]) -> Limits:
        """Build limits from the configured ones; the others keep their defaults.

        Raises:
            UserError: for a limit that does not exist or is not positive.
        """
        known = [entry.name for entry in fields(cls)]
        for name in given:
            if name not in known:
                raise UserError(f"unknown limit {name!r}; {near_match_hint(name, known)}limits: {', '.join(known)}")
        return cls(**given)


@dataclass(frozen=True)
class Settings:
    """How one service is set up.

    Args:
        data_dir: folder of the files; nothing outside it is read for a client.
        model_id: name of the model in the API.
        limits: see :class:`Limits`.
        api_keys: keys of which a request must show one; without any, every request is served.
        image_urls: beginnings of the web addresses that pictures may be fetched from, ``https://host/``.
        host_names: names under which a browser may reach the service; without any, every name.
        sequence_order: of the channels of 4-D brain MRIs, and of four files whose names do not tell; None is the usual
            one. Other images do not care.
    """

    data_dir: Path
    model_id: str = "vila-m3-nano"
    limits: Limits = field(default_factory=Limits)
    api_keys: tuple[str, ...] = ()
    image_urls: tuple[str, ...] = ()
    host_names: tuple[str, ...] = ()
    sequence_order: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_sequence_order(self.sequence_order)
        for url in self.image_urls:
            if not url.startswith(("http://", "https://")) or url.count("/") < 3:
                raise UserError(f"image_urls holds {url!r}; give the beginning of an address, such as https://host/")
        if any(len(key) < 16 for key in self.api_keys):
            raise UserError("an API key has fewer than 16 characters; give longer ones")
