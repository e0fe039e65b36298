"""The 132 structures of VISTA3D (id, name) and the label groups that its triggers name.

Data: ``anatomy.json``, the label dictionary of the Model Zoo's ``vista3d`` bundle 0.5.4 and the label groups of the
VILA-M3 demonstration. The CT expert segments by it, data preparation and training name structures by it.
"""

from __future__ import annotations

import json
from pathlib import Path

_DATA = json.loads((Path(__file__).parent / "anatomy.json").read_text())

NAMES: dict[int, str] = dict(enumerate(_DATA["names"], start=1))
EVERYTHING: tuple[int, ...] = tuple(_DATA["everything"])
GROUPS: dict[str, tuple[int, ...]] = {"everything": EVERYTHING} | {
    name: tuple(ids) for name, ids in _DATA["groups"].items()
}
TUMORS = {"hepatic tumor": 26, "pancreatic tumor": 24, "lung tumor": 23, "bone lesion": 128}
