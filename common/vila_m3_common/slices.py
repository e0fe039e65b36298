"""Volume -> the 2-D pictures that the VLM sees: orientation, intensity window, slice.

Conventions of the reference: RAS orientation, index along an axis, swap axes, rotate by 180 degrees.
An axial slice then has anterior at the top and the patient's right on the left of the picture.
"""

from __future__ import annotations

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from .errors import UserError

AXIS_NAMES = ("sagittal", "coronal", "axial")
CT_WINDOW_CENTRE = 50.0
CT_WINDOW_WIDTH = 400.0


def to_ras(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Reorder and flip the first three axes of ``array`` so that they point right, anterior, superior.

    Args:
        array: ``(X, Y, Z, ...)``.
        affine: ``(4, 4)``, voxel index to RAS position in mm. Oblique volumes take the nearest axes.
    """
    return apply_orientation(array, ornt_transform(io_orientation(affine), axcodes2ornt(("R", "A", "S"))))


def ras_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Return the voxel size in mm along the axes that :func:`to_ras` gives."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    order = np.argsort(io_orientation(affine)[:, 0])
    x, y, z = spacing[order]
    return float(x), float(y), float(z)


def check_slice(shape: tuple[int, ...], slice_index: int | None, axis: int) -> int:
    """Return the slice index, the middle one for None.

    Raises:
        UserError: if the axis or the index does not exist in a RAS volume of ``shape``.
    """
    if axis not in (0, 1, 2):
        raise UserError(f"axis {axis} does not exist; allowed: 0 (sagittal), 1 (coronal), 2 (axial)")
    count = shape[axis]
    if slice_index is None:
        return count // 2
    if not 0 <= slice_index < count:
        raise UserError(
            f"slice_index {slice_index} is out of range; "
            f"the {AXIS_NAMES[axis]} slices of this volume are 0..{count - 1}"
        )
    return slice_index


def take_slice(ras_array: np.ndarray, slice_index: int, axis: int = 2) -> np.ndarray:
    """Cut one slice out of a RAS volume and turn it the way radiologists look at it.

    Args:
        ras_array: ``(X, Y, Z)`` in RAS order.
        slice_index: index along ``axis``.
        axis: 0 sagittal, 1 coronal, 2 axial.

    Returns:
        ``(H, W)``: of the two remaining axes, the second runs up the picture.
    """
    plane = np.take(ras_array, slice_index, axis=axis)
    return np.rot90(np.swapaxes(plane, 0, 1), k=2)


def window_ct(hounsfield: np.ndarray, centre: float = CT_WINDOW_CENTRE, width: float = CT_WINDOW_WIDTH) -> np.ndarray:
    """Map HU to uint8 grey: ``centre - width/2`` is black, ``centre + width/2`` white; values are truncated."""
    low = centre - width / 2
    return (np.clip((hounsfield - low) / width, 0.0, 1.0) * 255).astype(np.uint8)


def scale_min_max(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map ``low..high`` to uint8 grey; the range is that of the whole MRI volume, not of the slice."""
    return (np.clip((values - low) / (high - low), 0.0, 1.0) * 255).astype(np.uint8)


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """``(H, W)`` -> ``(H, W, 3)``."""
    return np.repeat(grey[..., None], 3, axis=2)
