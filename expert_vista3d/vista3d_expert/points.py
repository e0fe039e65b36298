"""Point prompts: what a user clicked, on the network's grid, and the mask that VISTA3D's point branch makes of it.

The windows, the merging of clicks with an automatic mask and the selection of components are MONAI's own
(``monai.apps.vista3d``), as in the Model Zoo's bundle.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.apps.vista3d.inferer import point_based_window_inferer
from monai.data import MetaTensor
from monai.networks.nets.vista3d import VISTA3D
from monai.transforms.utils import keep_components_with_positive_points

from vila_m3_common.errors import UserError

# A point on the very edge of a window counts as outside in MONAI's VISTA3D, and its mask comes back empty.
EDGE = 1e-3
POINT_LABELS = (0, 1)


@dataclass(frozen=True)
class PointPrompt:
    """Clicks of a user.

    Args:
        coordinates: ``(x, y, z)`` each, voxel indices of the image as stored in its file; fractions are allowed.
        labels: 1 for a point inside the structure, 0 for one outside, as many as points.
    """

    coordinates: tuple[tuple[float, float, float], ...]
    labels: tuple[int, ...]

    def to_json(self) -> str:
        """Return the prompt as one string, which MONAI's collation carries through unchanged."""
        return json.dumps([self.coordinates, self.labels])

    @classmethod
    def from_json(cls, text: str) -> PointPrompt | None:
        """Read what :meth:`to_json` wrote; None from an empty text."""
        if not text:
            return None
        coordinates, labels = json.loads(text)
        return cls(tuple((x, y, z) for x, y, z in coordinates), tuple(labels))


def read_points(points: Any, point_labels: Any = None) -> PointPrompt | None:
    """Check what a user gave.

    Args:
        points: one ``[x, y, z]`` or a list of them, also written as text; None or an empty list for no points.
        point_labels: 1 or 0 for each point; None takes all points as inside.

    Raises:
        UserError: if numbers are missing or cannot be read, or no point is inside.
    """
    given = _as_list(points, "points")
    if not given:
        if _as_list(point_labels, "point_labels"):
            raise UserError(
                f"point_labels {point_labels!r} were given without points; give points=[[x, y, z], ...] too"
            )
        return None
    given = given if isinstance(given[0], (Sequence, np.ndarray)) else [given]
    try:
        coordinates = tuple((float(x), float(y), float(z)) for x, y, z in given)
    except (TypeError, ValueError) as error:
        raise UserError(f"points {points!r} cannot be read; write them as [[x, y, z], ...], voxel indices") from error
    labels = _as_list(point_labels, "point_labels") or [1] * len(coordinates)
    if len(labels) != len(coordinates) or not set(labels) <= set(POINT_LABELS):
        raise UserError(
            f"point_labels {labels!r} do not fit {len(coordinates)} points; give 1 (inside) or 0 (outside) for each"
        )
    if 1 not in labels:
        raise UserError("every point is marked as outside (0); give at least one point inside the structure (1)")
    return PointPrompt(coordinates, tuple(int(label) for label in labels))


def _as_list(given: Any, name: str) -> list[Any]:
    if isinstance(given, str):
        try:
            given = ast.literal_eval(given) if given.strip() else None
        except (ValueError, SyntaxError) as error:
            raise UserError(f'{name} {given!r} is no list; write it as "[[10, 20, 30]]"') from error
    if given is None:
        return []
    return list(given) if isinstance(given, (Sequence, np.ndarray)) else [given]


def check_inside(prompt: PointPrompt, shape: Sequence[int]) -> None:
    """Raise a UserError if a point lies outside an image of ``shape`` (x, y, z)."""
    for point in prompt.coordinates:
        if not all(0 <= index <= size - 1 for index, size in zip(point, shape, strict=True)):
            last = ", ".join(str(size - 1) for size in shape)
            raise UserError(f"point {list(point)} lies outside the image; voxel indices go from 0, 0, 0 to {last}")


def points_on_grid(prompt: PointPrompt, image: MetaTensor) -> torch.Tensor:
    """Move points from the image as stored to the preprocessed one.

    Args:
        prompt: voxel indices of the image file.
        image: ``(1, 1, X, Y, Z)`` of a batch, whose metadata hold both affines.

    Returns:
        ``(1, N, 3)`` float32, voxel indices of ``image``, a hair inside its border.

    Raises:
        UserError: if a point lies in a part that the foreground crop left out.
    """
    stored = np.asarray(image.meta["original_affine"]).reshape(-1, 4, 4)[0]
    current = np.asarray(image.affine.cpu()).reshape(-1, 4, 4)[0]
    homogeneous = np.c_[np.asarray(prompt.coordinates, float), np.ones(len(prompt.labels))]
    moved = (np.linalg.inv(current) @ stored @ homogeneous.T).T[:, :3]
    last = np.asarray(image.shape[2:]) - 1
    for given, place in zip(prompt.coordinates, moved, strict=True):
        if (place < -1).any() or (place > last + 1).any():
            raise UserError(f"point {list(given)} lies in the air around the body, which is not segmented; move it")
    return torch.as_tensor(np.clip(moved, EDGE, last - EDGE), dtype=torch.float32)[None]


def segment_points(
    volume: torch.Tensor,
    network: VISTA3D,
    points: torch.Tensor,
    labels: Sequence[int],
    class_id: int | None,
    roi_size: Sequence[int],
    automatic: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mask of the structure that points mark.

    Args:
        volume: ``(1, 1, X, Y, Z)``, intensities scaled to 0..1.
        network: any VISTA3D.
        points: ``(1, N, 3)`` voxel indices of ``volume``.
        labels: 1 (inside) or 0 (outside) for each point.
        class_id: what is marked; None when unknown. Above 132 the network takes it for a new kind of structure.
        roi_size: one window of this size is looked at around each point.
        automatic: ``(1, 1, X, Y, Z)`` logits of the class prompt; the points change only the connected parts that
            they touch. None starts from nothing: only parts with a point inside are kept.

    Returns:
        ``(X, Y, Z)`` bool.
    """
    point_labels = torch.tensor([list(labels)], device=volume.device)
    prompt_class = None
    if class_id is not None:
        point_labels = network.convert_point_label(point_labels, [class_id])
        prompt_class = torch.tensor([[class_id]], device=volume.device)
    points = points.to(volume.device)
    logits = point_based_window_inferer(
        inputs=volume,
        roi_size=roi_size,
        predictor=network,
        point_coords=points,
        point_labels=point_labels,
        prompt_class=prompt_class,
        prev_mask=automatic,
        transpose=True,
    )
    logits = logits.as_tensor() if isinstance(logits, MetaTensor) else logits
    if automatic is None:
        logits = keep_components_with_positive_points(logits, points.cpu(), point_labels.cpu())
    return (logits[0, 0] > 0).to(volume.device)  # NaN, outside of every window, is not above 0
