"""Kills, damaged files and a full disk: a training goes on as if nothing had happened."""

import json
import os
import pathlib
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from small_training import FullDisk, Losses

from vila_m3 import resumable_files
from vila_m3.checkpoint import load_checkpoint
from vila_m3.run_state import _load, write_manifest
from vila_m3.train_handlers import BestCheckpoint, GeneratedValidation
from vila_m3_common.errors import UserError

SCRIPT = Path(__file__).with_name("killed_training.py")


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
    # The last step of an epoch is saved behind its validation, and so is done again.
    assert min(second.values) == (last if last == 2 else last + 1)
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


@contextmanager
def limit_lifted_behind() -> Iterator[None]:
    """Lift the limit of :class:`small_training.FullDisk` at the end, before this process writes anything else."""
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_full_disk_leaves_the_last_good_checkpoint(start: Any, tmp_path: Path, policy: str) -> None:
    """From the third step on the kernel refuses files above 20 KiB."""
    losses = Losses()
    trainer = start(handlers=[losses, FullDisk(2, 20_000)], folder="state", state={"on_full": policy})
    problem = r"step_00000003 could not be written \((File too large|the file system took no more)\)"
    with limit_lifted_behind(), pytest.raises(UserError, match=problem) if policy == "stop" else nullcontext():
        trainer.run()
    assert policy == "stop" or max(losses.values) == 4
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["step_00000001", "step_00000002"]
    again = Losses()
    start(handlers=[again], folder="state").run()
    assert min(again.values) == 3


def test_a_full_disk_leaves_the_best_model(
    start: Any, tmp_path: Path, model: Any, dataset: Any, processor: Any
) -> None:
    """The second epoch's is better, but cannot be written."""
    folder = tmp_path / "best"
    best = BestCheckpoint(model, processor, folder, metric="held_out_loss")
    validation = GeneratedValidation(model, processor, dataset, tmp_path / "samples", count=1, max_new_tokens=2)
    trainer = start(handlers=[FullDisk(3, 20_000), best, validation])
    problem = r"best could not be written \(.*\); what stood there still does"
    with limit_lifted_behind(), pytest.raises(UserError, match=problem):
        trainer.run()
    card = json.loads((folder / "model_card.json").read_text())
    assert card["epoch"] == 1
    load_checkpoint(folder)
    assert sorted(path.name for path in tmp_path.glob("best*")) == ["best"]


def test_samples_that_cannot_be_written_end_the_training_with_a_message(
    start: Any, tmp_path: Path, model: Any, dataset: Any, processor: Any
) -> None:
    (tmp_path / "samples").write_text("a file in the folder's place")
    validation = GeneratedValidation(model, processor, dataset, tmp_path / "samples", count=1, max_new_tokens=2)
    with pytest.raises(UserError, match=r"samples could not be written \(File exists\); make room and start again"):
        start(handlers=[validation]).run()


@pytest.mark.slow
def test_a_really_full_file_system_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    """A tmpfs with room for two and a half checkpoints, mounted in a name space of its own."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a tmpfs of his own")
    straight, kept, mounted = tmp_path / "straight", tmp_path / "kept", tmp_path / "mounted"
    for folder in (straight, kept, mounted):
        folder.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = f"{sys.executable} {SCRIPT}"
    subprocess.run(f"{run} {straight} 0", shell=True, check=True, env=environment)
    size = sum(path.stat().st_size for path in (straight / "state/step_00000008").iterdir())
    script = (
        f"mount -t tmpfs -o size={size * 5 // 2} tmpfs {mounted}; {run} {mounted} 0; code=$?; "
        f"cp -r {mounted}/state {kept}; exit $code"
    )
    full = subprocess.run(["unshare", "-Urm", "sh", "-c", script], capture_output=True, text=True, env=environment)
    assert full.returncode == 1
    assert "step_00000003 could not be written (" in full.stderr
    assert sorted(path.name for path in (kept / "state").iterdir()) == ["step_00000001", "step_00000002"]
    subprocess.run(f"{run} {kept} 0", shell=True, check=True, env=environment)
    assert_identical(*(torch.load(folder / "end.pt", weights_only=True) for folder in (straight, kept)))


def test_an_index_that_calls_something_is_not_read(start: Any, tmp_path: Path) -> None:
    """Hashes cannot tell intent: this one's manifest is right."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'called'}",)

    start(folder="state").run()
    newest = tmp_path / "state/step_00000004"
    (newest / ".metadata").write_bytes(pickle.dumps(Evil()))
    (newest / "manifest.json").unlink()
    write_manifest(newest)
    with pytest.raises(UserError, match="the checkpoint's index names (posix|os).system, which no index of ours does"):
        start(folder="state").run()
    assert not (tmp_path / "called").exists()


