"""The app that ``monailabel start_server --app`` is given; see ``docs/monailabel.md``."""

import sys
from pathlib import Path

# In a packaged bundle its own code, and that of its members, lies beside this folder.
ROOT = Path(__file__).resolve().parents[1]
for folder in (*sorted(ROOT.glob("members/*")), ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(1, str(folder))

from vila_m3_composite.viewer.workarounds import apply_all  # noqa: E402

apply_all()

from vila_m3_composite.viewer.tasks import ViewerApp  # noqa: E402

__all__ = ["ViewerApp"]
