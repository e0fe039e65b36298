"""Resampling of items that carry text beside their images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.transforms import Spacingd


class SpacingBesideTextd(Spacingd):
    """MONAI's ``Spacingd`` for items that also carry text.

    ``Spacingd`` of MONAI 1.6 takes every entry named ``image_...`` for a metadata mapping and fails on
    the plain ``image_path`` that MONAI Label passes in.
    """

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """Resample the tensors, leave the text as it is."""
        without_text = {key: value for key, value in data.items() if not isinstance(value, str)}
        return {**data, **super().__call__(without_text, lazy)}
