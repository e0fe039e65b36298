"""What a training step reads: records as tensors, their order over all processes, padded or packed micro-batches."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from vila_m3_common.chat_template import render
from vila_m3_common.errors import UserError, near_match_hint

from .configuration import IGNORED_LABEL
from .data.record import Record, parse_row, to_conversation
from .packing import pad_rows, plan_rows
from .processor import Encoded, VilaM3Processor

logger = logging.getLogger(__name__)

POLICIES = ("stop", "skip")


def check_policy(name: str, given: str) -> str:
    """Return ``given`` when it says what to do with bad data.

    Raises:
        UserError: if it does not.
    """
    if given not in POLICIES:
        raise UserError(f"{name} {given!r} is unknown; {near_match_hint(given, POLICIES)}valid: {', '.join(POLICIES)}")
    return given


def read_records(files: Sequence[str | Path], on_error: str = "stop") -> list[Record]:
    """Read JSONL files of conversations.

    Args:
        files: in the order of the data set.
        on_error: ``stop`` at a file that is missing or empty and at a damaged line, or ``skip`` them with a warning.

    Raises:
        UserError: naming file and line, or when nothing is left.
    """
    check_policy("on_error", on_error)
    records: list[Record] = []
    for file in files:
        before = len(records)
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            _refuse(f"{file} cannot be read ({error})", on_error)
            continue
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                records.append(parse_row(line))
            except UserError as error:
                _refuse(f"{file}, line {number}: {error}", on_error)
        if len(records) == before:
            _refuse(f"{file} holds no conversation", on_error)
    if not records:
        raise UserError(f"no conversation to train on in {', '.join(map(str, files)) or 'no file'}; give JSONL files")
    return records


def _refuse(problem: str, on_error: str) -> None:
    if on_error == "stop":
        raise UserError(f"{problem}; mend it, or set on_error to skip")
    logger.warning("skipped: %s", problem)


class EncodedDataset(Protocol):
    """What the sampler and the loader need of a data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Encoded: ...

    def length(self, index: int) -> int:
        """Return the number of tokens of an item."""


class RecordDataset(Dataset):
    """Conversations on disk as tensors.

    Args:
        files: JSONL files.
        image_root: folder of their images.
        processor: encodes them.
        on_error: ``stop`` at a record that cannot be encoded (a corrupt image, too many tokens), or ``skip`` it: the
            next good record then stands in its place, so that every process keeps the same number of steps.
    """

    def __init__(
        self, files: Sequence[str | Path], image_root: str | Path, processor: VilaM3Processor, on_error: str = "stop"
    ) -> None:
        self.records = read_records(files, on_error)
        self.image_root = image_root
        self.processor = processor
        self.on_error = on_error
        self._lengths: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Encoded:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            record = self.records[(index + offset) % len(self)]
            try:
                return self.processor.encode(to_conversation(record, self.image_root))
            except UserError as error:
                _refuse(f"record {record.id}: {error}", self.on_error)
        raise UserError("not one record can be encoded; see the warnings above")

    def length(self, index: int) -> int:
        """Return the number of tokens of an item without touching its images."""
        if index not in self._lengths:
            conversation = to_conversation(self.records[index], self.image_root, _blank)
            self._lengths[index] = len(self.processor.encode_text(render(conversation, self.processor.template))[0])
        return self._lengths[index]


def _blank(_: Path) -> np.ndarray:
    return np.zeros((1, 1, 3), np.uint8)


