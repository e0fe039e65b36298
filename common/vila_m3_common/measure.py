"""Measurements from a label map: volume, lesions, diameters in mm, mean HU, side; all from the affine.

Positions and distances come from the whole affine, so oblique, anisotropic and sheared volumes are measured in
the patient's space. "In-plane" means the plane of the stored slices that lies nearest to the anatomical one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist, squareform

from .slices import AXIS_NAMES, to_ras

# Components below this volume are counted as noise, not as lesions (about a 4 mm sphere).
MIN_LESION_ML = 0.03
# A structure lies on one side when at most this part of it lies beyond the midline.
MAX_BEYOND_MIDLINE = 0.1
# Diameters are taken of at most this many lesions, the largest first.
MAX_MEASURED_LESIONS = 10
_TOUCHING = np.ones((3, 3, 3))


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume in RAS axis order lie.

    Args:
        affine: ``(4, 4)``, voxel index in RAS axis order to RAS position in mm.
    """

    affine: np.ndarray

    @classmethod
    def of(cls, shape: tuple[int, ...], affine: np.ndarray) -> Grid:
        """Return the grid of what :func:`vila_m3_common.slices.to_ras` makes of an array of ``shape``."""
        change = ornt_transform(io_orientation(affine), axcodes2ornt(("R", "A", "S")))
        return cls(affine @ inv_ornt_aff(change, shape[:3]))

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000

    def right_of(self, box: tuple[slice, ...]) -> np.ndarray:
        """Return how far right the voxels of a box lie: the RAS coordinate x in mm, shape of the box."""
        steps = self.affine[0, :3]
        i, j, k = (np.arange(part.start, part.stop) * step for part, step in zip(box, steps, strict=True))
        return i[:, None, None] + j[None, :, None] + k[None, None, :] + self.affine[0, 3]

    def plane_coordinates(self, axis: int) -> np.ndarray:
        """Return ``(2, 2)``: pixel index in a slice along ``axis`` to mm along two perpendicular directions."""
        columns = [other for other in range(3) if other != axis]
        return np.linalg.qr(self.affine[:3, columns])[1]


@dataclass(frozen=True)
class Diameters:
    """The longest diameter of one lesion in one slice, and the longest at right angles to it, in mm."""

    longest: float
    perpendicular: float
    slice_index: int


def measure_labels(
    labels: np.ndarray,
    affine: np.ndarray,
    names: Mapping[int, str],
    image: np.ndarray | None = None,
    axis: int = 2,
    midline: float | None = None,
) -> list[dict[str, Any]]:
    """Measure every named label that is present.

    Args:
        labels: ``(X, Y, Z)`` integer label ids as stored.
        affine: ``(4, 4)``, voxel index to RAS position in mm.
        names: label id -> structure name.
        image: ``(X, Y, Z)`` HU of a CT for the mean; None leaves it out.
        axis: RAS axis of the slices in which area and diameters are taken.
        midline: RAS x in mm of the plane between left and right, see :func:`find_midline`; None leaves
            the side out.

    Returns:
        One mapping per label: ``name``, ``label``, ``volume_ml``, ``component_count`` (connected lesions),
        ``longest_diameter_mm`` and ``perpendicular_diameter_mm`` in slice ``diameter_slice``,
        ``largest_slice`` (where the structure's area is largest), ``slice_axis``, with an image ``mean_hu``,
        with a midline ``side`` (``left``, ``right`` or ``both``). Slices are RAS indices along ``axis``.
    """
    ras, grid = to_ras(labels, affine), Grid.of(labels.shape, affine)
    ras_image = None if image is None else to_ras(image, affine)
    boxes = ndimage.find_objects(ras)
    rows = []
    for label, name in sorted(names.items()):
        if label < 1 or label > len(boxes) or boxes[label - 1] is None:
            continue
        box = boxes[label - 1]
        mask = ras[box] == label
        row = _measure_mask(mask, grid, box[axis].start, axis)
        if ras_image is not None:
            row["mean_hu"] = round(float(ras_image[box][mask].mean()), 1)
        if midline is not None:
            row["side"] = side_of(mask, grid.right_of(box), midline)
        rows.append({"name": name, "label": int(label), **row})
    return rows


def _measure_mask(mask: np.ndarray, grid: Grid, first_slice: int, axis: int) -> dict[str, Any]:
    lesions, lesion_ids = find_lesions(mask, grid.voxel_ml)
    measured = [_lesion_diameters(lesions, lesion, grid, axis) for lesion in lesion_ids[:MAX_MEASURED_LESIONS]]
    largest = max(measured, key=lambda diameters: diameters.longest)
    return {
        "volume_ml": round(float(mask.sum()) * grid.voxel_ml, 3),
        "component_count": len(lesion_ids),
        "longest_diameter_mm": round(largest.longest, 1),
        "perpendicular_diameter_mm": round(largest.perpendicular, 1),
        "diameter_slice": first_slice + largest.slice_index,
        "largest_slice": first_slice + largest_slice(mask, axis),
        "slice_axis": AXIS_NAMES[axis],
    }


