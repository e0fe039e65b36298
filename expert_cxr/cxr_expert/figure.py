"""The scores of a radiograph as a bar chart for people."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from PIL import Image, ImageDraw

_ROW_HEIGHT = 18
_NAME_WIDTH = 180
_BAR_WIDTH = 240
_VALUE_WIDTH = 84
_TOP = 24
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
