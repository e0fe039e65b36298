"""What the user gave: which image it is, how sure that is, and the pictures that the VLM sees of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom

from . import slices
from .errors import UserError, near_match_hint
from .volumes import (
    RADIOGRAPH_SUFFIXES,
    VOLUME_SUFFIXES,
    check_file,
    dicom_files,
    has_suffix,
    is_dicom,
    load_picture,
    load_radiograph,
    load_volume,
)

MODALITIES = ("CT", "MRI", "CXR")
SEQUENCES = ("t1c", "t1", "t2", "flair")
# Whole words of a file name; t1c before t1, because a T1Gd file is no plain T1.
_SEQUENCE_WORDS = {
    "t1c": ("t1c", "t1ce", "t1gd"),
    "t1": ("t1n", "t1"),
    "t2": ("t2w", "t2"),
    "flair": ("t2f", "flair"),
}
_SPOKEN_SEQUENCES = {"t1c": "T1c", "t1": "T1", "t2": "T2", "flair": "FLAIR"}
_DICOM_MODALITIES = {"CT": "CT", "MR": "MRI", "CR": "CXR", "DX": "CXR", "DR": "CXR", "RG": "CXR"}


@dataclass(frozen=True)
class Study:
    """One study: images of one modality of one patient.

    Args:
        modality: ``CT``, ``MRI``, ``CXR`` or ``unknown``.
        paths: image files or DICOM folders; four in the order T1c, T1, T2, FLAIR for a brain MRI.
        source: where the modality comes from: ``user``, ``DICOM`` or ``intensities``.
        notes: sentences for the user about what was assumed.
        sequence_order: the MRI sequences in the order of ``paths``, or of the channels of one 4-D file.
    """

    modality: str
    paths: tuple[Path, ...]
    source: str
    notes: tuple[str, ...] = field(default=())
    sequence_order: tuple[str, ...] = SEQUENCES

    @property
    def is_planar(self) -> bool:
        """Whether the study is one 2-D picture without slices."""
        return not is_volume(self.paths[0])

    @property
    def has_brain_sequences(self) -> bool:
        """Whether all four sequences of a brain tumour MRI are there."""
        return self.modality == "MRI" and (len(self.paths) == 4 or _channel_count(self.paths[0]) == 4)

    @property
    def opening_form(self) -> str:
        """The name of the user turn's form in :func:`vila_m3_common.prompts.opening`."""
        if self.modality == "MRI":
            return "MRI" if self.has_brain_sequences else "single MRI"
        return self.modality

    @property
    def fingerprint(self) -> tuple[str, ...]:
        """Identity of the images, for reusing earlier expert results."""
        stamps = tuple(f"{path.resolve()}:{path.stat().st_mtime_ns}" for path in self.paths)
        return (*stamps, *self.sequence_order)


def is_volume(path: Path) -> bool:
    """Return whether the path is a volume: a folder of slices, or a file with a volume's suffix."""
    return path.is_dir() or has_suffix(path, VOLUME_SUFFIXES)


def _channel_count(path: Path) -> int:
    if not is_volume(path):
        return 1
    array = load_volume(path).array
    return array.shape[3] if array.ndim == 4 else 1


def check_sequence_order(sequence_order: Sequence[str] | None) -> tuple[str, ...]:
    """Return the order as a tuple of all four sequences, the standard one for None.

    Raises:
        UserError: if a sequence is missing, twice, or unknown.
    """
    order = SEQUENCES if sequence_order is None else tuple(sequence_order)
    if sorted(order) != sorted(SEQUENCES):
        raise UserError(f"sequence_order {list(order)} is not usable; give each of {', '.join(SEQUENCES)} once")
    return order


def open_study(
    image: str | Path | Sequence[str | Path],
    modality: str | None = None,
    sequence_order: Sequence[str] | None = None,
) -> Study:
    """Find out what ``image`` is and check that it can be used.

    Args:
        image: a file; a DICOM series folder; for brain MRI a list of four files, a folder in which
            they are found by name, or one 4-D NIfTI.
        modality: ``CT``, ``MRI`` or ``CXR`` to overrule what tags and intensities say.
        sequence_order: of the channels of a 4-D file, or of four files whose names do not tell; None means
            T1c, T1, T2, FLAIR.

    Raises:
        UserError: with what was given, what is allowed and what to do.
    """
    if modality is not None and modality not in MODALITIES:
        hint = near_match_hint(modality.upper(), MODALITIES)
        raise UserError(f"unknown modality {modality!r}; {hint}allowed: {', '.join(MODALITIES)}")
    study = _open(image, modality, check_sequence_order(sequence_order))
    if sequence_order is not None and not study.has_brain_sequences:
        raise UserError(
            f"sequence_order {list(sequence_order)} was given for an image without four MRI sequences; leave it out"
        )
    return study