def find_lesions(mask: np.ndarray, voxel_ml: float) -> tuple[np.ndarray, list[int]]:
    """Find the lesions of a mask: 26-connected components of at least ``MIN_LESION_ML``.

    Args:
        mask: ``(X, Y, Z)`` boolean.
        voxel_ml: volume of a voxel in mL.

    Returns:
        ``(X, Y, Z)`` component ids, and the ids of the lesions, the largest first. A mask in which every
        component is smaller has one lesion, the largest of them; an empty mask has none.
    """
    components, _ = ndimage.label(mask, structure=_TOUCHING)
    sizes = np.bincount(components.ravel())[1:]
    order = np.argsort(-sizes, kind="stable")
    large = [int(index) + 1 for index in order if sizes[index] * voxel_ml >= MIN_LESION_ML]
    return components, large or [int(index) + 1 for index in order[:1]]


def largest_slice(mask: np.ndarray, axis: int = 2) -> int:
    """Return the index along ``axis`` at which a mask ``(X, Y, Z)`` has most voxels."""
    return int(mask.sum(axis=tuple(other for other in range(3) if other != axis)).argmax())


def _lesion_diameters(lesions: np.ndarray, lesion: int, grid: Grid, axis: int) -> Diameters:
    """Measure a lesion in the slice where its area is largest."""
    mask = lesions == lesion
    index = largest_slice(mask, axis)
    longest, perpendicular = plane_diameters(np.take(mask, index, axis=axis), grid.plane_coordinates(axis))
    return Diameters(longest, perpendicular, index)


def plane_diameters(mask: np.ndarray, to_mm: np.ndarray) -> tuple[float, float]:
    """Measure a 2-D mask the way lesions are measured in reading: longest diameter and its perpendicular.

    Distances run between the middles of the outer pixel edges, so that a single pixel measures its own size. On
    random ellipses of 3 to 25 voxels' radius both errors stayed below one voxel (half a voxel on average).

    Args:
        mask: ``(H, W)`` boolean, not empty.
        to_mm: ``(2, 2)``, pixel index to mm along two perpendicular directions.

    Returns:
        Longest diameter, and the longest extent at right angles to it, in mm.
    """
    outline = _outline(mask) @ to_mm.T
    corners = outline
    with contextlib.suppress(QhullError):  # all points on one line: every pair is compared
        corners = outline[ConvexHull(outline).vertices]
    distances = squareform(pdist(corners))
    start, end = np.unravel_index(distances.argmax(), distances.shape)
    longest = float(distances[start, end])
    direction = (corners[end] - corners[start]) / longest
    return longest, _widest_strip(outline, direction, float(np.linalg.norm(to_mm, axis=0).max()))


def _outline(mask: np.ndarray) -> np.ndarray:
    """Return ``(N, 2)``, the middles of the pixel edges between inside and outside, in pixels."""
    padded = np.pad(mask, 1)
    points = []
    for axis in (0, 1):
        for step in (-1, 1):
            edge = np.argwhere(padded & ~np.roll(padded, -step, axis)) - 1.0
            edge[:, axis] += step / 2
            points.append(edge)
    return np.concatenate(points)


def _widest_strip(points: np.ndarray, direction: np.ndarray, width: float) -> float:
    """Cut the outline into strips across ``direction`` and return the length of the longest one."""
    along, across = points @ direction, points @ np.array([-direction[1], direction[0]])
    strips = np.floor((along - along.min()) / width).astype(int)
    highest, lowest = np.full(strips.max() + 1, -np.inf), np.full(strips.max() + 1, np.inf)
    np.maximum.at(highest, strips, across)
    np.minimum.at(lowest, strips, across)
    return float((highest - lowest).max())


def find_midline(image: np.ndarray, affine: np.ndarray) -> float:
    """Find the plane between left and right: the middle of head or body along x.

    Body is what is brighter than a quarter of the range of intensities above the darkest (about -700 HU on a
    CT). Of every line from left to right the middle of its body is taken, and of these the median, which arms
    or a table move little.

    Args:
        image: ``(X, Y, Z)`` CT or MRI.
        affine: ``(4, 4)``, voxel index to RAS position in mm.

    Returns:
        RAS x in mm.
    """
    ras, grid = to_ras(image, affine), Grid.of(image.shape, affine)
    stride = 4 if min(ras.shape) >= 64 else 1  # lines lie close together; every fourth tells enough
    low, high = np.percentile(ras[::stride, ::stride, ::stride], (1, 99))
    body = ras[:, ::stride, ::stride] > low + 0.25 * (high - low)
    lines = np.argwhere(body.any(axis=0)) * stride
    if not len(lines):
        return float((grid.affine @ [*((size - 1) / 2 for size in ras.shape), 1])[0])
    filled = body[:, lines[:, 0] // stride, lines[:, 1] // stride]
    middles = (filled.argmax(axis=0) + len(ras) - 1 - filled[::-1].argmax(axis=0)) / 2
    steps = grid.affine[0]
    return float(np.median(middles * steps[0] + lines @ steps[1:3] + steps[3]))


def side_of(mask: np.ndarray, right_mm: np.ndarray, midline: float) -> str:
    """Return the patient's side of a structure: ``left``, ``right``, or ``both`` when it crosses the midline.

    Args:
        mask: ``(X, Y, Z)`` boolean, not empty.
        right_mm: ``(X, Y, Z)`` RAS x of its voxels in mm.
        midline: RAS x of the plane between the sides.
    """
    right = float((right_mm[mask] > midline).mean())
    if right >= 1 - MAX_BEYOND_MIDLINE:
        return "right"
    return "left" if right <= MAX_BEYOND_MIDLINE else "both"
