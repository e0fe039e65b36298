"""Two processes do what one does on the same batches, and take up each other's checkpoints."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("killed_training.py")


def train(folder: Path, mode: str, processes: int, last: int = 0) -> dict[str, torch.Tensor] | None:
    """Train with SGD; return weights and losses, or None when it ends after step ``last``."""
    folder.mkdir(exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if mode != "single" else [])]
    subprocess.run(
        [*command, str(SCRIPT), str(folder), str(last), mode, "SGD"],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    return None if last else torch.load(folder / "end.pt", weights_only=True)


def assert_close(first: dict[str, torch.Tensor] | None, second: dict[str, torch.Tensor] | None) -> None:
    assert first is not None
    assert second is not None
    assert {name.removeprefix("module.") for name in first} == {name.removeprefix("module.") for name in second}
    length = min(len(first["losses"]), len(second["losses"]))
    for name, value in first.items():
        found, expected = (second[name], value) if name != "losses" else (second[name][-length:], value[-length:])
        torch.testing.assert_close(found, expected.to(found.dtype), atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path: Path, mode: str) -> None:
    """Eight steps with packed, text-only and image batches, two micro-batches each: weights and losses to 1e-5."""
    assert_close(train(tmp_path / "one", "single", 1), train(tmp_path / "two", mode, 2))


@pytest.mark.slow
def test_sharded_checkpoints_go_from_two_processes_to_one_and_back(tmp_path: Path) -> None:
    """Cut after steps 2 and 5 of 8; weights and losses as of an uncut process to 1e-5."""
    expected = train(tmp_path / "one", "single", 1)
    train(tmp_path / "moved", "fsdp", 2, last=2)
    train(tmp_path / "moved", "fsdp", 1, last=5)
    assert_close(expected, train(tmp_path / "moved", "fsdp", 2))