def _open(image: str | Path | Sequence[str | Path], modality: str | None, order: tuple[str, ...]) -> Study:
    if not isinstance(image, (str, Path)):
        return _open_sequences([Path(path) for path in image], modality, order)
    path = Path(image)
    check_file(path)
    if path.is_dir() and not dicom_files(path):
        return _open_sequences(_volume_files(path), modality, order)
    if path.is_dir() or has_suffix(path, VOLUME_SUFFIXES):
        return _open_volume(path, modality, order)
    return _open_planar(path, modality)


def _volume_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.iterdir() if has_suffix(path, VOLUME_SUFFIXES))
    if not files:
        raise UserError(f"folder {folder.name} holds neither DICOM slices nor volumes ({', '.join(VOLUME_SUFFIXES)})")
    return files


def match_sequences(paths: Sequence[Path]) -> dict[str, Path]:
    """Assign files to MRI sequences by the words of their names (t1c/t1ce/t1gd, t1/t1n, t2/t2w, flair/t2f)."""
    found: dict[str, Path] = {}
    for path in paths:
        words = set(re.split(r"[^a-z0-9]+", path.name.lower()))
        for sequence in SEQUENCES:
            if words & set(_SEQUENCE_WORDS[sequence]):
                if sequence in found:
                    raise UserError(f"two files look like {sequence}: {found[sequence].name} and {path.name}; keep one")
                found[sequence] = path
                break
    return found


def _open_sequences(paths: Sequence[Path], modality: str | None, order: tuple[str, ...]) -> Study:
    for path in paths:
        check_file(path)
    if modality not in (None, "MRI"):
        raise UserError(f"{len(paths)} files were given as {modality}; several files are only read as MRI sequences")
    found = match_sequences(paths)
    missing = [sequence for sequence in SEQUENCES if sequence not in found]
    notes: tuple[str, ...] = ()
    if missing and len(paths) == 4 and not found:
        ordered = list(paths)
        listed = ", ".join(_SPOKEN_SEQUENCES[sequence] for sequence in order)
        notes = (f"The file names do not tell the sequences; they were taken in the order {listed}.",)
    elif missing:
        raise UserError(
            f"{len(found)} of 4 MRI sequences found ({', '.join(found) or 'none'}), missing: {', '.join(missing)}. "
            "Give four files named with t1c/t1ce/t1gd, t1/t1n, t2/t2w, flair/t2f, or one 4-D NIfTI"
        )
    else:
        ordered, order = [found[sequence] for sequence in SEQUENCES], SEQUENCES
    shapes = {path.name: _ras_shape(path) for path in ordered}
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(f"the MRI sequences have different shapes: {listed}; register and resample them to one grid")
    return Study("MRI", tuple(ordered), "user" if modality else "sequences", notes, order)


def _ras_shape(path: Path) -> tuple[int, ...]:
    """Return the shape that sequences of one grid share, whatever axes each of them is stored along."""
    volume = load_volume(path)
    return slices.to_ras(volume.array, volume.affine).shape


def _open_volume(path: Path, modality: str | None, order: tuple[str, ...]) -> Study:
    if modality == "CXR":
        raise UserError(f"{path.name} is a volume, a CXR is 2-D; give a PNG, JPEG or DICOM file")
    array = load_volume(path).array
    if array.ndim == 4:
        return _open_four_d(path, array.shape, modality, order)
    if modality:
        return Study(modality, (path,), "user")
    tagged = _dicom_modality(dicom_files(path)[0]) if path.is_dir() else None
    if tagged:
        return Study(tagged, (path,), "DICOM")
    return _guess_volume(path, array)


def _open_four_d(path: Path, shape: tuple[int, ...], modality: str | None, order: tuple[str, ...]) -> Study:
    if modality not in (None, "MRI") or shape[3] != 4:
        raise UserError(
            f"{path.name} is 4-D {shape}; read are 3-D volumes, "
            "and 4-D ones with the 4 MRI sequences T1c, T1, T2, FLAIR"
        )
    return Study("MRI", (path,), "user" if modality else "sequences", sequence_order=order)


def _dicom_modality(path: Path) -> str | None:
    dataset = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["Modality"])
    return _DICOM_MODALITIES.get(str(dataset.get("Modality", "")))


