import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from small_training import dataset, start  # noqa: E402

__all__ = ["dataset", "start"]
