"""Measurements from a label map: volume, lesion count, diameters, mean intensity, where it is largest."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from scipy.spatial.distance import pdist

from .slices import AXIS_NAMES, ras_spacing, to_ras

# Components below this volume are counted as noise, not as lesions (about a 4 mm sphere).
MIN_LESION_ML = 0.03


def measure_labels(
    labels: np.ndarray,
    affine: np.ndarray,
    names: Mapping[int, str],
    image: np.ndarray | None = None,
    axis: int = 2,
) -> list[dict[str, Any]]:
    """Measure every named label that is present.

    Args:
        labels: ``(X, Y, Z)`` label ids as stored.
        affine: ``(4, 4)``, voxel index to RAS position in mm.
        names: label id -> structure name.
        image: ``(X, Y, Z)`` intensities (HU for CT) for the mean; None leaves it out.
        axis: RAS axis along which the largest slice and the in-plane diameter are taken.

    Returns:
        One mapping per label: ``name``, ``label``, ``volume_ml``, ``component_count``,
        ``longest_diameter_mm`` (in the largest slice), ``largest_slice`` (RAS index along ``axis``),
        ``slice_axis`` and, with an image, ``mean_intensity``.
    """
    ras = to_ras(labels, affine)
    spacing = ras_spacing(affine)
    voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
    ras_image = None if image is None else to_ras(image, affine)
    boxes = ndimage.find_objects(ras.astype(np.int32))
    rows = []
    for label, name in sorted(names.items()):
        if label < 1 or label > len(boxes) or boxes[label - 1] is None:
            continue
        box = boxes[label - 1]
        mask = ras[box] == label
        row = _measure_mask(mask, spacing, voxel_ml, box[axis].start, axis)
        if ras_image is not None:
            row["mean_intensity"] = round(float(ras_image[box][mask].mean()), 1)
        rows.append({"name": name, "label": int(label), **row})
    return rows


def _measure_mask(
    mask: np.ndarray, spacing: tuple[float, float, float], voxel_ml: float, first_slice: int, axis: int
) -> dict[str, Any]:
    areas = mask.sum(axis=tuple(other for other in range(3) if other != axis))
    offset = int(areas.argmax())
    plane_spacing = [step for other, step in enumerate(spacing) if other != axis]
    return {
        "volume_ml": round(float(mask.sum()) * voxel_ml, 3),
        "component_count": count_components(mask, voxel_ml),
        "longest_diameter_mm": round(longest_diameter(np.take(mask, offset, axis=axis), plane_spacing), 1),
        "largest_slice": first_slice + offset,
        "slice_axis": AXIS_NAMES[axis],
    }


def count_components(mask: np.ndarray, voxel_ml: float) -> int:
    """Count the 26-connected components of at least ``MIN_LESION_ML``; at least 1 for a mask that is not empty."""
    components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    if count == 0:
        return 0
    sizes = np.bincount(components.ravel())[1:] * voxel_ml
    return max(1, int((sizes >= MIN_LESION_ML).sum()))


def longest_diameter(mask: np.ndarray, spacing: list[float]) -> float:
    """Return the longest distance between two pixel centres of a 2-D mask, in mm, plus one pixel.

    The added pixel (mean of the two spacings) makes a single pixel measure its own size.
    """
    points = np.argwhere(mask) * np.asarray(spacing)
    if len(points) > 3:
        with contextlib.suppress(QhullError):  # all points on one line: every pair is compared
            points = points[ConvexHull(points).vertices]
    longest = float(pdist(points).max()) if len(points) > 1 else 0.0
    return longest + float(np.mean(spacing))