def _guess_volume(path: Path, array: np.ndarray) -> Study:
    """CT holds air near -1000 HU; MRI has no negative tail. Between the two nothing is claimed."""
    low, high = (float(value) for value in np.percentile(array[::2, ::2, ::2], (0.5, 99.5)))
    if low <= -500:
        return Study("CT", (path,), "intensities")
    if low >= -0.25 * high:
        note = (
            "No DICOM tag names the modality; the intensities are not HU, so it was taken as MRI "
            "(--modality overrules)."
        )
        return Study("MRI", (path,), "intensities", (note,))
    note = "Neither tags nor intensities tell whether this is CT or MRI; say so with --modality CT or --modality MRI."
    return Study("unknown", (path,), "intensities", (note,))


def _open_planar(path: Path, modality: str | None) -> Study:
    if modality in ("CT", "MRI"):
        raise UserError(
            f"{path.name} is 2-D; {modality} is read as a volume ({', '.join(VOLUME_SUFFIXES)}, DICOM folder)"
        )
    if is_dicom(path):
        tagged = _dicom_modality(path)
        if tagged in ("CT", "MRI") and modality is None:
            raise UserError(f"{path.name} is a single {tagged} slice; give the folder with the whole series")
        load_radiograph(path)
        return Study("CXR" if modality or tagged else "unknown", (path,), "user" if modality else "DICOM")
    if not has_suffix(path, RADIOGRAPH_SUFFIXES):
        allowed = ", ".join(VOLUME_SUFFIXES + RADIOGRAPH_SUFFIXES)
        raise UserError(f"{path.name} is no image this program reads; allowed: {allowed} and DICOM")
    grey = load_radiograph(path)
    if modality:
        return Study(modality, (path,), "user")
    return _guess_picture(path, grey)


def _guess_picture(path: Path, grey: np.ndarray) -> Study:
    """A radiograph is grey and fills its frame; CT and MRI slices lie on black, photographs have colour."""
    rgb = load_picture(path).astype(np.int16)
    has_color = float(np.abs(rgb - rgb[..., :1]).max()) > 24
    black_fraction = float((grey < 13).mean())
    if not has_color and black_fraction < 0.3:
        note = (
            "A picture carries no tags; grey and filling the frame, it was taken as a chest X-ray "
            "(--modality overrules)."
        )
        return Study("CXR", (path,), "intensities", (note,))
    note = "The picture does not tell its modality; if it is a chest X-ray, say so with --modality CXR."
    return Study("unknown", (path,), "intensities", (note,))


def render_images(
    study: Study, slice_index: int | None = None, axis: int = 2, t1c_only: bool = False
) -> tuple[list[np.ndarray], int | None]:
    """Make the pictures of the opening turn.

    Args:
        study: from :func:`open_study`.
        slice_index: RAS index along ``axis``; None takes the middle.
        axis: 0 sagittal, 1 coronal, 2 axial.
        t1c_only: show T1c in all four places, as the reference's slice export did by mistake.

    Returns:
        RGB images ``(H, W, 3)`` uint8, four for a brain MRI and one otherwise, and the slice index
        (None for 2-D images).
    """
    if study.is_planar:
        if slice_index is not None:
            raise UserError(f"slice_index {slice_index} was given for a 2-D image; leave it out")
        if study.modality == "CXR":
            return [slices.grey_to_rgb(load_radiograph(study.paths[0]).astype(np.uint8))], None
        return [load_picture(study.paths[0])], None
    channels = ras_channels(study)
    index = slices.check_slice(channels[0].shape, slice_index, axis)
    if t1c_only:
        channels = channels[:1] * len(channels)
    return [_render_slice(channel, index, axis, study.modality) for channel in channels], index


def ras_channels(study: Study) -> list[np.ndarray]:
    """Return the study's volumes, each ``(X, Y, Z)`` in RAS order; views of the cached arrays.

    Four MRI sequences come as T1c, T1, T2, FLAIR, however they are stored.
    """
    channels = []
    for path in study.paths:
        volume = load_volume(path)
        ras = slices.to_ras(volume.array, volume.affine)
        channels.extend([ras] if ras.ndim == 3 else [ras[..., channel] for channel in range(ras.shape[3])])
    if study.has_brain_sequences:
        return [channels[study.sequence_order.index(sequence)] for sequence in SEQUENCES]
    return channels


def _render_slice(channel: np.ndarray, index: int, axis: int, modality: str) -> np.ndarray:
    plane = slices.take_slice(channel, index, axis)
    if modality == "CT":
        return slices.grey_to_rgb(slices.window_ct(plane))
    return slices.grey_to_rgb(slices.scale_min_max(plane, float(channel.min()), float(channel.max())))
