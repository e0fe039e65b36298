"""Transforms of the VISTA3D workflow that MONAI does not have."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform, Spacingd
from monai.transforms.transform import Transform
from monai.utils import convert_to_dst_type
from scipy import ndimage

from .labels import DEFAULT_GROUP, argument_ids, label_table, prompt_ids

_NEIGHBOURS = np.ones((3, 3, 3))


class ReadPromptd(Transform):
    """Turn the item's ``label_prompt`` into class ids, as one JSON string that survives collation.

    Args:
        key: where the item carries names, ids or groups; an item without it gets ``everything``.
    """

    def __init__(self, key: str = "label_prompt") -> None:
        self.key = key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with the prompt checked; raises UserError as :func:`.labels.prompt_ids`."""
        prompt = data.get(self.key)
        ids = argument_ids(DEFAULT_GROUP) if prompt is None else prompt_ids(prompt)
        return {**data, self.key: json.dumps(ids)}


class SpacingBesideTextd(Spacingd):
    """MONAI's ``Spacingd`` for items that also carry text.

    ``Spacingd`` of MONAI 1.6 takes every entry named ``image_...`` for a metadata mapping and fails on
    the plain ``image_path`` that MONAI Label passes in.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Resample the tensors, leave the text as it is."""
        without_text = {key: value for key, value in data.items() if not isinstance(value, str)}
        return {**data, **super().__call__(without_text, lazy)}


class RemoveSmallTumorsd(MapTransform):
    """Give tumour components below a volume to the structure around them.

    Args:
        keys: label maps ``(1, X, Y, Z)``.
        min_volume_ml: smallest component that is kept; 0 keeps everything.
        reference_key: image whose affine tells the voxel size.
        labels: ids that are filtered; None takes the tumours of the class table.
    """

    def __init__(
        self,
        keys: KeysCollection,
        min_volume_ml: float,
        reference_key: str = "image",
        labels: Sequence[int] | None = None,
    ) -> None:
        super().__init__(keys)
        self.min_volume_ml = min_volume_ml
        self.reference_key = reference_key
        self.labels = tuple(label_table().tumors if labels is None else labels)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Filter every label map of ``keys``."""
        filtered = dict(data)
        affine = np.asarray(data[self.reference_key].affine)
        voxel_ml = abs(float(np.linalg.det(affine[:3, :3]))) / 1000
        for key in self.key_iterator(filtered):
            labels = np.asarray(filtered[key].cpu())[0].copy()
            for label in self.labels:
                remove_small_components(labels, label, self.min_volume_ml / voxel_ml)
            filtered[key] = convert_to_dst_type(labels[None], filtered[key])[0]
        return filtered


def remove_small_components(labels: np.ndarray, label: int, min_voxels: float) -> None:
    """Replace, in place, the 26-connected components of ``label`` below ``min_voxels``.

    A component takes the label that borders it most, which may be background.
    """
    components, count = ndimage.label(labels == label, structure=_NEIGHBOURS)
    if count == 0:
        return
    sizes = np.bincount(components.ravel())
    for component, box in enumerate(ndimage.find_objects(components), start=1):
        if sizes[component] >= min_voxels:
            continue
        wider = tuple(slice(max(edge.start - 1, 0), edge.stop + 1) for edge in box)
        inside = components[wider] == component
        border = ndimage.binary_dilation(inside, structure=_NEIGHBOURS) & ~inside
        around = labels[wider][border]
        around = around[around != label]
        labels[wider][inside] = np.bincount(around).argmax() if len(around) else 0
