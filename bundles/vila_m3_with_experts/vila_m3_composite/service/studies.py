"""What the page looks at: studies made of uploaded files, their slices, and the label maps of experts over them."""

from __future__ import annotations

import dataclasses
import io
import secrets
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from vila_m3_common import slices
from vila_m3_common.errors import UserError
from vila_m3_common.study import SEQUENCES, Study, ras_channels, render_images
from vila_m3_common.volumes import load_volume

from .conversations import SessionBuilder
from .errors import ApiError
from .store import FileStore

_MAX_STUDIES = 128


@dataclasses.dataclass(frozen=True)
class OpenedStudy:
    """A study that somebody looks at; ``file_ids`` are what it is made of."""

    study: Study
    owner: str
    file_ids: tuple[str, ...]


class Viewer:
    """Opens studies and draws their slices.

    Args:
        builder: finds the files.
        store: the files.
    """

    def __init__(self, builder: SessionBuilder, store: FileStore) -> None:
        self._builder, self._store = builder, store
        self._lock = threading.Lock()
        self._opened: OrderedDict[str, OpenedStudy] = OrderedDict()

    def open(self, file_ids: Sequence[str], modality: str | None, owner: str) -> dict[str, Any]:
        """Open uploaded files as one study.

        Returns:
            Its id and everything that is needed to show it.

        Raises:
            ApiError, UserError: if the files cannot be used together.
        """
        folder = self._store.new_folder()
        try:
            study = self._builder.open_files(file_ids, modality, owner, folder)
        except BaseException:
            self._store.drop_folder(folder)
            raise
        if not any(path.is_relative_to(folder) for path in study.paths):
            self._store.drop_folder(folder)
        study_id = f"study-{secrets.token_hex(16)}"
        described = {"id": study_id, "object": "study", "files": list(file_ids), **describe(study)}
        with self._lock:
            self._opened[study_id] = OpenedStudy(study, owner, tuple(file_ids))
            while len(self._opened) > _MAX_STUDIES:
                self._opened.popitem(last=False)
        return described

    def get(self, study_id: str, owner: str) -> OpenedStudy:
        """Return an opened study whose files are still there.

        Raises:
            ApiError: if there is none with this id for this owner.
        """
        with self._lock:
            opened = self._opened.get(study_id)
        if opened is None or opened.owner != owner:
            raise ApiError(
                404, f"there is no study {study_id[:60]!r}; open it again with POST /v1/studies", "not_found"
            )
        for file_id in opened.file_ids:
            self._store.get(file_id, owner)
        return opened

    def draw(
        self, study_id: str, owner: str, axis: int, index: int, window: tuple[float, float] | None, sequence: int
    ) -> bytes:
        """Draw one slice as PNG.

        Args:
            study_id: of an opened study.
            owner: who asks.
            axis: 0 sagittal, 1 coronal, 2 axial; of a picture it does not matter.
            index: of the slice, in RAS order.
            window: centre and width in the units of the image; None is what the VLM sees.
            sequence: which of the MRI sequences.
        """
        study = self.get(study_id, owner).study
        if study.is_planar:
            return _png(Image.fromarray(render_images(study)[0][0]))
        channels = ras_channels(study)
        if not 0 <= sequence < len(channels):
            raise UserError(f"sequence {sequence} does not exist; there are 0..{len(channels) - 1}")
        channel = channels[sequence]
        slices.check_slice(channel.shape, index, axis)
        plane = slices.take_slice(channel, index, axis)
        return _png(Image.fromarray(_grey(plane, channel, study.modality, window)))

    def draw_labels(self, file_id: str, owner: str, axis: int, index: int) -> bytes:
        """Draw one slice of an expert's label map as PNG, transparent where there is no label."""
        stored = self._store.get(file_id, owner)
        rows = stored.details.get("labels")
        if not rows or not stored.name.endswith(".nii.gz"):
            raise ApiError(400, f"the file {file_id} is no label map of an expert", "invalid_value", "file_id")
        volume = load_volume(self._store.path(stored))
        ras = slices.to_ras(volume.array, volume.affine)
        slices.check_slice(ras.shape, index, axis)
        plane = slices.take_slice(ras, index, axis)
        picture = np.zeros((*plane.shape, 4), np.uint8)
        for row in rows:
            picture[plane == row["label"]] = [*bytes.fromhex(row["rgb"][1:]), 255]
        return _png(Image.fromarray(picture))


def describe(study: Study) -> dict[str, Any]:
    """Return what is needed to show a study; sizes in pixels of the slices along each axis, spacing in mm."""
    told: dict[str, Any] = {
        "modality": study.modality,
        "source": study.source,
        "notes": list(study.notes),
        "is_planar": study.is_planar,
    }
    if study.is_planar:
        height, width = render_images(study)[0][0].shape[:2]
        return {**told, "shape": [width, height, 1], "spacing": [1.0, 1.0, 1.0], "sequences": [], "range": [0, 255]}
    channels = ras_channels(study)
    first = channels[0]
    low, high = (float(value) for value in np.percentile(first[::2, ::2, ::2], (0.5, 99.5)))
    return {
        **told,
        "shape": list(first.shape),
        "spacing": [round(step, 4) for step in slices.ras_spacing(load_volume(study.paths[0]).affine)],
        "sequences": list(SEQUENCES) if len(channels) == 4 else [],
        "range": [low, high],
    }


def _grey(plane: np.ndarray, channel: np.ndarray, modality: str, window: tuple[float, float] | None) -> np.ndarray:
    if window is not None:
        return slices.window_ct(plane, *window)
    if modality == "CT":
        return slices.window_ct(plane)
    return slices.scale_min_max(plane, float(channel.min()), float(channel.max()))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
