"""Label overlays: the reference's colours for the VLM, and the same with a legend for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw

from .slices import grey_to_rgb

# Colours cycle in this order; orange stands twice in the reference.
COLOR_CYCLE = (
    "red",
    "blue",
    "yellow",
    "magenta",
    "green",
    "indigo",
    "darkorange",
    "cyan",
    "pink",
    "brown",
    "orange",
    "lime",
    "orange",
    "gold",
    "yellowgreen",
    "darkgreen",
)
RGB = {
    "red": (1.0, 0.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "green": (0.0, 0.502, 0.0),
    "indigo": (0.294, 0.0, 0.51),
    "darkorange": (1.0, 0.549, 0.0),
    "cyan": (0.0, 1.0, 1.0),
    "pink": (1.0, 0.753, 0.796),
    "brown": (0.647, 0.165, 0.165),
    "orange": (1.0, 0.647, 0.0),
    "lime": (0.0, 1.0, 0.0),
    "gold": (1.0, 0.843, 0.0),
    "yellowgreen": (0.604, 0.804, 0.196),
    "darkgreen": (0.0, 0.392, 0.0),
}
ALPHA = 0.3


def assign_colors(label_ids: Sequence[int]) -> dict[int, str]:
    """Give the foreground ids that are present, in ascending order, the colours of the cycle."""
    present = sorted({int(label) for label in label_ids if label != 0})
    return {label: COLOR_CYCLE[index % len(COLOR_CYCLE)] for index, label in enumerate(present)}


def blend(grey: np.ndarray, labels: np.ndarray, colors: Mapping[int, str]) -> np.ndarray:
    """Lay a label map over a slice as the reference does: 0.7 picture + 0.3 colour, background black.

    Args:
        grey: ``(H, W)`` uint8.
        labels: ``(H, W)`` integer ids.
        colors: id -> colour name.

    Returns:
        ``(H, W, 3)`` uint8, values truncated.
    """
    paint = np.zeros((*labels.shape, 3))
    for label, color in colors.items():
        paint[labels == label] = RGB[color]
    picture = grey_to_rgb(grey) * (1.0 / 255.0)  # not / 255: the last bit decides what truncation gives
    return ((picture * (1 - ALPHA) + paint * ALPHA) * 255).astype(np.uint8)


def overlay_figure(
    grey: np.ndarray,
    labels: np.ndarray,
    colors: Mapping[int, str],
    names: Mapping[int, str],
    caption: str,
    pixel_size: tuple[float, float] = (1.0, 1.0),
) -> Image.Image:
    """Draw slice, overlay and legend side by side for people.

    Args:
        grey: ``(H, W)`` uint8.
        labels: ``(H, W)`` integer ids.
        colors: id -> colour name.
        names: id -> structure name.
        caption: one line above the pictures.
        pixel_size: height and width of a pixel in mm; the pictures keep the patient's proportions.
    """
    panel_size = _panel_size(grey.shape, pixel_size)
    plain = _resize(grey_to_rgb(grey), panel_size, Image.Resampling.BILINEAR)
    painted = _paint_panel(grey, labels, colors, panel_size)
    rows = [(colors[label], names.get(label, f"label {label}")) for label in colors]
    legend_width = 20 + max((_text_width(name) for _, name in rows), default=60) + 12
    width = 2 * panel_size[0] + 8 + legend_width
    height = max(panel_size[1], 16 * len(rows) + 8) + 20
    figure = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(figure)
    draw.text((4, 4), caption, fill="black")
    figure.paste(plain, (0, 20))
    figure.paste(painted, (panel_size[0] + 4, 20))
    left = 2 * panel_size[0] + 14
    if not rows:
        draw.text((left, 26), "no label here", fill="black")
    for index, (color, name) in enumerate(rows):
        top = 24 + 16 * index
        draw.rectangle((left, top + 1, left + 10, top + 11), fill=_to_bytes(color), outline="black")
        draw.text((left + 15, top), name, fill="black")
    return figure


def _panel_size(shape: tuple[int, ...], pixel_size: tuple[float, float], longest: int = 384) -> tuple[int, int]:
    height, width = shape[0] * pixel_size[0], shape[1] * pixel_size[1]
    scale = longest / max(height, width)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _resize(rgb: np.ndarray, size: tuple[int, int], resampling: Image.Resampling) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(rgb)).resize(size, resampling)


def _paint_panel(grey: np.ndarray, labels: np.ndarray, colors: Mapping[int, str], size: tuple[int, int]) -> Image.Image:
    """Blend at display size, undimmed outside the labels, so that small structures stay crisp."""
    picture = np.asarray(_resize(grey_to_rgb(grey), size, Image.Resampling.BILINEAR)).astype(np.float32)
    shown = np.asarray(Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    for label, color in colors.items():
        inside = shown == label
        picture[inside] = picture[inside] * 0.55 + np.array(RGB[color]) * 255 * 0.45
    return Image.fromarray(picture.astype(np.uint8))


def _to_bytes(color: str) -> tuple[int, int, int]:
    red, green, blue = (round(part * 255) for part in RGB[color])
    return red, green, blue


def _text_width(text: str) -> int:
    return int(ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength(text))
