"""Transforms of the VISTA3D workflow that MONAI does not have."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.transforms.transform import Transform
from monai.utils import convert_to_dst_type
from scipy import ndimage

from vila_m3_common.errors import UserError

from .labels import DEFAULT_GROUP, LAST_NEW_CLASS, NewClasses, argument_ids, label_table, point_class, prompt_ids
from .points import read_points

LabelMapping = Sequence[Sequence[int]]
_NEIGHBOURS = np.ones((3, 3, 3))


class ReadPromptd(Transform):
    """Turn the item's prompts into ``label_prompt`` and ``clicks``, two JSON strings that survive collation.

    An item may carry ``label_prompt`` (names, ids or groups), ``points`` and ``point_labels`` (see
    :func:`.points.read_points`); points go with one class or none. An item without prompts gets ``everything``.

    Args:
        new_classes: see :func:`.labels.read_new_classes`.
    """

    def __init__(self, new_classes: NewClasses = None) -> None:
        self.new_classes = new_classes

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with the prompts checked.

        Raises:
            UserError: as :func:`.labels.prompt_ids`, :func:`.labels.point_class` and :func:`.points.read_points`.
        """
        prompt = data.get("label_prompt")
        clicks = read_points(data.get("points"), data.get("point_labels"))
        if clicks is not None:
            label = point_class(prompt)
            ids = [] if label is None else [label]
        else:
            ids = argument_ids(DEFAULT_GROUP) if prompt is None else prompt_ids(prompt, self.new_classes)
        others = {key: value for key, value in data.items() if key not in ("points", "point_labels")}
        return {**others, "label_prompt": json.dumps(ids), "clicks": clicks.to_json() if clicks else ""}


class MapClassesd(MapTransform):
    """Turn the label maps of a data set into VISTA3D ids.

    Label maps may be stored as floats. A class that a mapping does not name becomes background: left as it is,
    its number would stand for another structure.

    Args:
        keys: label maps ``(1, X, Y, Z)``.
        label_mappings: data set -> pairs (id in the data set, VISTA3D id); ids 133 to 254 are free for classes that
            VISTA3D does not have. The name is the item's ``dataset_name``; ``default`` maps the items of other data
            sets, which keep their ids without it.
    """

    def __init__(self, keys: KeysCollection, label_mappings: Mapping[str, LabelMapping] | None = None) -> None:
        super().__init__(keys)
        self.tables = {name: mapping_table(pairs) for name, pairs in (label_mappings or {}).items()}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Return the item with uint8 label maps.

        Raises:
            UserError: if a label map holds values that are no ids.
        """
        mapped = dict(data)
        name = data.get("dataset_name", "default")
        table = self.tables.get(name, self.tables.get("default"))
        for key in self.key_iterator(mapped):
            ids = whole_ids(
                np.asarray(data[key].cpu()), str(getattr(data[key], "meta", {}).get("filename_or_obj", key))
            )
            mapped[key] = convert_to_dst_type(ids if table is None else table[ids], data[key], dtype=torch.uint8)[0]
        return mapped


def mapping_table(pairs: LabelMapping) -> np.ndarray:
    """Return the VISTA3D id of every possible id of a data set, ``(256,)`` uint8.

    Raises:
        UserError: if a pair names an id that label maps cannot hold.
    """
    table = np.zeros(256, np.uint8)
    for source, target in pairs:
        if not (0 < int(source) <= 255 and 0 < int(target) <= LAST_NEW_CLASS):
            raise UserError(
                f"the class mapping {source} -> {target} cannot be used; ids of the data set are 1..255, "
                f"those of VISTA3D 1..{LAST_NEW_CLASS}"
            )
        table[int(source)] = int(target)
    return table


def whole_ids(labels: np.ndarray, name: str) -> np.ndarray:
    """Return a label map as uint8; values may lie as far from a whole number as float storage puts them.

    Raises:
        UserError: if values are no whole numbers from 0 to 255.
    """
    rounded = np.round(labels)
    if labels.size and (np.abs(labels - rounded).max() > 1e-3 or rounded.min() < 0 or rounded.max() > 255):
        raise UserError(
            f"label map {Path(name).name} holds values from {labels.min():g} to {labels.max():g} that are no class "
            "ids; these are whole numbers from 0 to 255 (was it resampled with interpolation?)"
        )
    return rounded.astype(np.uint8)


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
