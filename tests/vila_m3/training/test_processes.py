"""Two processes do what one does on the same batches, and take up each other's checkpoints; one that fails ends all."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_training import write_records

from vila_m3.export import save_released

SCRIPT = Path(__file__).with_name("killed_training.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def train(folder: Path, mode: str, last: int = 0) -> dict[str, torch.Tensor] | None:
    """Train with SGD; return weights and losses, or None when it ends after step ``last``."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, *(TORCHRUN if mode != "single" else []), str(SCRIPT), str(folder), str(last), mode]
    subprocess.run([*command, "SGD"], check=True, env=ENVIRONMENT, timeout=500)
    return None if last else torch.load(folder / "end.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_are_one_step_by_step(tmp_path: Path, mode: str) -> None:
    """Eight steps with packed, text-only and image batches, unlike numbers of rows; weights and losses to 1e-5."""
    one, two = train(tmp_path / "one", "single"), train(tmp_path / "two", mode)
    assert one is not None
    assert two is not None
    names = {name.removeprefix("module."): name for name in two}
    assert set(names) == set(one)
    for name, value in one.items():
        torch.testing.assert_close(two[names[name]], value, atol=1e-5, rtol=0, msg=name)


class Launch:
    """Runs the configs of a stage under torchrun, or in one process, on a tiny checkpoint and gloo."""

    def __init__(self, folder: Path, configs: Path) -> None:
        self.folder = folder
        self.configs = configs

    def command(self, out: str, overlays: tuple[str, ...], settings: dict[str, Any]) -> list[str]:
        given = {
            "start_checkpoint": str(self.folder / "start"),
            "train_files": [str(self.folder / "data/records.jsonl")],
            "val_files": [str(self.folder / "data/records.jsonl")],
            "image_root": str(self.folder / "data"),
            "checkpoint_out": str(self.folder / out / "model"),
            "ckpt_dir": str(self.folder / out / "ckpt"),
            "device": "cpu",
            # Adam would make a step of the learning rate out of the rounding error of a gradient that is 0.
            "records#optimizer": {
                "_target_": "torch.optim.SGD",
                "params": {"_target_": "vila_m3.trainer.trained_parameters", "network": "@records#learner"},
                "lr": "@learning_rate",
            },
            "amp_dtype": "float32",
            "learning_rate": 0.3,
            "epochs": 1,
            "batch_size": 4,
            "replica_count": 2,
            "pack_length": 300,
            "val_count": 3,
            "val_new_tokens": 8,
            **settings,
        }
        (self.folder / f"{out}.json").write_text(json.dumps(given))
        files = [
            *(str(self.configs / f"{name}.json") for name in ("train", *overlays)),
            str(self.folder / f"{out}.json"),
        ]
        is_many = overlays[-1] in ("multi_gpu_train", "fsdp_train")
        launcher = [sys.executable, *(TORCHRUN if is_many else [])]
        return [*launcher, "-m", "monai.bundle", "run", "--config_file", str(files), "--logging_file", "False"]

    def __call__(self, out: str, *overlays: str, fails: bool = False, **settings: Any) -> dict[str, torch.Tensor]:
        """Return the weights that come out, and the losses of the card; nothing when it is meant to fail."""
        run = subprocess.run(
            self.command(out, overlays, settings), env=ENVIRONMENT, timeout=500, capture_output=True, text=True
        )
        assert (run.returncode != 0) == fails, run.stderr[-3000:]
        self.errors = run.stderr
        if fails:
            return {}
        card = json.loads((self.folder / out / "model/model_card.json").read_text())
        numbers = {name: torch.tensor(card["metrics"][name]) for name in ("loss", "held_out_loss", "exact_match")}
        return {**load_file(self.folder / out / "model/one_folder/model.safetensors"), **numbers}


@pytest.fixture
def launch(tmp_path: Path, repository: Path, model: Any, processor: Any) -> Launch:
    """Twelve conversations, of which every fifth is text alone."""
    save_released(model, processor, tmp_path / "start", torch.float32)
    write_records(tmp_path / "data", range(12))
    return Launch(tmp_path, repository / "vila_m3_bundle/configs")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.slow
def test_the_configs_of_two_processes_give_what_one_gives(launch: Launch) -> None:
    """DDP and FSDP2, weights and losses to 1e-5; the weights have moved by far more."""
    expected = launch("one", "train_stage3_instruct")
    start = load_file(launch.folder / "start/mm_projector/model.safetensors")
    assert max(float((expected[f"mm_projector.{name}"] - value).abs().max()) for name, value in start.items()) > 1e-3
    assert_close(launch("ddp", "train_stage3_instruct", "multi_gpu_train"), expected)
    assert_close(launch("fsdp", "train_stage3_instruct", "fsdp_train"), expected)


@pytest.mark.slow
def test_an_adapter_trained_in_shares_is_the_one_of_one_process(launch: Launch) -> None:
    """DoRA without dropout, with a moving average, merged into the weights that come out."""
    settings: dict[str, Any] = {
        "adapter": {"rank": 4, "dropout": 0.0, "use_dora": True},
        "ema_decay": 0.5,
        "learning_rate": 1e-3,
    }
    settings |= {"records#optimizer#_target_": "torch.optim.AdamW", "records#optimizer#fused": True}
    expected = launch("one", "train_lora", **settings)
    assert_close(launch("fsdp", "train_lora", "fsdp_train", **settings), expected)


@pytest.mark.slow
def test_checkpoints_of_shares_go_from_two_processes_to_one_and_back(launch: Launch) -> None:
    """Cut after steps 1 and 2 of 3; the order of the two processes is kept without naming it."""
    expected = launch("one", "train_stage3_instruct")
    kept = {"replica_count": None, "save_interval": 1}

    def stop(last: int) -> list[dict[str, Any]]:
        return [{"_target_": "small_training.Stop", "last": last}]

    launch("moved", "train_stage3_instruct", "fsdp_train", fails=True, **kept, **{"train#handlers": stop(2)})
    launch("moved", "train_stage3_instruct", fails=True, **kept, **{"train#handlers": stop(3)})
    states = sorted(path.name for path in (launch.folder / "moved/ckpt/state").glob("step_*"))
    assert states == ["step_00000001", "step_00000002"]
    assert_close(launch("moved", "train_stage3_instruct", "fsdp_train", **kept), expected)


@pytest.mark.slow
def test_a_corrupt_image_of_one_process_ends_all_with_its_name(launch: Launch) -> None:
    """Within a minute of the first process's end; the others would else wait for it for half an hour."""
    (launch.folder / "data/7_0.png").write_bytes(b"no picture")
    start = time.monotonic()
    launch("ddp", "train_stage3_instruct", "multi_gpu_train", fails=True)
    assert "error: row 8 of data set conversations" in launch.errors
    assert time.monotonic() - start < 300


@pytest.mark.slow
def test_a_full_disk_of_one_process_is_told_by_all(launch: Launch) -> None:
    """From step 2 on the kernel takes no file of more than 1 KiB from process 1."""
    full = [{"_target_": "small_training.FullDisk", "after": 1, "rank": 1, "limit": 1024}]
    settings: dict[str, Any] = {"save_interval": 1, "train#handlers": full}
    launch("fsdp", "train_stage3_instruct", "fsdp_train", fails=True, **settings)
    assert "step_00000002 could not be written (" in launch.errors
    states = [path.name for path in (launch.folder / "fsdp/ckpt/state").iterdir()]
    assert states == ["step_00000001"]
