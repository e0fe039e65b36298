"""Runs a bundle's configs under torchrun, on the CPU."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def run_processes(count: int, bundle: Path, configs: Sequence[str], options: Mapping[str, Any], folder: Path) -> str:
    """Run configs of a bundle with ``count`` processes of one thread in ``folder``; return what they printed."""
    files = str([str(bundle / "configs" / name) for name in configs])
    overrides = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"),
            *("-m", "monai.bundle", "run", "--config_file", files, *overrides),
        ],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
