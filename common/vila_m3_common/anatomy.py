"""The 132 structures of VISTA3D (id, name) and the label groups that its triggers name.

The CT expert segments by this table; data preparation and training name structures by it. Data: ``anatomy.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TABLE: dict[str, Any] = json.loads((Path(__file__).parent / "anatomy.json").read_text())

NAMES: dict[int, str] = {int(label): name for label, name in TABLE["names"].items()}
GROUPS: dict[str, tuple[int, ...]] = {name: tuple(labels) for name, labels in TABLE["groups"].items()}
TUMORS: dict[str, int] = {NAMES[label]: label for label in TABLE["tumors"]}
