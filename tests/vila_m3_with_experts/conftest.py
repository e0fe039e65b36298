"""A composite whose VLM is scripted, so that what is tested is the wiring; and the command as users run it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

CONFIG = "bundles/vila_m3_with_experts/configs/inference.json"


@pytest.fixture(scope="session")
def run_composite(repository: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run ``python -m monai.bundle run`` on the composite in a process of its own."""

    def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(repository / CONFIG), *arguments]
        return subprocess.run(
            command, cwd=cwd or repository, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "2"}
        )

    return run


@pytest.fixture
def read_case() -> Callable[[Path], dict]:
    """Read the ``conversation.json`` of the only case in an output folder, and check that its files are there."""

    def read(output_dir: Path) -> dict:
        (folder,) = output_dir.iterdir()
        record = json.loads((folder / "conversation.json").read_text())
        assert (folder / "answer.txt").read_text().strip() == record["answer"]
        report = (folder / "report.html").read_text()
        assert "<script" not in report
        assert "http" not in report
        for turn in record["turns"]:
            for name in turn["images"]:
                assert (folder / name).is_file()
            for key in ("overlay", "label_map"):
                if turn.get("expert", {}).get(key):
                    assert (folder / turn["expert"][key]).is_file()
        return record

    return read
