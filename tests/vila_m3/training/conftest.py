import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from small_training import dataset, start

__all__ = ["dataset", "start"]