def test_a_value_of_a_checkpoint_that_calls_something_is_not_read(tmp_path: Path) -> None:
    dcp.save({"x": pathlib.PurePosixPath("a"), "y": 1}, checkpoint_id=str(tmp_path / "c"), no_dist=True)
    values: dict[str, Any] = {"x": None, "y": 0}
    with pytest.raises(UserError, match="c cannot be read: Weights only load failed"):
        _load(values, tmp_path / "c")


def test_float16_goes_on_with_its_scale_bit_for_bit(start: Any) -> None:
    """The scale doubles every second step."""

    def scaled(**keywords: Any) -> Any:
        trainer = start(folder="half", amp_dtype="float16", epochs=2, **keywords)
        trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        return trainer

    first, second = Losses(last=3), Losses()
    with pytest.raises(KeyboardInterrupt):
        scaled(handlers=[first]).run()
    resumed = scaled(handlers=[second])
    resumed.run()
    whole = Losses()
    straight = start(folder="straight", amp_dtype="float16", epochs=2, handlers=[whole])
    straight.grad_scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    straight.run()
    assert resumed.grad_scaler.state_dict() == straight.grad_scaler.state_dict()
    assert resumed.grad_scaler.get_scale() == 256.0
    assert second.values == {step: whole.values[step] for step in second.values}
    assert_identical(everything(resumed), everything(straight))


def test_an_overflow_in_float16_lowers_the_scale_and_leaves_the_weights(start: Any) -> None:
    trainer = start(epochs=1, amp_dtype="float16")
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    before = everything(trainer)
    trainer.run()
    assert trainer.grad_scaler.get_scale() == 2.0**98
    weights = {name: value for name, value in everything(trainer).items() if name.startswith("weight")}
    assert all(torch.equal(value, before[name]) for name, value in weights.items())


REPLACER = """
import sys
from pathlib import Path
from vila_m3.resumable_files import replace_folder
target = Path(sys.argv[1])
for number in range(10**6):
    new = target.with_name("new")
    new.mkdir()
    (new / "whole").write_text(str(number))
    replace_folder(new, target)
"""


def test_a_folder_is_replaced_so_that_there_is_one_at_any_time(tmp_path: Path) -> None:
    """Another process replaces it without end and is killed; every look finds it."""
    target = tmp_path / "target"
    process = subprocess.Popen([sys.executable, "-c", REPLACER, str(target)])
    while not (target / "whole").exists():
        assert process.poll() is None
    seen: set[int] = set()
    end = time.monotonic() + 60
    while len(seen) < 6 and time.monotonic() < end:
        folder = os.open(target, os.O_DIRECTORY)
        seen.add(os.fstat(folder).st_ino)
        os.close(folder)
    process.kill()
    process.wait()
    assert len(seen) == 6
    assert (target / "whole").read_text().isdigit()


def test_a_folder_is_replaced_where_the_system_exchanges_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resumable_files, "_exchange", lambda first, second: False)
    for number in range(3):
        (tmp_path / "new").mkdir()
        (tmp_path / "new/whole").write_text(str(number))
        resumable_files.replace_folder(tmp_path / "new", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    (tmp_path / "target").rename(tmp_path / "target.old")  # a kill between the two renamings
    resumable_files.recover_folder(tmp_path / "target")
    assert (tmp_path / "target/whole").read_text() == "2"


def test_other_batches_do_not_go_on_with_a_checkpoint(start: Any) -> None:
    start(folder="state").run()
    with pytest.raises(UserError, match=r"another epoch_length 5 \(was 2\), batch_size 2 \(was 4\)"):
        start(folder="state", step_size=2).run()


@pytest.mark.slow
def test_a_killed_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """``kill -9`` after three random steps of one training, and once while a checkpoint is written."""
    seed = int(os.environ.get("VILA_M3_KILL_SEED", time.time_ns() % 10_000))
    steps = sorted(random.Random(seed).sample(range(1, 7), 3))
    print(f"killed after steps {steps}; VILA_M3_KILL_SEED={seed} kills there again")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = [sys.executable, str(SCRIPT)]
    subprocess.run([*run, tmp_path / "straight", "0"], check=True, env=environment)
    for step in steps:
        killed = subprocess.run([*run, tmp_path / "killed", str(step)], env=environment)
        assert killed.returncode == -signal.SIGKILL
    kill_while_writing([*run, str(tmp_path / "killed"), "0"], tmp_path / "killed/state", environment)
    subprocess.run([*run, tmp_path / "killed", "0"], check=True, env=environment)
    straight, resumed = (torch.load(tmp_path / name / "end.pt", weights_only=True) for name in ("straight", "killed"))
    assert_identical(straight, resumed)


def kill_while_writing(command: list[str], state: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(command, env=environment)
    while not list(state.glob("*.partial/*")):
        assert process.poll() is None, "it ended before it was seen to write"
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert list(state.glob("*.partial"))
