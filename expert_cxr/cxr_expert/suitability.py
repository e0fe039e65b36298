"""Simple checks whether a picture is a frontal chest X-ray, upright and with bright bone.

They warn and never refuse: a picture that fails is classified all the same, and the result carries a note.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import torch
from monai.transforms import Compose

from vila_m3_common.volumes import is_dicom

from .transforms import CenterSquareCropd, LoadRadiographd, ResizeSquared

# The mean of standardised frontal chest X-rays; docs/README.md says of which, and how often the checks err.
TEMPLATE_FILE = Path(__file__).with_name("frontal_template.json")
TEMPLATE_SIZE = 16
# The corners show air, arms or black borders, from film to film another; they are left out.
_INNER = (slice(3, None), slice(2, -2))
# Correlation with the mean film below which a picture is named, and by which another orientation must be better.
MIN_AGREEMENT = 0.3
MIN_ADVANTAGE = 0.25
# Share of pixels in the darkest twentieth of the range: slices of CT and MRI lie on black, films fill their frame.
MAX_BLACK_SHARE = 0.3
_BLACK_LEVEL = 255 / 20

_NO_FILM = "the picture does not look like a frontal chest X-ray"

_CHEST_PARTS = ("CHEST", "THORAX", "LUNG", "RIB")
_FRONTAL_VIEWS = ("", "AP", "PA", "APPA", "FRONTAL")
_RADIOGRAPH_MODALITIES = ("", "CR", "DX", "RG", "RF", "OT", "SC")

_load = Compose([LoadRadiographd("image"), CenterSquareCropd("image"), ResizeSquared("image", TEMPLATE_SIZE)])


def find_doubts(path: str | Path) -> list[str]:
    """Return one sentence per reason why a file may be no frontal chest X-ray; none if nothing speaks against it.

    Args:
        path: PNG, JPEG or DICOM file that ``LoadRadiographd`` reads.
    """
    path = Path(path)
    tag_doubts = _doubts_of_tags(path) if is_dicom(path) else []
    return tag_doubts or _doubts_of_picture(read_small(path))


def read_small(path: str | Path) -> np.ndarray:
    """Read a radiograph as ``(16, 16)`` in 0..255."""
    return np.asarray(torch.as_tensor(_load({"image": str(path)})["image"])[0])


def _doubts_of_tags(path: Path) -> list[str]:
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    modality, view, part = (
        str(dataset.get(tag) or "").upper().strip() for tag in ("Modality", "ViewPosition", "BodyPartExamined")
    )
    doubts = []
    if modality not in _RADIOGRAPH_MODALITIES:
        doubts.append(f"the DICOM modality is {modality}, no radiograph")
    if view not in _FRONTAL_VIEWS:
        doubts.append(f"the DICOM view position is {view}, and only frontal views (AP, PA) are understood")
    if part and not any(name in part for name in _CHEST_PARTS):
        doubts.append(f"the DICOM body part is {part}, no chest")
    return doubts


def _doubts_of_picture(picture: np.ndarray) -> list[str]:
    agreement = agree(picture)
    if (picture < _BLACK_LEVEL).mean() > MAX_BLACK_SHARE:
        return [_NO_FILM]
    if agreement >= MIN_AGREEMENT:
        return []
    others = {
        "turned by a quarter to the right": np.rot90(picture),
        "turned by a quarter to the left": np.rot90(picture, -1),
        "upside down": np.rot90(picture, 2),
        "inverted (bone dark)": 255 - picture,
    }
    best = max(others, key=lambda name: agree(others[name]))
    if agree(others[best]) >= max(MIN_AGREEMENT, agreement + MIN_ADVANTAGE):
        return [f"the picture looks {best}"]
    return [_NO_FILM]


def agree(picture: np.ndarray) -> float:
    """Return the correlation of the inner part of ``(16, 16)`` with that of the mean frontal film, -1..1."""
    return float((standardize(picture[_INNER]) * standardize(_template()[_INNER])).mean())


def standardize(picture: np.ndarray) -> np.ndarray:
    """Shift and scale to mean 0 and standard deviation 1."""
    return (picture - picture.mean()) / max(float(picture.std()), 1e-6)


@cache
def _template() -> np.ndarray:
    return np.array(json.loads(TEMPLATE_FILE.read_text()), dtype=np.float64)


def write_template(paths: Sequence[str | Path], target: str | Path = TEMPLATE_FILE) -> Path:
    """Write the mean of the standardised films ``paths`` as JSON, rounded to hundredths."""
    mean = np.mean([standardize(read_small(path)) for path in paths], axis=0)
    rows = ",\n".join(json.dumps([round(float(value), 2) for value in row]) for row in mean)
    Path(target).write_text(f"[\n{rows}\n]\n")
    return Path(target)
