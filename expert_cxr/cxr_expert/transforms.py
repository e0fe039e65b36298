"""From a radiograph file to the square picture that the classifiers take."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import CenterSpatialCrop, MapTransform
from torch.nn import functional

from vila_m3_common.volumes import load_radiograph


class LoadRadiographd(MapTransform):
    """Read PNG, JPEG or DICOM radiographs as ``(1, H, W)`` float32 in 0..255, bright bone.

    See :func:`vila_m3_common.volumes.load_radiograph` for the handling of colour, bit depth and DICOM tags.

    Raises:
        UserError: if a file is missing, empty, unreadable or constant.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the path under each key by the picture."""
        item = dict(data)
        for key in self.key_iterator(item):
            path = str(item[key])
            pixels = torch.from_numpy(load_radiograph(path).copy())
            item[key] = MetaTensor(pixels[None], meta={"filename_or_obj": path})
        return item


class CenterSquareCropd(MapTransform):
    """Cut the largest centred square out of ``(C, H, W)``.

    It starts at ``H // 2 - side // 2`` and ``W // 2 - side // 2``, as in TorchXRayVision: 5 x 8 keeps columns 2..6.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Crop the picture under each key."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = CenterSpatialCrop(min(item[key].shape[1:]))(item[key])
        return item


class ResizeSquared(MapTransform):
    """Resize square pictures ``(C, H, H)`` with the filter of the classifiers.

    Training uses it to keep its cache small; the classifiers leave a picture of their own size as it is.

    Args:
        keys: where the pictures are.
        size: new side in pixels.
    """

    def __init__(self, keys: KeysCollection, size: int) -> None:
        super().__init__(keys)
        self.size = size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Resize the picture under each key."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = resize_square(item[key][None], self.size)[0]
        return item


def resize_square(image: torch.Tensor, size: int) -> torch.Tensor:
    """Resize ``(B, C, H, H)`` to ``(B, C, size, size)``: bilinear with anti-aliasing, corners not aligned.

    Raises:
        ValueError: if the picture is not square; stretching would change the width of heart and thorax.
    """
    height, width = image.shape[-2:]
    if height != width:
        raise ValueError(f"the radiograph is {height} x {width}; crop it to a square first (CenterSquareCropd)")
    if height == size:
        return image
    return functional.interpolate(image, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
