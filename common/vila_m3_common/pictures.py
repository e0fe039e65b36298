"""Pictures of every kind -> RGB, as the VLM sees them."""

from __future__ import annotations

import numpy as np
from PIL import Image

from .errors import UserError

Picture = np.ndarray | Image.Image


def to_rgb(picture: Picture, name: str = "a picture") -> np.ndarray:
    """Bring a picture to ``(H, W, 3)`` uint8.

    Transparency is dropped, palettes and CMYK are converted, and grey of more than 8 bits is scaled from its own
    range, because Pillow would cut it at 255.

    Args:
        picture: a PIL image of any mode, or an array ``(H, W, 3)`` uint8.
        name: what errors call it.

    Raises:
        UserError: for a picture with several frames, without pixels, or an array of another shape or type.
    """
    if isinstance(picture, np.ndarray):
        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8 or picture.size == 0:
            raise UserError(
                f"{name} is an array of shape {picture.shape} and type {picture.dtype}; give (H, W, 3) uint8"
            )
        return np.ascontiguousarray(picture)
    check_one_frame(picture, name)
    if is_deep(picture):
        return np.repeat(scale_to_bytes(np.asarray(picture, dtype=np.float32)).astype(np.uint8)[..., None], 3, axis=2)
    return np.array(picture.convert("RGB"))


def check_one_frame(picture: Image.Image, name: str = "a picture") -> None:
    """Refuse an animation or a stack of pages."""
    frame_count = getattr(picture, "n_frames", 1)
    if frame_count != 1:
        raise UserError(f"{name} has {frame_count} frames; give one frame as a picture of its own")


def is_deep(picture: Image.Image) -> bool:
    """Return whether a picture is grey of more than 8 bits."""
    return picture.mode.startswith("I") or picture.mode == "F"


def scale_to_bytes(grey: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Stretch grey values of any range over 0..255; a constant picture becomes 0.

    Args:
        grey: float values of any shape.
        counted: mask of the values that make the range; the others are cut at its ends. None counts all.
    """
    inside = grey if counted is None or not counted.any() else grey[counted]
    low, high = float(inside.min()), float(inside.max())
    if high == low:
        return np.zeros_like(grey)
    return np.clip((grey - low) * (255.0 / (high - low)), 0, 255)
