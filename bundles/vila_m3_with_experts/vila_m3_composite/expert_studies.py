"""Studies seen through an expert: what it found, run once for each argument, and the slices that are exported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage

from vila_m3_common.errors import UserError, find_user_error
from vila_m3_common.expert import ExpertRequest, ExpertResult
from vila_m3_common.hooks import BundleExpert
from vila_m3_common.overlay import assign_colors, blend
from vila_m3_common.slices import ras_spacing, take_slice, to_ras
from vila_m3_common.volumes import load_volume

AXIS = 2  # axial, as in the reference
# The reference exports the slice through the centre of each part that is larger than 1 mL.
SMALLEST_PART_ML = 1.0
_TOUCHING_2D = np.ones((3, 3))
_TOUCHING_3D = np.ones((3, 3, 3))


def run_expert(expert: BundleExpert, paths: Sequence[str], work: Path, argument: str) -> ExpertResult:
    """Run an expert on a study; its files go to ``work``.

    Raises:
        UserError: if it fails.
    """
    try:
        result = expert.run(ExpertRequest(tuple(paths), argument, None, AXIS, "", str(work), "case"))
    except Exception as error:
        cause = find_user_error(error)
        if cause is None:
            raise
        raise cause from error
    if result.is_error:
        raise UserError(f"the expert failed: {result.text}")
    return result


def ras_volume(path: str) -> np.ndarray:
    """Read a volume, ``(X, Y, Z)`` in RAS order."""
    volume = load_volume(path)
    return to_ras(volume.array, volume.affine)


def study_digest(paths: Sequence[str]) -> str:
    """Return what tells a study apart without naming it."""
    return hashlib.blake2b("\n".join(paths).encode(errors="replace"), digest_size=8).hexdigest()


@dataclass
class Segmentation:
    """A label map of a study.

    Args:
        labels: ``(X, Y, Z)`` in RAS order.
        names: label id -> structure.
        voxel_ml: volume of a voxel.
    """

    labels: np.ndarray
    names: Mapping[int, str]
    voxel_ml: float

    def present(self, index: int) -> list[int]:
        """Return the label ids of an axial slice."""
        return [int(label) for label in np.unique(self.labels[:, :, index]) if label]

    def legend(self, index: int) -> list[tuple[str, str]]:
        """Return (colour, structure) of a slice, in the order of the ids."""
        colors = assign_colors(self.present(index))
        return [(color, self.names[label]) for label, color in colors.items() if label in self.names]

    def overlay(self, grey: np.ndarray, index: int) -> np.ndarray:
        """Lay the labels over a picture of the slice; ``(H, W, 3)`` uint8."""
        return blend(grey, take_slice(self.labels, index), assign_colors(self.present(index)))

    def count_parts(self, index: int, label: int) -> int:
        """Return how many parts of a structure a slice shows; parts that touch at a corner are one."""
        return int(ndimage.label(self.labels[:, :, index] == label, _TOUCHING_2D)[1])


def segment(expert: BundleExpert, paths: Sequence[str], work: Path, argument: str) -> Segmentation:
    """Run a segmenting expert.

    Raises:
        UserError: if it fails or gives no label map.
    """
    result = run_expert(expert, paths, work, argument)
    if result.label_map_path is None:
        raise UserError("the expert gave no label map")
    image = nib.Nifti1Image.from_filename(str(result.label_map_path))
    affine = np.asarray(image.affine)
    labels = to_ras(np.asarray(image.dataobj).astype(np.uint8), affine)
    names = {int(row["label"]): str(row["name"]) for row in result.measurements if "label" in row}
    return Segmentation(labels, names, float(np.prod(ras_spacing(affine))) / 1000)


def spread_slices(found: np.ndarray, count: int) -> list[int]:
    """Cut the slices with something in them, or all when there are none, into pieces; choose one of each.

    Args:
        found: ``(Z,)`` area of what is looked for in each slice.
        count: pieces, at most one for each slice.

    Returns:
        Of each piece, the slice with the largest area; the middle one without any.
    """
    candidates = np.flatnonzero(found) if found.any() else np.arange(len(found))
    pieces = [piece for piece in np.array_split(candidates, min(count, len(candidates))) if len(piece)]
    return [int(piece[np.argmax(found[piece])] if found.any() else piece[len(piece) // 2]) for piece in pieces]


def centre_slices(segmentation: Segmentation) -> list[int]:
    """Return the slices through the centres of all connected parts larger than ``SMALLEST_PART_ML``."""
    chosen: set[int] = set()
    for label, box in enumerate(ndimage.find_objects(segmentation.labels), start=1):
        if box is None:
            continue
        parts, count = ndimage.label(segmentation.labels[box] == label, _TOUCHING_3D)
        sizes = np.bincount(parts.ravel())[1:] * segmentation.voxel_ml
        large = [part for part in range(1, count + 1) if sizes[part - 1] > SMALLEST_PART_ML]
        centres = ndimage.center_of_mass(parts > 0, parts, large) if large else []
        chosen |= {int(centre[2]) + box[2].start for centre in centres}
    return sorted(chosen)


def save_picture(picture: np.ndarray, folder: Path, name: str) -> str:
    """Write a PNG; return its name below the parent of ``folder``, the folder of the data set."""
    Image.fromarray(np.ascontiguousarray(picture)).save(folder / name)
    return f"{folder.name}/{name}"
