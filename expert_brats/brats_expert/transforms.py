"""Transforms between a scan, the grid the network works on, and the BraTS label map."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.transforms import Compose, CropForegroundd, MapTransform, Orientationd, RandomizableTransform, Spacingd

# Regions in the order of the network's output channels.
REGIONS = ("tumor core", "whole tumor", "enhancing tumor")


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
            Spacingd(keys=keys, pixdim=(spacing,) * 3, mode=modes, dtype=torch.float32),
            CropForegroundd(keys=keys, source_key=keys[0], margin=1),
        ]
    )


def regions_to_labels(regions: torch.Tensor) -> torch.Tensor:
    """Turn the three nested regions into one label map.

    Args:
        regions: ``(3, X, Y, Z)`` tumour core, whole tumour, enhancing tumour; non-zero is inside.

    Returns:
        ``(1, X, Y, Z)`` uint8: 1 necrotic and non-enhancing core, 2 oedema, 4 enhancing tumour, 0 elsewhere.
        Where the regions are not nested, enhancing tumour wins over core, and core over whole tumour.
    """
    core, whole, enhancing = regions > 0
    labels = torch.zeros_like(whole, dtype=torch.uint8)
    labels[whole] = 2
    labels[core] = 1
    labels[enhancing] = 4
    return labels[None]


class RegionsToLabelsd(MapTransform):
    """Dictionary form of :func:`regions_to_labels`."""

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
