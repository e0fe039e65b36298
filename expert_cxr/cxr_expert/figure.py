"""Pictures for people: the scores of a radiograph as a bar chart, and reliability plots."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from PIL import Image, ImageDraw

_ROW_HEIGHT = 18
_NAME_WIDTH = 180
_BAR_WIDTH = 240
_VALUE_WIDTH = 84
_TOP = 24
_PANEL, _MARGIN, _PANELS_PER_ROW = 160, 26, 4

# Points (stated probability, true frequency) before and after calibration.
Curves = tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]]

_POSITIVE, _NEGATIVE, _GREY = (200, 60, 40), (70, 110, 160), (150, 150, 150)


def draw_scores(scores: Mapping[str, float], untrained: Collection[str] = (), title: str = "CXR") -> Image.Image:
    """Draw one horizontal bar per finding, with a line at the threshold of 0.5.

    Args:
        scores: finding -> score in 0..1, drawn from top to bottom.
        untrained: findings without a trained head; they get a remark in place of a bar.
        title: one line above the bars.
    """
    size = (_NAME_WIDTH + _BAR_WIDTH + _VALUE_WIDTH, _TOP + _ROW_HEIGHT * len(scores) + 8)
    figure = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(figure)
    draw.text((6, 5), title, fill="black")
    for row, (finding, score) in enumerate(scores.items()):
        top = _TOP + row * _ROW_HEIGHT
        draw.text((6, top + 2), finding.replace("_", " "), fill="black")
        if finding in untrained:
            draw.text((_NAME_WIDTH, top + 2), "not trained", fill=_GREY)
            continue
        end = _NAME_WIDTH + round(_BAR_WIDTH * score)
        draw.rectangle((_NAME_WIDTH, top + 3, end, top + 13), fill=_POSITIVE if score > 0.5 else _NEGATIVE)
        draw.text((_NAME_WIDTH + _BAR_WIDTH + 8, top + 2), f"{score:.2f}", fill="black")
    middle = _NAME_WIDTH + _BAR_WIDTH // 2
    draw.line((middle, _TOP, middle, size[1] - 6), fill="black")
    return figure


def draw_reliability(curves: Mapping[str, Curves]) -> Image.Image:
    """Draw one panel per finding: true frequency over stated probability, both 0..1.

    Red is before calibration, blue after; the grey diagonal is a perfect calibration.

    Args:
        curves: finding -> points before and points after.
    """
    rows = -(-len(curves) // _PANELS_PER_ROW)
    cell = _PANEL + _MARGIN
    figure = Image.new("RGB", (cell * _PANELS_PER_ROW + _MARGIN, cell * rows + 2 * _MARGIN), "white")
    draw = ImageDraw.Draw(figure)
    draw.text((_MARGIN, 6), "true frequency over stated probability: red before, blue after calibration", fill="black")
    for index, (finding, pair) in enumerate(curves.items()):
        left = _MARGIN + cell * (index % _PANELS_PER_ROW)
        top = 2 * _MARGIN + cell * (index // _PANELS_PER_ROW)
        _draw_panel(draw, left, top, finding, pair)
    return figure


def _draw_panel(draw: ImageDraw.ImageDraw, left: int, top: int, title: str, pair: Curves) -> None:
    draw.text((left, top - 14), title.replace("_", " "), fill="black")
    draw.rectangle((left, top, left + _PANEL, top + _PANEL), outline="black")
    draw.line((left, top + _PANEL, left + _PANEL, top), fill=_GREY)
    for points, color in zip(pair, (_POSITIVE, _NEGATIVE), strict=True):
        places = [(left + _PANEL * stated, top + _PANEL * (1 - true)) for stated, true in points]
        draw.line(places, fill=color, width=2)
        for x, y in places:
            draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
