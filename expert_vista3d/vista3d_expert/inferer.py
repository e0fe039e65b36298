"""Sliding windows for class and point prompts, in memory that does not grow with the number of classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from math import prod
from typing import Any

import torch
from monai.data.utils import compute_importance_map
from monai.inferers import Inferer
from monai.networks.nets.vista3d import VISTA3D
from monai.utils import convert_to_dst_type, convert_to_tensor
from torch.nn.functional import pad
from tqdm import tqdm

from vila_m3_common.training import bfloat16

from .labels import DEFAULT_GROUP, MARKED_OBJECT, argument_ids, has_class_prompt
from .network import class_vectors, image_features
from .points import PointPrompt, points_on_grid, segment_points
from .slabs import features_in_slabs

# Fewer windows than this are done before a progress bar is worth drawing.
PROGRESS_FROM = 12


class PromptInferer(Inferer):
    """Segment a volume for any number of class prompts, or for points.

    A logit is linear in the image features, so blending the features of overlapping windows and
    comparing them with the class vectors afterwards gives the same as blending the logits of every
    class; and one positive factor for all classes of a voxel changes neither the largest logit nor
    its sign, so nothing is divided by the sum of the weights. Windows go along the volume's longest
    axis, one layer after the other. Kept in memory are the label map, one layer of float32 maps, as
    many as there are classes or features, whichever are fewer, and the logits of one plane.

    Args:
        roi_size: window in voxels; a smaller volume is padded to it on both sides with its border voxels.
        overlap: share of a window that its neighbour repeats, 0..1 (exclusive).
        mode: weight of a window's voxels, ``constant`` or ``gaussian``.
        sw_batch_size: windows per forward pass.
        amp: compute the windows in bfloat16.
        progress: show a progress bar when there are many windows.
        slab_size: planes of a window that the network computes at a time on a CPU, see :mod:`.slabs`; None runs
            it layer by layer, which is faster and keeps several feature maps of a window. GPUs always do.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.25,
        mode: str = "constant",
        sw_batch_size: int = 1,
        amp: bool = False,
        progress: bool = False,
        slab_size: int | None = None,
    ) -> None:
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap is {overlap}; it must be at least 0 and below 1")
        self.roi_size = tuple(int(size) for size in roi_size)
        self.overlap = overlap
        self.mode = mode
        self.sw_batch_size = sw_batch_size
        self.amp = amp
        self.progress = progress
        self.slab_size = slab_size

    @torch.no_grad()
    def __call__(
        self,
        inputs: torch.Tensor,
        network: VISTA3D,
        label_ids: Sequence[int] | None = None,
        points: torch.Tensor | None = None,
        point_labels: Sequence[int] = (),
        *args: Any,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Return the label map of one volume.

        Args:
            inputs: ``(1, 1, X, Y, Z)``, intensities scaled to 0..1.
            network: any VISTA3D.
            label_ids: class prompts, without parent classes; None takes those of ``everything``. With points: the
                marked class, or nothing.
            points: ``(1, N, 3)``, voxel indices of ``inputs``.
            point_labels: 1 (inside) or 0 (outside) for each point.

        Returns:
            ``(1, 1, X, Y, Z)`` uint8: at each voxel the id of the prompt with the largest logit, 0
            where no logit is positive. It carries the metadata of ``inputs``, so that transforms can
            be inverted.
        """
        volume = convert_to_tensor(inputs[:1], track_meta=False)
        if points is None:
            label_ids = argument_ids(DEFAULT_GROUP) if label_ids is None else label_ids
            ids = torch.tensor(list(label_ids), dtype=torch.uint8, device=volume.device)
            labels = self._sweep(volume, network, label_ids, partial(best_labels, ids=ids), torch.uint8)
        else:
            labels = self._mark(volume, network, label_ids or (), points, point_labels)
        return convert_to_dst_type(labels[None, None], inputs, dtype=torch.uint8)[0]

    def _mark(
        self,
        volume: torch.Tensor,
        network: VISTA3D,
        label_ids: Sequence[int],
        points: torch.Tensor,
        point_labels: Sequence[int],
    ) -> torch.Tensor:
        """Segment the class, when it has a class prompt, and let the points correct it; ``(X, Y, Z)`` uint8."""
        class_id = int(label_ids[0]) if label_ids else None
        automatic = None
        if class_id is not None and has_class_prompt(class_id):
            automatic = self._sweep(volume, network, [class_id], first_logits, torch.float32)[None, None]
        with bfloat16(volume.device, self.amp):
            mask = segment_points(volume, network, points, point_labels, class_id, self.roi_size, automatic)
        return mask.to(torch.uint8) * (MARKED_OBJECT if class_id is None else class_id)

    def _sweep(
        self,
        volume: torch.Tensor,
        network: VISTA3D,
        label_ids: Sequence[int],
        finish: Callable[[torch.Tensor], torch.Tensor],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        """Return ``(X, Y, Z)``, plane by plane what ``finish`` makes of the blended logits ``(K, ., .)``."""
        shape = volume.shape[2:]
        padding = [max(roi - size, 0) for roi, size in zip(self.roi_size, shape, strict=True)]
        low = [total // 2 for total in padding]
        sides = [side for axis in (2, 1, 0) for side in (low[axis], padding[axis] - low[axis])]
        padded = pad(volume, sides, mode="replicate") if any(sides) else volume
        axis = max(range(3), key=lambda place: padded.shape[2 + place])
        result = torch.zeros(padded.shape[2:], dtype=dtype, device=volume.device)
        planes = result.movedim(axis, 0)
        vectors = class_vectors(network, label_ids).float()
        for index, logits in enumerate(self._blend(padded, network, vectors, axis)):
            planes[index] = finish(logits)
        return result[tuple(slice(start, start + size) for start, size in zip(low, shape, strict=True))]

    def _blend(
        self, volume: torch.Tensor, network: VISTA3D, vectors: torch.Tensor, axis: int
    ) -> Iterator[torch.Tensor]:
        """Yield the blended logits of each plane along ``axis``; planes that no later window reaches are final."""
        moved = volume.movedim(2 + axis, 2)
        depth, *plane = moved.shape[2:]
        roi = self.roi_size[axis]
        blends_logits = len(vectors) <= vectors.shape[1]
        make_maps = partial(self._window_maps, network=network, vectors=vectors if blends_logits else None, axis=axis)
        layer = torch.zeros((min(vectors.shape), roi, *plane), device=volume.device)
        starts = window_starts(depth, roi, self.overlap)
        with self._progress(volume.shape[2:]) as bar:
            for start, next_start in zip(starts, [*starts[1:], depth], strict=True):
                self._add_layer(layer, moved[:, :, start : start + roi], make_maps, axis, bar)
                for offset in range(next_start - start):
                    yield layer[:, offset] if blends_logits else project(layer[:, offset], vectors)
                drop_planes(layer, next_start - start)

    def _add_layer(
        self,
        layer: torch.Tensor,
        slab: torch.Tensor,
        make_maps: Callable[[torch.Tensor], torch.Tensor],
        axis: int,
        bar: tqdm,
    ) -> None:
        """Add the maps of all windows of ``slab`` (1, 1, roi, ., .) to ``layer`` (M, roi, ., .)."""
        places = list(self._places(slab.shape[3:], axis))
        for first in range(0, len(places), self.sw_batch_size):
            batch = places[first : first + self.sw_batch_size]
            maps = make_maps(torch.cat([slab[..., y, z] for y, z in batch]))
            for window, (y, z) in enumerate(batch):
                layer[..., y, z] += maps[window]
            del maps  # not kept while the next windows are computed
            bar.update(len(batch))

    def _window_maps(
        self, windows: torch.Tensor, network: VISTA3D, vectors: torch.Tensor | None, axis: int
    ) -> torch.Tensor:
        """Return weighted logits, or features without ``vectors``, ``(B, M, roi, ., .)`` of windows stored likewise."""
        windows = windows.movedim(2, 2 + axis).contiguous()
        with bfloat16(windows.device, self.amp):
            maps = self._features(network, windows).float()
        if vectors is not None:
            maps = torch.stack([project(features, vectors) for features in maps])
        if self.mode != "constant":
            maps = maps * compute_importance_map(self.roi_size, mode=self.mode, device=maps.device)
        return maps.movedim(2 + axis, 2)

    def _features(self, network: VISTA3D, windows: torch.Tensor) -> torch.Tensor:
        if self.slab_size and windows.device.type == "cpu":
            return features_in_slabs(network, windows, self.slab_size)
        return image_features(network, windows)

    def _places(self, plane: Sequence[int], axis: int) -> Iterator[tuple[slice, slice]]:
        rois = [roi for place, roi in enumerate(self.roi_size) if place != axis]
        starts = [window_starts(size, roi, self.overlap) for size, roi in zip(plane, rois, strict=True)]
        for y, z in product(*starts):
            yield slice(y, y + rois[0]), slice(z, z + rois[1])

    def _progress(self, shape: Sequence[int]) -> tqdm:
        counts = [len(window_starts(size, roi, self.overlap)) for size, roi in zip(shape, self.roi_size, strict=True)]
        is_hidden = not self.progress or prod(counts) < PROGRESS_FROM
        return tqdm(total=prod(counts), desc="VISTA3D", unit="window", disable=is_hidden, leave=False)


def prompted_batch(
    batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor | None, tuple, dict[str, Any]]:
    """Give image, label map (None without one) and prompts of a batch of one to :class:`PromptInferer`.

    A ``prepare_batch`` of MONAI's evaluators; the prompts are what :class:`.transforms.ReadPromptd` wrote.
    """
    image = batch["image"].to(device, non_blocking=non_blocking)
    prompts: dict[str, Any] = {"label_ids": json.loads(batch["label_prompt"][0])}
    clicks = PointPrompt.from_json(batch["clicks"][0])
    if clicks is not None:
        prompts |= {"points": points_on_grid(clicks, image), "point_labels": clicks.labels}
    return image, batch.get("label"), (), prompts


def window_starts(size: int, roi: int, overlap: float) -> list[int]:
    """Return where windows of ``roi`` begin along an axis of ``size`` voxels; the last one ends at the border.

    These are the starts of :func:`monai.inferers.sliding_window_inference`.
    """
    if size <= roi:
        return [0]
    step = max(1, int(roi * (1 - overlap)))
    return [*range(0, size - roi, step), size - roi]


def project(features: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """Return the logits ``(K, ...)`` of features ``(C, ...)`` for class vectors ``(K, C)``."""
    return torch.einsum("kc,c...->k...", vectors, features)


def drop_planes(layer: torch.Tensor, count: int) -> None:
    """Move the planes of ``(M, depth, ., .)`` down by ``count``, in place, and clear the last ones.

    Plane by plane, because a copy of the layer would double the memory.
    """
    kept = layer.shape[1] - count
    for offset in range(kept):
        layer[:, offset] = layer[:, offset + count]
    layer[:, kept:] = 0


def first_logits(logits: torch.Tensor) -> torch.Tensor:
    """Return the logits of the first class of ``(K, ., .)``."""
    return logits[0]


def best_labels(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return the id with the largest logit at each voxel, 0 where no logit is positive.

    Args:
        logits: ``(K, Y, Z)``.
        ids: ``(K,)`` uint8.

    Returns:
        ``(Y, Z)`` uint8.
    """
    logit, index = logits.max(dim=0)
    return torch.where(logit > 0, ids[index], 0)
