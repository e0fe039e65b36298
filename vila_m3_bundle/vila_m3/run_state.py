"""Checkpoints of a running training: written in one step, checked when read, the older one taken for a damaged one."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ignite.engine import Events
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from vila_m3_common.errors import UserError
from vila_m3_common.training import is_main_process, process_rank

from .batches import StepBatches, check_policy
from .trainer import StageTrainer, world_size

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
SHARED = "shared.pt"


def random_state() -> dict[str, Any]:
    """Return the state of Python's, numpy's and torch's random numbers, as values that ``weights_only`` reads."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, numbers, following = random.getstate()
    return {
        "python": [version, list(numbers), following],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, np.int64)), int(position), int(has_gauss), float(gauss)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to a state of :func:`random_state`."""
    version, numbers, following = state["python"]
    random.setstate((version, tuple(numbers), following))
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def write_manifest(folder: Path) -> None:
    """Write the size and SHA-256 of every file of a folder next to them."""
    files = {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex digits."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def damage_of(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint; None when every file is as it was written."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        for name, facts in files.items():
            path = folder / name
            if path.stat().st_size != facts["size"]:
                return f"{name} has {path.stat().st_size} bytes, written were {facts['size']}"
            if sha256_of(path) != facts["sha256"]:
                return f"{name} is not what was written"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"its manifest cannot be read ({error})"
    return None


class RunState:
    """Saves the whole state of a training every few steps and takes the newest whole one up again.

    A checkpoint is a folder ``step_<number>`` that appears by renaming when all of it is written and hashed. Weights
    and optimizer state are written with ``torch.distributed.checkpoint``: each process writes its shares, and another
    number of processes can read them.

    Args:
        folder: of the checkpoints.
        network: what the trainer trains.
        optimizer: its optimizer.
        scheduler: of the learning rate.
        sampler: is told where to go on.
        parts: further objects with ``state_dict`` and ``load_state_dict`` (the best metric, ...).
        interval: steps between two checkpoints; the end of an epoch is always saved.
        keep: number of checkpoints that stay.
        on_full: ``stop`` when a checkpoint cannot be written (a full disk), or ``skip`` it; the older ones stay.
    """

    def __init__(
        self,
        folder: str | Path,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scheduler: Any,
        sampler: StepBatches,
        parts: Mapping[str, Any] | None = None,
        interval: int = 500,
        keep: int = 2,
        on_full: str = "stop",
    ) -> None:
        self.folder = Path(folder)
        self.network = network
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.sampler = sampler
        self.parts = dict(parts or {})
        self.interval = interval
        self.keep = max(1, keep)
        self.on_full = check_policy("on_full", on_full)
        self._random: Mapping[str, Any] | None = None

    def attach(self, engine: StageTrainer) -> None:
        """Attach last, so that what other handlers changed in a step is saved with it."""
        engine.add_event_handler(Events.STARTED, self._resume)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._restore_random)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self.save)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def _shared(self, engine: StageTrainer) -> dict[str, Any]:
        """Return what is the same for all processes."""
        return {
            "iteration": engine.state.iteration,
            "epoch_length": engine.state.epoch_length,
            "step_size": self.sampler.step_size,
            "seed": self.sampler.seed,
            "scheduler": self.scheduler.state_dict(),
            "scaler": engine.grad_scaler.state_dict(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def _tensors(self, engine: StageTrainer) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.network, self.optimizer)
        tensors = {"model": model, "optimizer": optimizer}
        if engine.average is not None:
            tensors["average"] = engine.average.state_dict()
        return tensors

    def save(self, engine: StageTrainer) -> None:
        """Write a checkpoint of the step that has just ended.

        Raises:
            UserError: if it cannot be written and ``on_full`` is ``stop``.
        """
        target = self.folder / f"step_{engine.state.iteration:08d}"
        if damage_of(target) is None:
            return
        partial = self.folder / f"{target.name}.partial"
        problem = self._write(engine, partial)
        if self._any(problem is not None):
            self._give_up(partial, target, problem)
            return
        if is_main_process():
            shutil.rmtree(target, ignore_errors=True)
            partial.replace(target)
            for old in self.checkpoints()[self.keep :]:
                shutil.rmtree(old)
        _wait()

    def _write(self, engine: StageTrainer, partial: Path) -> OSError | None:
        """Write all files of a checkpoint; return why that was not possible."""
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
        _wait()
        try:
            dcp.save(self._tensors(engine), checkpoint_id=str(partial), no_dist=world_size() == 1)
            torch.save(random_state(), partial / f"random_{process_rank()}.pt")
            _wait()
            if is_main_process():
                torch.save(self._shared(engine), partial / SHARED)
                write_manifest(partial)
        except Exception as error:
            found = _disk_error(error)
            if found is None:
                raise
            return found
        return None

    def _give_up(self, partial: Path, target: Path, problem: OSError | None) -> None:
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        reason = problem.strerror if problem else "another process could not write"
        message = f"checkpoint {target} could not be written ({reason}); the one before it is whole"
        if self.on_full == "stop":
            raise UserError(f"{message}; make room and start again, the training goes on from there")
        logger.warning("%s", message)

    def _any(self, flag: bool) -> bool:
        if world_size() == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def checkpoints(self) -> list[Path]:
        """Return the checkpoints, the newest first, whole or not."""
        return sorted((path for path in self.folder.glob("step_*") if path.suffix != ".partial"), reverse=True)

    def newest(self) -> Path | None:
        """Return the newest checkpoint that is whole."""
        for path in self.checkpoints():
            damage = damage_of(path)
            if damage is None:
                return path
            logger.warning("checkpoint %s is damaged (%s); the one before it is used", path, damage)
        return None

    def _resume(self, engine: StageTrainer) -> None:
        self.sampler.first_step = engine.state.iteration
        path = self.newest()
        if path is None:
            return
        shared = torch.load(path / SHARED, map_location="cpu", weights_only=True)
        self._check(shared, engine, path)
        # With gradients at hand torch takes an empty optimizer state as it is, and would load nothing into it.
        self.optimizer.zero_grad(set_to_none=True)
        tensors = self._tensors(engine)
        dcp.load(tensors, checkpoint_id=str(path), no_dist=world_size() == 1)
        set_state_dict(
            self.network, self.optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
        )
        if engine.average is not None:
            engine.average.load_state_dict(tensors["average"])
        self.scheduler.load_state_dict(shared["scheduler"])
        engine.grad_scaler.load_state_dict(shared["scaler"])
        for name, part in self.parts.items():
            part.load_state_dict(shared["parts"][name])
        mine = path / f"random_{process_rank()}.pt"
        if mine.is_file():
            self._random = torch.load(mine, map_location="cpu", weights_only=True)
        engine.state.iteration = self.sampler.first_step = shared["iteration"]
        engine.state.epoch = shared["iteration"] // shared["epoch_length"]
        if is_main_process():
            print(f"going on after step {shared['iteration']}, from {path}")

    def _check(self, shared: Mapping[str, Any], engine: StageTrainer, path: Path) -> None:
        now = {
            "epoch_length": engine.state.epoch_length,
            "step_size": self.sampler.step_size,
            "seed": self.sampler.seed,
        }
        differing = [f"{name} {value} (was {shared[name]})" for name, value in now.items() if shared[name] != value]
        if differing:
            raise UserError(
                f"checkpoint {path} is of a training with another {', '.join(differing)}; go on with the same data "
                "and batches, or give another ckpt_dir"
            )

    def _restore_random(self, engine: StageTrainer) -> None:
        """Once, when the loader's start has used up its random numbers."""
        if self._random is not None:
            set_random_state(self._random)
            self._random = None


def _wait() -> None:
    if world_size() > 1:
        dist.barrier()


def _disk_error(error: BaseException) -> OSError | None:
    """Return the error of the file system behind what a writer raised, if there is one."""
    seen: list[BaseException] = [error, *getattr(error, "failures", {}).values()]
    for found in seen:
        inner: BaseException | None = found[0] if isinstance(found, tuple) else found
        while inner is not None:
            if isinstance(inner, OSError):
                return inner
            inner = inner.__cause__ or inner.__context__
    if any(word in str(error) for word in ("No space left", "PytorchStreamWriter", "iostream error", "file write")):
        return OSError(errno.ENOSPC, "no space left on device")
    return None
