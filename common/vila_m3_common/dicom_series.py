"""Whether the DICOM files of a folder make one volume with evenly spaced, parallel slices.

The reader stacks whatever it finds at one spacing: a missing slice, a tilted gantry or a second time point would
go unnoticed and every position and measurement behind it would be wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom

from .errors import UserError

_TAGS = [
    "SeriesInstanceUID",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "Rows",
    "Columns",
    "NumberOfFrames",
]
# Steps between slices may differ by this share of the usual step; a missing slice doubles one.
STEP_TOLERANCE = 0.1
# Directions may differ by this angle; scanners write 3 to 6 decimals. Half a degree over 300 mm are 2.6 mm.
ANGLE_TOLERANCE_DEG = 0.5


@dataclass(frozen=True)
class Slice:
    """Where one slice lies.

    Args:
        position: centre of its first voxel in DICOM's patient coordinates (to the left, posterior, superior), mm.
        directions: unit vectors along its rows and its columns, ``(2, 3)``.
        grid: rows, columns and the two pixel spacings in mm.
    """

    position: np.ndarray
    directions: np.ndarray
    grid: tuple[float, ...]

    @property
    def normal(self) -> np.ndarray:
        """Unit vector across the slice."""
        return np.cross(self.directions[0], self.directions[1])


def check_series(files: Sequence[Path], folder: str) -> None:
    """Raise a UserError with the reason unless the files are the slices of one volume.

    Args:
        files: DICOM files.
        folder: name for the messages.
    """
    headers = [pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS) for file in files]
    series = {str(header.get("SeriesInstanceUID")) for header in headers}
    if len(series) > 1:
        raise UserError(f"folder {folder} holds {len(series)} DICOM series; put the one to read into its own folder")
    if any(int(header.get("NumberOfFrames") or 1) > 1 for header in headers):
        raise UserError(f"folder {folder} holds a multi-frame DICOM file, which is not read; convert it to NIfTI")
    if len(headers) == 1:
        raise UserError(f"folder {folder} holds a single slice; give the folder with the whole series")
    slices = [_read_slice(header, folder) for header in headers]
    _check_alike(slices, folder)
    _check_positions(slices, folder)


def _read_slice(header: pydicom.Dataset, folder: str) -> Slice:
    position, directions = header.get("ImagePositionPatient"), header.get("ImageOrientationPatient")
    if position is None or directions is None:
        raise UserError(
            f"folder {folder} holds DICOM files without position or orientation of the slice "
            "(ImagePositionPatient, ImageOrientationPatient); give the original images of the scanner"
        )
    spacing = header.get("PixelSpacing") or (0.0, 0.0)
    grid = (float(header.Rows), float(header.Columns), *(round(float(step), 4) for step in spacing))
    return Slice(np.array(position, float), np.array(directions, float).reshape(2, 3), grid)


def _check_alike(slices: Sequence[Slice], folder: str) -> None:
    first = slices[0]
    if len({piece.grid for piece in slices}) > 1:
        raise UserError(
            f"the slices in folder {folder} differ in size or pixel spacing; put the slices of one volume into their "
            "own folder"
        )
    if any(_angle_deg(piece.normal, first.normal) > ANGLE_TOLERANCE_DEG for piece in slices):
        raise UserError(
            f"the slices in folder {folder} are not parallel (a localizer among them?); put those of one volume "
            "into their own folder"
        )


def _check_positions(slices: Sequence[Slice], folder: str) -> None:
    """Refuse repeated positions, a tilted gantry and gaps."""
    normal = slices[0].normal
    ordered = sorted(slices, key=lambda piece: float(piece.position @ normal))
    places = np.array([piece.position @ normal for piece in ordered])
    steps = np.diff(places)
    usual = float(np.median(steps))
    if (steps < STEP_TOLERANCE * usual).any() or usual <= 0:
        raise UserError(
            f"folder {folder} holds several slices at one position (time points or reconstructions?); "
            "put those of one volume into their own folder"
        )
    tilt = _angle_deg(ordered[-1].position - ordered[0].position, normal)
    if tilt > ANGLE_TOLERANCE_DEG:
        raise UserError(
            f"the gantry was tilted: the slices in folder {folder} are shifted against each other by "
            f"{tilt:.1f} degrees, so they make no rectangular volume; resample the series first, for example with "
            "dcm2niix, which corrects the tilt"
        )
    uneven = np.flatnonzero(np.abs(steps - usual) > STEP_TOLERANCE * usual)
    if len(uneven):
        step, start = steps[uneven[0]], places[uneven[0]]
        raise UserError(
            f"slices are missing or unevenly spaced in folder {folder}: after the one at {start:g} mm the next is "
            f"{step:g} mm away, elsewhere {usual:g} mm; give the complete series"
        )


def _angle_deg(first: np.ndarray, second: np.ndarray) -> float:
    """Return the angle between two lines, 0 to 90 degrees."""
    sine = np.linalg.norm(np.cross(first, second))
    return float(np.degrees(np.arctan2(sine, abs(first @ second))))
