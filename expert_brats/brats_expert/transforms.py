"""Transforms between a scan, the grid the network works on, and the BraTS label map."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    LoadImage,
    MapTransform,
    Orientationd,
    RandomizableTransform,
)

from vila_m3_common.errors import UserError
from vila_m3_common.spacing import SpacingBesideTextd
from vila_m3_common.volumes import Volume

from .labels import REGIONS, labels_to_regions, region_ids, regions_to_labels
from .sequences import align, check_scan, load_scan


class LoadSequencesd(MapTransform):
    """Read the four sequences of a patient as one image ``(4, X, Y, Z)``: T1c, T1, T2, FLAIR on the grid of the T1c.

    In place of MONAI's ``LoadImaged``: sequences stored along other axes are turned instead of refused, their order
    is checked, and files that were read already come from memory.

    Args:
        keys: items that are a list of four files (or DICOM folders), or one 4-D file.
        sequence_order: see :func:`brats_expert.sequences.load_scan`.
    """

    def __init__(self, keys: KeysCollection, sequence_order: Sequence[str] | None = None) -> None:
        super().__init__(keys)
        self.sequence_order = sequence_order

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with images in place of paths."""
        items = dict(data)
        for key in self.key_iterator(items):
            paths = [items[key]] if isinstance(items[key], (str, Path)) else list(items[key])
            scan = load_scan(paths, self.sequence_order)
            check_scan(scan)
            image = torch.from_numpy(np.stack(scan.channels))
            items[key] = MetaTensor(
                image, affine=torch.from_numpy(scan.affine), meta={"filename_or_obj": str(scan.path)}
            )
        return items


class LoadRegionsd(MapTransform):
    """Read a label map as the three regions ``(3, X, Y, Z)``, on the grid of an image that was loaded before.

    Args:
        keys: items that are label map files.
        image_key: the image, ``(C, X, Y, Z)``.
        convention: release of BraTS that the ids follow, see :mod:`brats_expert.labels`.
        needs_all_regions: whether to refuse a release that does not draw all three regions, as training must.

    Raises:
        UserError: if the convention is unknown or lacks a region that is needed.
    """

    def __init__(
        self, keys: KeysCollection, image_key: str, convention: str = "brats2018", needs_all_regions: bool = True
    ) -> None:
        super().__init__(keys)
        self.image_key = image_key
        self.convention = convention
        missing = [name for name, ids in zip(REGIONS, region_ids(convention), strict=True) if ids is None]
        if missing and needs_all_regions:
            raise UserError(f"{convention} labels no {', '.join(missing)}; training needs all of {', '.join(REGIONS)}")
        self._load = LoadImage(image_only=True, dtype=None)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with regions in place of paths."""
        items = dict(data)
        image = items[self.image_key]
        for key in self.key_iterator(items):
            labels = self._load(str(items[key]))
            array = labels.numpy()[..., 0] if labels.ndim == 4 and labels.shape[3] == 1 else labels.numpy()
            stored = Volume(array, labels.affine.numpy(), Path(items[key]))
            target = Volume(image[0].numpy(), image.affine.numpy(), Path(image.meta["filename_or_obj"]))
            turned = torch.from_numpy(np.ascontiguousarray(align(stored, target)))
            items[key] = MetaTensor(
                labels_to_regions(turned[None], self.convention),
                affine=image.affine,
                meta={"filename_or_obj": str(items[key])},
            )
        return items


def network_grid(
    spacing: float | None, keys: Sequence[str] = ("image",), modes: Sequence[str] = ("bilinear",)
) -> Compose:
    """Bring a scan to the grid that the network works on; ``Invertd`` takes the prediction back.

    Args:
        spacing: voxel size in mm: the scan is turned to RAS, resampled and cropped to its non-zero box.
            None keeps the scan's own grid, as the released model wants it.
        keys: items to transform, the image first; each ``(C, X, Y, Z)``.
        modes: interpolation of each key.
    """
    if spacing is None:
        return Compose([])
    return Compose(
        [
            Orientationd(keys=keys, axcodes="RAS", labels=None),
            SpacingBesideTextd(keys=keys, pixdim=(spacing,) * 3, mode=modes, dtype=torch.float32),
            CropForegroundd(keys=keys, source_key=keys[0], margin=1),
        ]
    )


class RegionsToLabelsd(MapTransform):
    """Dictionary form of :func:`brats_expert.labels.regions_to_labels`."""

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with the label map in place of the regions."""
        items = dict(data)
        for key in self.key_iterator(items):
            items[key] = regions_to_labels(items[key])
        return items


class RandTissueContrastd(RandomizableTransform, MapTransform):
    """Vary gamma, scale and offset of every sequence on its own; the zero background stays zero.

    Scanners and protocols differ in contrast far more than phantoms do; a network that saw one
    contrast only would fail on every scan.

    Args:
        keys: items of ``(C, X, Y, Z)``, normalised to zero mean and unit variance inside the head.
        gamma: largest change of the logarithm of gamma to base 2.
        scale: largest relative change of the scale.
        offset: largest shift, in standard deviations.
        prob: probability that an item is changed.
    """

    def __init__(
        self, keys: KeysCollection, gamma: float = 0.4, scale: float = 0.2, offset: float = 0.2, prob: float = 0.9
    ) -> None:
        MapTransform.__init__(self, keys)
        RandomizableTransform.__init__(self, prob)
        self.gamma, self.scale, self.offset = gamma, scale, offset

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return a copy of ``data`` with changed contrast."""
        items = dict(data)
        self.randomize(None)
        if self._do_transform:
            for key in self.key_iterator(items):
                items[key] = self._change(items[key])
        return items

    def _change(self, image: torch.Tensor) -> torch.Tensor:
        changed = image.clone()
        for channel in changed:
            inside = channel != 0
            if not inside.any():
                continue
            values = channel[inside]
            low, spread = values.min(), (values.max() - values.min()).clamp(min=1e-6)
            gamma = 2.0 ** self.R.uniform(-self.gamma, self.gamma)
            curved = ((values - low) / spread) ** gamma
            curved = (curved - curved.mean()) / curved.std().clamp(min=1e-6)
            scale = 1 + self.R.uniform(-self.scale, self.scale)
            channel[inside] = curved * scale + self.R.uniform(-self.offset, self.offset)
        return changed
