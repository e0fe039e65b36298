"""Checkpoints of a running training: written in one step, checked when read, the older one taken for a damaged one."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import pickle
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ignite.engine import Events
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
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


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what the index of a checkpoint consists of, and calls nothing else."""

    _ALLOWED = {
        "builtins": {"dict", "list", "set", "tuple"},
        "collections": {"OrderedDict", "defaultdict"},
        "pathlib": {"Path", "PosixPath", "PurePosixPath"},
        "torch": {"Size", *(name for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype))},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self._ALLOWED.get(module, ()):
            raise UserError(
                f"the checkpoint's index names {module}.{name}, which no index of ours does; it was not read. "
                "Go on only from a ckpt_dir of your own"
            )
        return super().find_class(module, name)


class _SafeReader(FileSystemReader):
    """Reads sharded checkpoints; their index, a pickle, through :class:`_MetadataUnpickler`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with self.fs.create_stream(self._get_metadata_path(kwargs.get("rank")), "rb") as stream:
            metadata: Metadata = _MetadataUnpickler(stream).load()
        if metadata.storage_meta is not None:
            metadata.storage_meta.load_id = self.load_id
        return metadata


class _SafePlanner(DefaultLoadPlanner):
    """Takes of what is not a tensor only plain values."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


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
        engine.add_event_handler(Events.ITERATION_COMPLETED(event_filter=self._is_due), self.save)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)

    def _is_due(self, engine: StageTrainer, step: int) -> bool:
        # The end of an epoch is saved behind its validation, which a resumed training would else leave out.
        return step % self.interval == 0 and step % self.sampler.steps_per_pass != 0

    def _shared(self, engine: StageTrainer) -> dict[str, Any]:
        """Return what is the same for all processes."""
        return {
            "iteration": engine.state.iteration,
            "sampler": self.sampler.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": engine.grad_scaler.state_dict(),
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def _tensors(self, engine: StageTrainer) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.network, self.optimizer)
        return {"model": model, "optimizer": optimizer, "average": engine.average.state_dict()}

    def save(self, engine: StageTrainer) -> None:
        """Write a checkpoint of the step that has just ended.

        Raises:
            UserError: if it cannot be written and ``on_full`` is ``stop``.
        """
        target = self.folder / f"step_{engine.state.iteration:08d}"
        if self._agree(damage_of(target) is None):
            return
        partial = self.folder / f"{target.name}.partial"
        problem = self._write(engine, partial)
        if problem is None:
            problem = together(lambda: self._put_in_place(partial, target) if is_main_process() else None)
        if problem is not None:
            self._give_up(partial, target, problem)

    def _put_in_place(self, partial: Path, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        partial.replace(target)
        for old in self.checkpoints()[self.keep :]:
            shutil.rmtree(old)

    def _write(self, engine: StageTrainer, partial: Path) -> str | None:
        """Write all files of a checkpoint, each process its own; return why that was not possible for any of them."""
        is_main = is_main_process()
        steps: list[Callable[[], None]] = [
            lambda: self._make_room(partial) if is_main else None,
            lambda: dcp.save(self._tensors(engine), checkpoint_id=str(partial), no_dist=world_size() == 1),
            lambda: torch.save(random_state(), partial / f"random_{process_rank()}.pt"),
            lambda: torch.save(self._shared(engine), partial / SHARED) if is_main else None,
            lambda: write_manifest(partial) if is_main else None,
        ]
        for step in steps:
            problem = together(step)
            if problem is not None:
                return problem
        return None

    def _make_room(self, partial: Path) -> None:
        shutil.rmtree(partial, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)

    def _give_up(self, partial: Path, target: Path, problem: str) -> None:
        if is_main_process():
            shutil.rmtree(partial, ignore_errors=True)
        message = f"checkpoint {target} could not be written ({problem}); the one before it is whole"
        if self.on_full == "stop":
            raise UserError(f"{message}; make room and start again, the training goes on from there")
        if is_main_process():
            logger.warning("%s", message)

    def _agree(self, flag: bool) -> bool:
        """Return what rank 0 finds."""
        flags = [flag]
        if world_size() > 1:
            dist.broadcast_object_list(flags, src=0)
        return flags[0]

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
        try:
            self.sampler.load_state_dict(shared["sampler"])
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        # With gradients at hand torch takes an empty optimizer state as it is, and would load nothing into it.
        self.optimizer.zero_grad(set_to_none=True)
        tensors = self._tensors(engine)
        _load(tensors, path)
        set_state_dict(
            self.network, self.optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"]
        )
        engine.average.load_state_dict(tensors["average"])
        self.scheduler.load_state_dict(shared["scheduler"])
        engine.grad_scaler.load_state_dict(shared["scaler"])
        for name, part in self.parts.items():
            part.load_state_dict(shared["parts"][name])
        mine = path / f"random_{process_rank()}.pt"
        if mine.is_file():
            self._random = torch.load(mine, map_location="cpu", weights_only=True)
        self._go_on(engine, shared["iteration"], path)

    def _go_on(self, engine: StageTrainer, iteration: int, path: Path) -> None:
        engine.state.iteration = self.sampler.first_step = iteration
        engine.state.epoch = iteration // self.sampler.steps_per_pass
        if is_main_process():
            is_done = iteration >= len(self.sampler)
            what = "training is complete; to train anew remove" if is_done else f"going on after step {iteration}, from"
            print(f"{what} {path.parent if is_done else path}")

    def _restore_random(self, engine: StageTrainer) -> None:
        """Once, when the loader's start has used up its random numbers."""
        if self._random is not None:
            set_random_state(self._random)
            self._random = None


def _load(tensors: dict[str, Any], path: Path) -> None:
    """Fill ``tensors`` from a checkpoint.

    Raises:
        UserError: telling why it cannot be read.
    """
    try:
        dcp.load(tensors, storage_reader=_SafeReader(path), planner=_SafePlanner(), no_dist=world_size() == 1)
    except CheckpointException as error:
        reasons = "; ".join(dict.fromkeys(str(failure[0]).splitlines()[0] for failure in error.failures.values()))
        raise UserError(f"checkpoint {path} cannot be read: {reasons}") from error


def together(act: Callable[[], Any]) -> str | None:
    """Let every process write something; return what a file system refused to any of them, None when all could.

    An error of one process that were raised there at once would leave the others waiting for it.

    Raises:
        Exception: what is no fault of a file system.
    """
    problem: str | None = None
    other: BaseException | None = None
    try:
        act()
    except (Exception, CheckpointException) as error:  # torch's is none of Python's Exception
        found = _disk_error(error)
        problem, other = (found.strerror or str(found), None) if found else (str(error), error)
    if other is not None and world_size() == 1:
        raise other
    problems: list[str | None] = [problem]
    if world_size() > 1:
        problems = [None] * world_size()
        dist.all_gather_object(problems, problem)
    if other is not None:
        raise other
    return next((f"process {rank}: {text}" if rank else text for rank, text in enumerate(problems) if text), None)


def _disk_error(error: BaseException) -> OSError | None:
    """Return the error of the file system behind what a writer raised, if there is one."""
    seen: list[BaseException] = [error, *getattr(error, "failures", {}).values()]
    for found in seen:
        inner: BaseException | None = found[0] if isinstance(found, tuple) else found
        while inner is not None:
            if isinstance(inner, OSError):
                return inner
            inner = inner.__cause__ or inner.__context__
    if any(word in str(error) for word in _REFUSED):
        return OSError(errno.ENOSPC, "the file system took no more")
    return None


# What writers in C++ and Rust say when the file system refuses; they drop its error number.
_REFUSED = ("inline_container", "PytorchStreamWriter", "iostream error", "file write", "I/O error", "os error")
