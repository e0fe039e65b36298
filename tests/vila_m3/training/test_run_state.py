"""Kills, damaged files and a full disk: a training goes on as if nothing had happened."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import Losses

from vila_m3_common.errors import UserError


def everything(trainer: Any) -> dict[str, torch.Tensor]:
    """Weights, averages and optimizer state by name."""
    state = {f"weight {name}": value.detach().clone() for name, value in trainer.network.named_parameters()}
    state |= {f"average {name}": value.clone() for name, value in trainer.average.averages.items()}
    for number, values in trainer.optimizer.state_dict()["state"].items():
        state |= {f"optimizer {number} {name}": value.clone() for name, value in values.items()}
    return state


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@pytest.mark.parametrize("last", [1, 2, 3])
def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(start: Any, last: int) -> None:
    """Cut after each step of 2 epochs of 2 steps; epochs end after step 2."""
    whole = Losses()
    straight = start(handlers=[whole], folder="straight")
    straight.run()
    expected, noise = everything(straight), torch.rand(3)
    first, second = Losses(), Losses()
    cut = start(handlers=[first], folder="cut", state={"interval": 1})
    cut.add_event_handler(_completed(), _stop_after(last))
    with pytest.raises(KeyboardInterrupt):
        cut.run()
    torch.rand(7)
    resumed = start(handlers=[second], folder="cut")
    resumed.run()
    assert first.values | second.values == whole.values
    assert min(second.values) == last + 1
    assert_identical(everything(resumed), expected)
    assert torch.equal(torch.rand(3), noise)


def _completed() -> Any:
    from ignite.engine import Events

    return Events.ITERATION_COMPLETED


def _stop_after(last: int) -> Any:
    def stop(engine: Any) -> None:
        if engine.state.iteration == last:
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("name", ["shared.pt", "__0_0.distcp", "manifest.json", ".metadata"])
def test_a_truncated_checkpoint_gives_way_to_the_one_before(
    start: Any, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    whole = Losses()
    straight = start(handlers=[whole], folder="state")
    straight.run()
    damaged = tmp_path / "state/step_00000004" / name
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    expected, again = everything(straight), Losses()
    resumed = start(handlers=[again], folder="state")
    resumed.run()
    assert again.values == {4: whole.values[4]}
    assert "step_00000004 is damaged" in caplog.text
    assert_identical(everything(resumed), expected)


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_full_disk_leaves_the_last_good_checkpoint(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """From the third step on the file system takes nothing more."""
    import vila_m3.run_state as run_state

    save, calls = torch.save, []

    def limited(value: Any, path: Any, **keywords: Any) -> None:
        calls.append(path)
        if "step_00000003" in str(path) or "step_00000004" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(value, path, **keywords)

    monkeypatch.setattr(run_state.torch, "save", limited)
    losses = Losses()
    trainer = start(handlers=[losses], folder="state", state={"on_full": policy})
    if policy == "stop":
        with pytest.raises(UserError, match=r"step_00000003 could not be written \(No space left on device\)"):
            trainer.run()
    else:
        trainer.run()
        assert max(losses.values) == 4
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step_00000001", "step_00000002"]
    again = Losses()
    start(handlers=[again], folder="state").run()
    assert min(again.values) == 3


def test_other_batches_do_not_go_on_with_a_checkpoint(start: Any) -> None:
    start(folder="state").run()
    with pytest.raises(UserError, match=r"another epoch_length 5 \(was 2\), batch_size 2 \(was 4\)"):
        start(folder="state", step_size=2).run()


@pytest.mark.slow
def test_a_killed_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """``kill -9`` after three different steps of one training, in processes of their own."""
    script = Path(__file__).with_name("killed_training.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(script)]
    subprocess.run([*run, tmp_path / "straight", "0"], check=True, env=environment)
    for step in (2, 5, 7):
        killed = subprocess.run([*run, tmp_path / "killed", str(step)], env=environment)
        assert killed.returncode == -signal.SIGKILL
    subprocess.run([*run, tmp_path / "killed", "0"], check=True, env=environment)
    straight, resumed = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("straight", "killed"))
    assert_identical(straight, resumed)
