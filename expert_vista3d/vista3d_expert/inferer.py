"""Sliding windows for class prompts, in memory that does not grow with the number of classes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import Any

import torch
from monai.data.utils import compute_importance_map
from monai.inferers import Inferer
from monai.networks.nets.vista3d import VISTA3D
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch.nn.functional import pad
from tqdm import tqdm

from .network import class_vectors, image_features

# Fewer windows than this are done before a progress bar is worth drawing.
PROGRESS_FROM = 12


class PromptInferer(Inferer):
    """Segment a volume for any number of class prompts.

    A logit is linear in the image features, so blending the features of overlapping windows and
    comparing them with the class vectors afterwards gives the same as blending the logits of every
    class; and one positive factor for all classes of a voxel changes neither the largest logit nor
    its sign, so nothing is divided by the sum of the weights. Kept in memory are the features of
    one row of windows and the logits of one plane.

    Args:
        roi_size: window in voxels; a smaller volume is padded with 0 (air) to it, on both sides.
        overlap: share of a window that its neighbour repeats, 0..1 (exclusive).
        mode: weight of a window's voxels, ``constant`` or ``gaussian``.
        sw_batch_size: windows per forward pass.
        amp: compute the windows in bfloat16.
        progress: show a progress bar when there are many windows.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.25,
        mode: str = "constant",
        sw_batch_size: int = 1,
        amp: bool = False,
        progress: bool = False,
    ) -> None:
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap is {overlap}; it must be at least 0 and below 1")
        self.roi_size = tuple(int(size) for size in roi_size)
        self.overlap = overlap
        self.mode = mode
        self.sw_batch_size = sw_batch_size
        self.amp = amp
        self.progress = progress

    @torch.no_grad()
    def __call__(
        self, inputs: torch.Tensor, network: VISTA3D, label_ids: Sequence[int], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the label map of one volume.

        Args:
            inputs: ``(1, 1, X, Y, Z)``, intensities scaled to 0..1.
            network: any VISTA3D.
            label_ids: class prompts, without parent classes.

        Returns:
            ``(1, 1, X, Y, Z)`` uint8: at each voxel the id of the prompt with the largest logit, 0
            where no logit is positive. It carries the metadata of ``inputs``, so that transforms can
            be inverted.
        """
        volume = convert_to_tensor(inputs[:1], track_meta=False)
        shape = volume.shape[2:]
        padding = [max(roi - size, 0) for roi, size in zip(self.roi_size, shape, strict=True)]
        low = [total // 2 for total in padding]
        sides = [side for axis in (2, 1, 0) for side in (low[axis], padding[axis] - low[axis])]
        labels = self._label_volume(pad(volume, sides), network, label_ids)
        inside = tuple(slice(start, start + size) for start, size in zip(low, shape, strict=True))
        return convert_to_dst_type(labels[inside][None, None], inputs, dtype=torch.uint8)[0]

    def _label_volume(self, volume: torch.Tensor, network: VISTA3D, label_ids: Sequence[int]) -> torch.Tensor:
        """Go along x window row by window row; slices that no later row reaches are final."""
        vectors = class_vectors(network, label_ids).float()
        ids = torch.tensor(list(label_ids), dtype=torch.uint8, device=volume.device)
        x_size, y_size, z_size = volume.shape[2:]
        labels = torch.zeros((x_size, y_size, z_size), dtype=torch.uint8, device=volume.device)
        row = torch.zeros((vectors.shape[1], self.roi_size[0], y_size, z_size), device=volume.device)
        starts = window_starts(x_size, self.roi_size[0], self.overlap)
        with self._progress(volume.shape[2:]) as bar:
            for start, next_start in zip(starts, [*starts[1:], x_size], strict=True):
                self._add_row(row, volume[:, :, start : start + self.roi_size[0]], network, bar)
                final_count = next_start - start
                for offset in range(final_count):
                    labels[start + offset] = best_labels(row[:, offset], vectors, ids)
                row = torch.cat([row[:, final_count:], torch.zeros_like(row[:, :final_count])], dim=1)
        return labels

    def _add_row(self, row: torch.Tensor, slab: torch.Tensor, network: VISTA3D, bar: tqdm) -> None:
        """Add the weighted features of all windows of ``slab`` (1, 1, x, Y, Z) to ``row`` (C, x, Y, Z)."""
        weight = compute_importance_map(self.roi_size, mode=self.mode, device=slab.device)
        places = list(self._places(slab.shape[3:]))
        for first in range(0, len(places), self.sw_batch_size):
            batch = places[first : first + self.sw_batch_size]
            windows = torch.cat([slab[..., y, z] for y, z in batch])
            with self._autocast(slab.device):
                features = image_features(network, windows)
            for feature, (y, z) in zip(features.float(), batch, strict=True):
                row[..., y, z] += feature * weight
            bar.update(len(batch))

    def _places(self, plane: Sequence[int]) -> Iterator[tuple[slice, slice]]:
        starts = [window_starts(size, roi, self.overlap) for size, roi in zip(plane, self.roi_size[1:], strict=True)]
        for y, z in product(*starts):
            yield slice(y, y + self.roi_size[1]), slice(z, z + self.roi_size[2])

    def _autocast(self, device: torch.device) -> AbstractContextManager:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.amp)

    def _progress(self, shape: Sequence[int]) -> tqdm:
        total = 1
        for size, roi in zip(shape, self.roi_size, strict=True):
            total *= len(window_starts(size, roi, self.overlap))
        is_hidden = not self.progress or total < PROGRESS_FROM
        return tqdm(total=total, desc="VISTA3D", unit="window", disable=is_hidden, leave=False)


def prompted_batch(
    batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None, tuple, dict[str, list[int]]]:
    """Give image, label map (None without one) and class prompts of a batch of one to :class:`PromptInferer`.

    A ``prepare_batch`` of MONAI's evaluators; the prompt is what :class:`.transforms.ReadPromptd` wrote.
    """
    image = batch["image"].to(device, non_blocking=non_blocking)
    return image, batch.get("label"), (), {"label_ids": json.loads(batch["label_prompt"][0])}


def window_starts(size: int, roi: int, overlap: float) -> list[int]:
    """Return where windows of ``roi`` begin along an axis of ``size`` voxels; the last one ends at the border.

    These are the starts of :func:`monai.inferers.sliding_window_inference`.
    """
    if size <= roi:
        return [0]
    step = max(1, int(roi * (1 - overlap)))
    return [*range(0, size - roi, step), size - roi]


def best_labels(features: torch.Tensor, vectors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the id with the largest logit at each voxel, 0 where no logit is positive.

    Args:
        features: ``(C, Y, Z)``.
        vectors: ``(K, C)``.
        ids: ``(K,)`` uint8.

    Returns:
        ``(Y, Z)`` uint8.
    """
    logit, index = torch.einsum("kc,cyz->kyz", vectors, features).max(dim=0)
    return torch.where(logit > 0, ids[index], torch.zeros_like(ids[index]))
