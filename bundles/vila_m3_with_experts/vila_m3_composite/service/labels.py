"""Which colour each label of an expert's label map has on the page: that of its own legend, where it has one."""

from __future__ import annotations

from typing import Any

import nibabel as nib
import numpy as np

from vila_m3_common.expert import ExpertResult
from vila_m3_common.overlay import COLOR_CYCLE, RGB


def label_rows(result: ExpertResult) -> list[dict[str, Any]]:
    """Return label, name and colour of every label in an expert's label map, in ascending order.

    The legend of the expert tells the colours of one slice; the labels that this slice misses get the colours that it
    leaves free.
    """
    if result.label_map_path is None or not result.label_map_path.is_file():
        return []
    image = nib.Nifti1Image.from_filename(result.label_map_path)
    labels = [int(label) for label in np.unique(np.asarray(image.dataobj)) if label > 0]
    names = {row["label"]: row["name"] for row in result.measurements if isinstance(row.get("label"), int)}
    spoken = {name: color for color, told in result.legend.items() for name in told.split(", ")}
    free = [color for color in dict.fromkeys(COLOR_CYCLE) if color not in result.legend] or list(COLOR_CYCLE)
    rows: list[dict[str, Any]] = []
    for label in labels:
        name = names.get(label, f"label {label}")
        color = spoken.get(name) or free[len([row for row in rows if row["name"] not in spoken]) % len(free)]
        rows.append({"label": label, "name": name, "color": color, "rgb": hex_color(color)})
    return rows


def hex_color(name: str) -> str:
    """Return a colour name of the overlays as ``#rrggbb``."""
    return "#" + "".join(f"{round(255 * part):02x}" for part in RGB[name])
