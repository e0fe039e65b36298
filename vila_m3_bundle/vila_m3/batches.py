"""What a training step reads: rows of a mixture as tensors, their order over all processes, micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigParser
from torch.utils.data import Dataset, Sampler

from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError, near_match_hint

from .configuration import IGNORED_LABEL, IMAGE_TOKEN_ID
from .data.mixture import DataSet, Mixture, MixtureItem, MixtureSampler, temperature_quotas
from .data.record import to_conversation
from .packing import pad_rows, plan_rows
from .processor import Encoded, VilaM3Processor, pad_prompts

logger = logging.getLogger(__name__)

POLICIES = ("stop", "skip")
_UNREAD = np.zeros((1, 1, 3), np.uint8)


def check_policy(name: str, given: str) -> str:
    """Return ``given`` when it says what to do with bad data.

    Raises:
        UserError: if it does not.
    """
    if given not in POLICIES:
        raise UserError(f"{name} {given!r} is unknown; {near_match_hint(given, POLICIES)}valid: {', '.join(POLICIES)}")
    return given


def open_mixture(
    files: Sequence[str | Path] = (),
    image_root: str | Path = ".",
    config: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    on_error: str = "stop",
) -> Mixture:
    """Return the conversations of plain JSONL files, or the mixture of a config when no files are given.

    Args:
        files: taken as one data set.
        image_root: folder of their images.
        config: JSON file with a ``mixture``, such as ``mixture_m3.json``.
        options: replace keys of the config (``data_root``, ``balance``, ...) where they are not None.
        on_error: ``stop`` at a file that is missing or empty, or ``skip`` it with a warning.

    Raises:
        UserError: naming the file, or when nothing is left.
    """
    check_policy("on_error", on_error)
    if not files:
        return _configured_mixture(config, options or {}, on_error)
    kept = []
    for file in map(Path, files):
        problem = _file_problem(file)
        if problem:
            _refuse(problem, on_error)
        else:
            kept.append(str(file.resolve()))
    if not kept:
        raise UserError(f"no conversation in {', '.join(map(str, files))}; give JSONL files with rows")
    entry = {"files": kept, "images": str(Path(image_root).resolve())}
    return Mixture({"conversations": entry}, root="/")


def held_out(
    processor: VilaM3Processor,
    files: Sequence[str | Path] = (),
    image_root: str | Path = ".",
    config: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
    on_error: str = "stop",
) -> MixtureDataset | None:
    """Return the conversations of the validation (see :func:`open_mixture`); None when there are none."""
    if not files and config is None:
        return None
    return MixtureDataset(open_mixture(files, image_root, config, options, on_error), processor, on_error)


def _file_problem(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            is_empty = not any(line.strip() for line in opened)
    except OSError as error:
        return f"{file} cannot be read ({error})"
    return f"{file} holds no conversation" if is_empty else None


def _configured_mixture(config: str | Path | None, options: Mapping[str, Any], on_error: str) -> Mixture:
    if config is None:
        raise UserError("no conversations are given; name JSONL files, or the config of a mixture")
    if not Path(config).is_file():
        raise UserError(f"mixture config {config} does not exist; give a JSON file such as configs/mixture_m3.json")
    parser = ConfigParser()
    parser.read_config(str(config))
    parser.update({name: value for name, value in options.items() if value is not None})
    mixture: Mixture = parser.get_parsed_content("mixture")
    for data_set in mixture.data_sets:
        if not len(data_set):
            _refuse(f"data set {data_set.name} of {config} holds no conversation", on_error)
    return mixture


def _refuse(problem: str, on_error: str) -> None:
    if on_error == "stop":
        raise UserError(f"{problem}; mend it, or set on_error to skip")
    logger.warning("skipped: %s", problem)


class MixtureDataset(Dataset):
    """Rows of a mixture as tensors.

    Args:
        mixture: of conversations on disk.
        processor: encodes them.
        on_error: ``stop`` at a row that cannot be read or encoded (a damaged line, a corrupt image, too many
            tokens), or ``skip`` it: the next good row then stands in its place, so that every process keeps the same
            number of steps.
        cache_gib: memory for encoded rows, which are then not read again; of each worker where there are some.
    """

    def __init__(
        self, mixture: Mixture, processor: VilaM3Processor, on_error: str = "stop", cache_gib: float = 0.0
    ) -> None:
        self.mixture = mixture
        self.processor = processor
        self.on_error = check_policy("on_error", on_error)
        self._room = int(cache_gib * 2**30)
        self._kept: dict[tuple[str, int], Encoded] = {}
        self._pictures: dict[tuple[Path, tuple[str, ...]], torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.mixture)

    def __getitem__(self, index: int) -> Encoded:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            place = (index + offset) % len(self)
            try:
                return self._encoded(place)
            except UserError as error:
                _refuse(f"{self._name(place)}: {error}", self.on_error)
        raise UserError("not one row can be encoded; see the warnings above")

    def _encoded(self, index: int) -> Encoded:
        data_set, row = self.mixture.locate(index)
        key = (data_set.name, row)
        if key in self._kept:
            return self._kept[key]
        encoded, size = self._encode(self.mixture[index])
        # Rows come in another order in every pass, so that dropping old ones for new ones would gain nothing.
        if size <= self._room:
            self._room -= size
            self._kept[key] = encoded
        return encoded

    def _encode(self, item: MixtureItem) -> tuple[Encoded, int]:
        """Encode a row; return the memory that keeping it takes. Pictures of another kept row are not read again."""
        pictures = (item.image_root, item.record.images)
        pixels = self._pictures.get(pictures)
        if pixels is None:
            encoded = self.processor.encode(item.conversation())
            size = sum(value.nbytes for value in (encoded.input_ids, encoded.labels, encoded.pixel_values))
            if size <= self._room and item.record.images:
                self._pictures[pictures] = encoded.pixel_values
            return encoded, size
        unread = to_conversation(item.record, item.image_root, load=lambda _: _UNREAD)
        tokens, labels = map(torch.tensor, self.processor.tokenize(unread))
        return Encoded(tokens, labels, pixels), tokens.nbytes + labels.nbytes

    def _name(self, index: int) -> str:
        data_set, row = self.mixture.locate(index)
        return f"row {row + 1} of data set {data_set.name}"

    def shown(self, count: int, first: int = 0, every: int = 1) -> Iterator[tuple[MixtureItem, Conversation, Encoded]]:
        """Yield every so-manieth of the first ``count`` rows; those that cannot be read as ``on_error`` says."""
        for index in range(first, min(count, len(self)), every):
            try:
                item = self.mixture[index]
                yield item, item.conversation(), self._encoded(index)
            except UserError as error:
                _refuse(f"{self._name(index)}: {error}", self.on_error)


class PictureGroups(Dataset):
    """Rows of a data set in groups that ask about the same pictures, so that a step encodes these once.

    The rows about a picture are dealt in a seeded order to as few groups as hold them, of equal size up to one.

    Args:
        dataset: of a mixture.
        group_size: most rows of a group; 1 leaves the rows as they are.
        seed: of the order.
    """

    def __init__(self, dataset: MixtureDataset, group_size: int = 1, seed: int = 42) -> None:
        if group_size < 1:
            raise UserError(f"group_size {group_size} is not a whole number from 1 on; 1 groups nothing")
        self.dataset = dataset
        self.mixture = dataset.mixture
        parts = self.mixture.data_sets
        self.data_sets = [_GroupedRows(part.name, _group_rows(part, group_size, seed)) for part in parts]
        found = dict(zip((part.name for part in parts), self.data_sets, strict=True))
        self._parts = [(found[part.name], len(part)) for part in self.mixture.parts]

    @property
    def sample_lengths(self) -> list[int]:
        """Groups of every repeat of every data set, as :attr:`Mixture.sample_lengths` has the rows."""
        return [len(part) for part, _ in self._parts]

    @property
    def quotas(self) -> list[int] | None:
        """As of the mixture, but groups."""
        if self.mixture.balance != "temperature":
            return None
        return temperature_quotas(self.sample_lengths, self.mixture.temperature)

    def __len__(self) -> int:
        return sum(self.sample_lengths)

    def __getitem__(self, index: int) -> list[Encoded]:
        first_group = first_row = 0
        for part, row_count in self._parts:
            if index < first_group + len(part):
                return [self.dataset[first_row + int(row)] for row in part.groups[index - first_group]]
            first_group, first_row = first_group + len(part), first_row + row_count
        raise IndexError(index)


@dataclass(frozen=True)
class _GroupedRows:
    """The rows of each group of one data set."""

    name: str
    groups: Any

    def __len__(self) -> int:
        return len(self.groups)


def _group_rows(part: DataSet, size: int, seed: int) -> Any:
    """Return the rows of each group of a data set; a row without pictures is a group of its own."""
    if size == 1:
        return np.arange(len(part))[:, None]
    rows: dict[tuple[str, ...] | int, list[int]] = {}
    for row in np.random.default_rng(seed).permutation(len(part)).tolist():
        rows.setdefault(part[row].images or row, []).append(row)
    return [deal.tolist() for found in rows.values() for deal in np.array_split(found, -(-len(found) // size))]


class StepBatches(Sampler[list[int]]):
    """Indices of one optimizer step after the other, over all passes of a training, in VILA's order.

    A step holds the batches of ``replica_count`` processes of :class:`vila_m3.data.mixture.MixtureSampler`, one behind
    the other. Each process takes its share of them: with as many processes as replicas that is the recorded order of
    its rank, and with any other number the steps stay the same, so that a training may go on with another number.

    Args:
        mixture: whose rows, or its groups of rows.
        step_size: rows (or groups) of a step, of all processes together.
        passes: how often the mixture is gone through.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        replica_count: number of processes that the order is made for; None takes ``world_size``.

    Raises:
        UserError: if a step does not divide among processes or replicas, or no data set fills a step.
    """

    def __init__(
        self,
        mixture: Mixture | PictureGroups,
        step_size: int,
        passes: int = 1,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        replica_count: int | None = None,
    ) -> None:
        self.mixture = mixture
        self.step_size = step_size
        self.passes = passes
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.first_step = 0
        self.replica_count = replica_count or world_size
        for count in (world_size, self.replica_count):
            if step_size < 1 or step_size % count:
                raise UserError(
                    f"a step of {step_size} conversations does not divide among {count} processes; give a "
                    "batch_size that is a multiple"
                )
        self.steps_per_pass = sum(self._replica(0).counts) * self.replica_count // step_size
        left_out = [part for part in mixture.data_sets if 0 < len(part) < step_size and mixture.quotas is None]
        for part in left_out:
            logger.warning("data set %s has %d rows, less than a step: none is shown", part.name, len(part))

    def _replica(self, number: int) -> MixtureSampler:
        return MixtureSampler(
            self.mixture.sample_lengths,
            self.step_size // self.replica_count,
            self.replica_count,
            number,
            self.seed,
            quotas=self.mixture.quotas,
        )

    def __len__(self) -> int:
        return self.passes * self.steps_per_pass

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's part of each step from ``first_step`` on; nothing before it is read."""
        skipped = self.first_step % self.steps_per_pass
        for number in range(self.first_step // self.steps_per_pass, self.passes):
            yield from self._pass(number, skipped).tolist()
            skipped = 0

    def _pass(self, number: int, skipped: int) -> np.ndarray:
        """Return this process's rows of the steps of a pass, ``(steps, rows)``."""
        share, width = self.step_size // self.world_size, self.step_size // self.replica_count
        start = self.rank * share
        first, last = start // width, -(-(start + share) // width)
        columns = []
        for replica in range(first, last):
            sampler = self._replica(replica)
            sampler.set_epoch(number, skipped)
            columns.append(np.fromiter(sampler, np.int64).reshape(-1, width))
        return np.concatenate(columns, axis=1)[:, start - first * width :][:, :share]

    def state_dict(self) -> dict[str, Any]:
        """Return what the order of the steps follows from."""
        return {
            "epoch_length": self.steps_per_pass,
            "batch_size": self.step_size,
            "seed": self.seed,
            "sample_lengths": self.mixture.sample_lengths,
            "quotas": self.mixture.quotas,
            "replica_count": self.replica_count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the order of an interrupted training, whatever number of processes that had.

        Raises:
            UserError: if data or batches are not the same.
        """
        now = {name: value for name, value in self.state_dict().items() if name != "replica_count"}
        differing = [f"{name} {value} (was {state[name]})" for name, value in now.items() if state[name] != value]
        if differing:
            raise UserError(
                f"the checkpoint is of a training with another {', '.join(differing)}; go on with the same data and "
                "batches, or give another ckpt_dir"
            )
        self.replica_count = state["replica_count"]


MicroBatch = dict[str, torch.Tensor]


class StepCollator:
    """Turns the items of a step into micro-batches of items of like length.

    Args:
        micro_batch_size: conversations whose gradients are computed together, where they are not packed; with
            ``shares_pictures`` groups of them.
        pack_length: tokens of a row that holds several conversations and is a micro-batch of its own (a longer
            conversation has a row for itself); None gives each conversation a row, padded to the longest.
        shares_pictures: whether conversations of a group share their pictures and what they begin with, in a row of
            their own (see :func:`share_items`). A group with more than ``pack_length`` tokens has several rows then.
    """

    def __init__(self, micro_batch_size: int, pack_length: int | None = None, shares_pictures: bool = False) -> None:
        self.micro_batch_size = micro_batch_size
        self.pack_length = pack_length
        self.shares_pictures = shares_pictures

    def __call__(self, groups: Sequence[Encoded | list[Encoded]]) -> list[MicroBatch]:
        """Return micro-batches as :func:`pad_items`, :func:`pack_items` or :func:`share_items` make them."""
        if self.shares_pictures:
            return self._share([group if isinstance(group, list) else [group] for group in groups])
        items = [item for group in groups for item in (group if isinstance(group, list) else [group])]
        return self._split(items)

    def _share(self, groups: Sequence[list[Encoded]]) -> list[MicroBatch]:
        parts = [part for group in groups for part in split_group(group, self.pack_length)]
        rows = sorted(map(SharedRow.of, parts), key=lambda row: len(row.input_ids))
        batches: list[list[SharedRow]] = []
        for row in rows:
            first = batches[-1][0] if batches else row
            is_alike = len(row.input_ids) <= LIKE_LENGTH * len(first.input_ids)
            if not batches or len(batches[-1]) == self.micro_batch_size or not is_alike:
                batches.append([])
            batches[-1].append(row)
        return [share_items(batch) for batch in batches]

    def _split(self, items: Sequence[Encoded]) -> list[MicroBatch]:
        if self.pack_length is not None:
            rows = plan_rows([len(item.input_ids) for item in items], self.pack_length)
            return [pack_items([items[index] for index in row], self.pack_length) for row in rows]
        items = sorted(items, key=lambda item: len(item.input_ids))
        size = self.micro_batch_size
        return [pad_items(items[start : start + size]) for start in range(0, len(items), size)]


def pad_items(items: Sequence[Encoded]) -> MicroBatch:
    """One row per conversation; images of all rows follow each other.

    Two conversations of 5 and 7 tokens with one and four images become ``input_ids`` (2, 7), ``attention_mask`` (2, 7)
    with two zeros in row 0, ``labels`` and ``position_ids`` (2, 7), and ``pixel_values`` (5, 3, S, S).
    """
    return {
        **pad_prompts([item.input_ids for item in items], 0, "right"),
        "labels": pad_rows([item.labels for item in items], IGNORED_LABEL),
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


# How much longer than the shortest the longest row of a micro-batch of shared rows may be.
LIKE_LENGTH = 1.25


def split_group(items: Sequence[Encoded], longest: int | None) -> list[list[Encoded]]:
    """Cut a group into pieces whose shared rows have at most ``longest`` tokens, or one conversation each."""
    start = _shared_start(items)
    pieces: list[list[Encoded]] = []
    used = 0
    for item in items:
        rest = len(item.input_ids) - start
        if not pieces or (longest is not None and start + used + rest > longest):
            pieces.append([])
            used = 0
        pieces[-1].append(item)
        used += rest
    return pieces


@dataclass(frozen=True)
class SharedRow:
    """Conversations about the same pictures in one row, what they begin with standing there once.

    With a beginning ``[b, b]`` and the rests ``[c, c, c]`` and ``[d]`` the row is ``[b, b, c, c, c, d]``, its positions
    ``[0, 1, 2, 3, 4, 2]`` and its parts ``[0, 0, 1, 1, 1, 2]``: a token attends to those before it in its own part
    and in part 0, so that each conversation is computed as it is alone.

    Args:
        input_ids: ``(L,)``.
        labels: ``(L,)``.
        position_ids: ``(L,)``.
        parts: ``(L,)``.
        pixel_values: ``(N, 3, S, S)``, the pictures of one conversation.
        shown: which of the pictures stand in the row, in the order of their places.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    parts: torch.Tensor
    pixel_values: torch.Tensor
    shown: torch.Tensor

    @classmethod
    def of(cls, items: Sequence[Encoded]) -> SharedRow:
        """Build the row of one or more conversations whose pictures are equal."""
        pixels = items[0].pixel_values
        start = _shared_start(items)
        cuts = [item.input_ids[start:] for item in items]
        positions = [torch.arange(start), *(torch.arange(start, start + len(cut)) for cut in cuts)]
        lengths = torch.tensor([start, *map(len, cuts)])
        places = max(1, int((items[0].input_ids == IMAGE_TOKEN_ID).sum()) // max(1, len(pixels)))
        begun = int((items[0].input_ids[:start] == IMAGE_TOKEN_ID).sum()) // places
        left = torch.arange(begun, len(pixels)).repeat(len(items))
        return cls(
            torch.cat([items[0].input_ids[:start], *cuts]),
            torch.cat([items[0].labels[:start], *(item.labels[start:] for item in items)]),
            torch.cat(positions),
            torch.repeat_interleave(torch.arange(len(lengths)), lengths),
            pixels,
            torch.cat([torch.arange(begun), left]),
        )


def _shared_start(items: Sequence[Encoded]) -> int:
    """Return how many tokens conversations begin with in common, cut so that no picture is split.

    The token before the first supervised one belongs to the rest, as it predicts that one.
    """
    if len(items) == 1:
        return 0
    first = items[0]
    start = min(_unsupervised_start(item) for item in items)
    for item in items[1:]:
        differs = item.input_ids[:start] != first.input_ids[:start]
        start = int(differs.int().argmax()) if differs.any() else start
    while 0 < start < len(first.input_ids) and first.input_ids[start] == IMAGE_TOKEN_ID:
        start -= 1
    return start


def _unsupervised_start(item: Encoded) -> int:
    supervised = (item.labels != IGNORED_LABEL).nonzero()[:, 0]
    return max(0, (int(supervised[0]) if len(supervised) else len(item.labels)) - 1)


def share_items(rows: Sequence[SharedRow]) -> MicroBatch:
    """Stack shared rows.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` ``(rows, L)``; ``attention_mask`` ``(rows, 1, L, L)`` bool;
        ``pixel_values`` of all rows, each picture once; ``shown`` ``(places,)``: which of them stands at each place.
    """
    parts = pad_rows([row.parts for row in rows], -1)
    before = torch.ones(parts.shape[1], parts.shape[1], dtype=torch.bool).tril()
    attends = ((parts[:, :, None] == parts[:, None, :]) | (parts[:, None, :] == 0)) & before
    counts = [len(row.pixel_values) for row in rows]
    starts = torch.tensor([0, *counts]).cumsum(0)
    return {
        "input_ids": pad_rows([row.input_ids for row in rows], 0),
        "labels": pad_rows([row.labels for row in rows], IGNORED_LABEL),
        "position_ids": pad_rows([row.position_ids for row in rows], 0),
        "attention_mask": attends[:, None],
        "pixel_values": torch.cat([row.pixel_values for row in rows]),
        "shown": torch.cat([row.shown + start for row, start in zip(rows, starts, strict=False)]),
    }


def _without_first(labels: torch.Tensor) -> torch.Tensor:
    return torch.cat([labels.new_full((1,), IGNORED_LABEL), labels[1:]])


def empty_micro_batch(like: MicroBatch) -> MicroBatch:
    """Return one token that is not supervised, for a process that has less to compute than the others."""
    first = {name: value[:1, :1] for name, value in like.items() if value.ndim == 2}
    first["input_ids"] = torch.zeros_like(first["input_ids"])
    first["labels"] = torch.full_like(first["labels"], IGNORED_LABEL)
    first["position_ids"] = torch.zeros_like(first["position_ids"])
    return {**first, "pixel_values": like["pixel_values"][:0]}


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