class StepBatches(Sampler[list[int]]):
    """Indices of one optimizer step after the other, over all passes of a training.

    A step has the same items for any number of processes and any split into micro-batches, so these may change
    between a kill and the resumption. Items of like length stand in a step together.

    Args:
        dataset: tells the length of each item.
        step_size: items of a step, of all processes together.
        passes: how often the data set is gone through; what does not fill a last step is left out of a pass.
        seed: of the order.
        group_size: how many steps are sorted by length together; 1 does not sort.
        rank: of this process.
        world_size: number of processes.

    Raises:
        UserError: if a step does not divide among the processes, or the data set is smaller than a step.
    """

    def __init__(
        self,
        dataset: EncodedDataset,
        step_size: int,
        passes: int = 1,
        seed: int = 0,
        group_size: int = 8,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if step_size < 1 or step_size % world_size:
            raise UserError(
                f"a step of {step_size} items does not divide among {world_size} processes; give a multiple"
            )
        if len(dataset) < step_size:
            raise UserError(
                f"{len(dataset)} conversations do not fill a step of {step_size}; give a smaller batch_size"
            )
        self.dataset = dataset
        self.step_size = step_size
        self.passes = passes
        self.seed = seed
        self.group_size = group_size
        self.rank = rank
        self.world_size = world_size
        self.first_step = 0

    @property
    def steps_per_pass(self) -> int:
        """Number of steps in one pass."""
        return len(self.dataset) // self.step_size

    def __len__(self) -> int:
        return self.passes * self.steps_per_pass

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's part of each step from ``first_step`` on."""
        skipped = self.first_step % self.steps_per_pass
        for number in range(self.first_step // self.steps_per_pass, self.passes):
            for step in self._pass(number, skipped):
                yield step[self.rank :: self.world_size]
            skipped = 0

    def _pass(self, number: int, skipped: int) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed}/{number}")
        order = rng.sample(range(len(self.dataset)), self.steps_per_pass * self.step_size)
        chunk = self.step_size * self.group_size
        done = 0
        for start in range(0, len(order), chunk):
            group = order[start : start + chunk]
            if self.group_size > 1:
                group = sorted(group, key=self.dataset.length)
            steps = [group[first : first + self.step_size] for first in range(0, len(group), self.step_size)]
            rng.shuffle(steps)
            yield from steps[max(0, skipped - done) :]
            done += len(steps)


MicroBatch = dict[str, torch.Tensor]


class StepCollator:
    """Turns the items of a step into micro-batches.

    Args:
        micro_batch_size: items whose gradients are computed together.
        pack_length: width in tokens of rows that hold several conversations (a longer one has a row of its own);
            None gives each conversation a row, padded to the longest.
    """

    def __init__(self, micro_batch_size: int, pack_length: int | None = None) -> None:
        self.micro_batch_size = micro_batch_size
        self.pack_length = pack_length

    def __call__(self, items: Sequence[Encoded]) -> list[MicroBatch]:
        """Return micro-batches as :func:`pad_items` or :func:`pack_items` make them."""
        chunks = [items[start : start + self.micro_batch_size] for start in range(0, len(items), self.micro_batch_size)]
        if self.pack_length is None:
            return [pad_items(chunk) for chunk in chunks]
        return [pack_items(chunk, self.pack_length) for chunk in chunks]


def pad_items(items: Sequence[Encoded]) -> MicroBatch:
    """One row per conversation: ``input_ids``, ``labels``, ``attention_mask``, ``position_ids`` ``(B, L)``."""
    return {
        "input_ids": pad_rows([item.input_ids for item in items], 0),
        "labels": pad_rows([item.labels for item in items], IGNORED_LABEL),
        "attention_mask": pad_rows([torch.ones_like(item.input_ids) for item in items], 0),
        "position_ids": pad_rows([torch.arange(len(item.input_ids)) for item in items], 0),
        "pixel_values": torch.cat([item.pixel_values for item in items]),
    }


def pack_items(items: Sequence[Encoded], width: int) -> MicroBatch:
    """Several conversations in a row, from the longest to the shortest.

    There is no ``attention_mask``: ``position_ids`` that restart tell where attention ends, and at padding they
    are -1. The first token of a conversation is not supervised, as no token of its own stands before it.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` ``(rows, longest row)``; ``pixel_values`` in the order of places.
    """
    rows = [[items[index] for index in row] for row in plan_rows([len(item.input_ids) for item in items], width)]
    return {
        "input_ids": pad_rows([torch.cat([item.input_ids for item in row]) for row in rows], 0),
        "labels": pad_rows([torch.cat([_without_first(item.labels) for item in row]) for row in rows], IGNORED_LABEL),
        "position_ids": pad_rows([torch.cat([torch.arange(len(i.input_ids)) for i in row]) for row in rows], -1),
        "pixel_values": torch.cat([item.pixel_values for row in rows for item in row]),
    }


def _without_first(labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([labels.new_full((1,), IGNORED_LABEL), labels[1:]])


def make_loader(dataset: Any, sampler: StepBatches, collate: StepCollator, workers: int = 0) -> Any:
    """Return the loader of a training; its seed is its own, so that starting it leaves the training's alone."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator().manual_seed(sampler.seed),
        pin_memory=torch.cuda.is_available(),
    )
