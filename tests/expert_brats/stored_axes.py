"""Storing the same voxels along other axes."""

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform


def stored_as(array: np.ndarray, affine: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """Return array and affine of the same voxels at the same positions, stored along axes such as ``LPS``."""
    change = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(codes)))
    return apply_orientation(array, change), affine @ inv_ornt_aff(change, array.shape)
