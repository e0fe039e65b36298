"""Mixture of data sets: JSONL files read by line, repeats, and the order in which every process sees the rows."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from torch.utils.data import Dataset, Sampler

from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError, near_match_hint

from .record import Record, parse_row, to_conversation

Balance = Literal["balanced", "unbalanced", "temperature"]
_SCAN_BYTES = 1 << 20


class IndexedJsonl:
    """A JSONL file whose rows are read one by one; 8 bytes of memory a row.

    Args:
        path: the file; blank lines are no rows.

    Raises:
        UserError: if the file cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._offsets = _line_offsets(self.path)
        self._handle: Any = None
        self._process = -1

    def __len__(self) -> int:
        return len(self._offsets)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None, "_process": -1}

    def line(self, index: int) -> str:
        """Return a row's text without its line break."""
        # A forked process would share the position in the file with its parent.
        if self._handle is None or self._process != os.getpid():
            self._handle, self._process = self.path.open("rb"), os.getpid()
        self._handle.seek(int(self._offsets[index]))
        return self._handle.readline().decode("utf-8", errors="replace").rstrip("\r\n")

    def __getitem__(self, index: int) -> Record:
        try:
            return parse_row(self.line(index))
        except UserError as error:
            raise UserError(f"row {index + 1} of {self.path}: {error}; run configs/validate_data.json on it") from error


def _line_offsets(path: Path) -> np.ndarray:
    """Return where each line that is not blank starts, ``(rows,)`` int64."""
    parts: list[np.ndarray] = []
    try:
        with path.open("rb") as file:
            starts, position = [np.zeros(1, np.int64)], 0
            while block := file.read(_SCAN_BYTES):
                starts.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + position + 1)
                position += len(block)
            parts = [*starts, np.array([position], np.int64)]
    except OSError as error:
        raise UserError(f"data file {path} cannot be read ({error}); prepare it, or correct the mixture") from error
    edges = np.unique(np.concatenate(parts))
    lengths = np.diff(edges)
    offsets = edges[:-1][lengths > 0]
    return offsets[_has_text(path, offsets, lengths[lengths > 0])]


def _has_text(path: Path, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tell which lines are more than blanks; only short ones can be blank and are looked at."""
    keep = np.ones(len(offsets), bool)
    with path.open("rb") as file:
        for index in np.flatnonzero(lengths < 8):
            file.seek(int(offsets[index]))
            keep[index] = bool(file.read(int(lengths[index])).strip())
    return keep


@dataclass(frozen=True)
class MixtureItem:
    """A row of the mixture.

    Args:
        record: the conversation.
        image_root: folder of its images.
        data_set: name of its data set.
    """

    record: Record
    image_root: Path
    data_set: str

    def conversation(self) -> Conversation:
        """Return the conversation with its images read."""
        return to_conversation(self.record, self.image_root)


@dataclass
class DataSet:
    """One data set of a mixture.

    Args:
        name: its key in the config.
        files: its JSONL files, as one sequence of rows.
        image_root: folder of its images.
        repeats: how often a balanced epoch shows each row.
    """

    name: str
    files: list[IndexedJsonl]
    image_root: Path
    repeats: int
    starts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.starts = np.cumsum([0, *map(len, self.files)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> Record:
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        return self.files[number][index - int(self.starts[number])]


def _read_data_set(name: str, entry: Mapping[str, Any], root: Path) -> DataSet:
    """Build a data set from ``{"files": [...], "images": folder, "repeats": count}``."""
    allowed = ("files", "images", "repeats")
    for key in entry:
        if key not in allowed:
            hint = near_match_hint(key, allowed)
            raise UserError(f"data set {name} has no setting {key!r}; {hint}allowed: {', '.join(allowed)}")
    files, repeats = entry.get("files"), entry.get("repeats", 1)
    files = [files] if isinstance(files, str) else files
    if not files:
        raise UserError(f"data set {name} names no files; give the JSONL files below {root}")
    if not isinstance(repeats, int) or repeats < 1:
        raise UserError(f"repeats {repeats!r} of data set {name} is not a whole number from 1 on; leave the set out")
    return DataSet(name, [IndexedJsonl(root / file) for file in files], root / entry.get("images", ""), repeats)


class Mixture(Dataset):
    """Rows of several data sets, each as often as its repeats; nothing but line offsets is held.

    Args:
        data_sets: name -> ``{"files": [...], "images": folder, "repeats": count}``, paths below ``root``.
        root: folder of the data sets.
        balance: ``balanced`` takes the repeats, ``unbalanced`` every row once, ``temperature`` keeps the size of
            the unbalanced epoch and gives a data set of n rows a share in proportion to n^(1 / temperature).
        temperature: 1 keeps the natural shares, a large value evens them out.
        missing: ``error``, or ``skip`` to leave out data sets without files (some need a licence).

    Raises:
        UserError: for unknown settings, missing files, or when no rows are left.
    """

    def __init__(
        self,
        data_sets: Mapping[str, Mapping[str, Any]],
        root: str | Path,
        balance: str = "balanced",
        temperature: float = 1.0,
        missing: str = "error",
    ) -> None:
        if balance not in get_args(Balance):
            hint = near_match_hint(balance, get_args(Balance))
            raise UserError(f"balance {balance!r} is unknown; {hint}allowed: {', '.join(get_args(Balance))}")
        if temperature <= 0:
            raise UserError(f"temperature {temperature} must be above 0; 1 keeps the natural shares")
        if missing not in ("error", "skip"):
            raise UserError(f"missing {missing!r} is unknown; allowed: error, skip")
        self.root = Path(root)
        kept = {name: entry for name, entry in data_sets.items() if missing == "error" or self._has_files(entry)}
        self.data_sets = [_read_data_set(name, entry, self.root) for name, entry in kept.items()]
        self.skipped = [name for name in data_sets if name not in kept]
        if not any(map(len, self.data_sets)):
            raise UserError(f"the mixture has no rows below {root}; prepare its data sets first")
        self.balance = balance
        self.temperature = temperature
        self.parts = [data_set for data_set in self.data_sets for _ in range(self.repeats_of(data_set))]
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def _has_files(self, entry: Mapping[str, Any]) -> bool:
        files = entry.get("files") or []
        return all((self.root / file).is_file() for file in ([files] if isinstance(files, str) else files))

    def repeats_of(self, data_set: DataSet) -> int:
        """Return how often a data set stands in the mixture."""
        return data_set.repeats if self.balance == "balanced" else 1

    @property
    def sample_lengths(self) -> list[int]:
        """Rows of every repeat of every data set, in the order of the indices; what the sampler reads."""
        return [len(part) for part in self.parts]

    @property
    def quotas(self) -> list[int] | None:
        """Rows that an epoch shows of every data set under temperature sampling; None otherwise."""
        if self.balance != "temperature":
            return None
        return temperature_quotas(self.sample_lengths, self.temperature)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def locate(self, index: int) -> tuple[DataSet, int]:
        """Return the data set of an index, and the row in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], index - int(self._starts[number])

    def __getitem__(self, index: int) -> MixtureItem:
        data_set, row = self.locate(index)
        return MixtureItem(data_set[row], data_set.image_root, data_set.name)


def temperature_quotas(sizes: Sequence[int], temperature: float) -> list[int]:
    """Share ``sum(sizes)`` rows in proportion to ``size^(1 / temperature)``, by largest remainder."""
    weights = np.asarray(sizes, float) ** (1 / temperature) * (np.asarray(sizes) > 0)
    exact = weights / weights.sum() * sum(sizes)
    quotas = np.floor(exact).astype(int)
    for index in np.argsort(quotas - exact, kind="stable")[: sum(sizes) - int(quotas.sum())]:
        quotas[index] += 1
    return [int(quota) for quota in quotas]


class MixtureSampler(Sampler[int]):
    """Order of a mixture's rows for one process: every part spread evenly over the epoch, shuffled anew by epoch.

    Equal to VILA's sampler index by index. Each part loses the rows that do not fill a global batch; a process takes
    one contiguous block of every part, always the same one, shuffles it with ``seed + epoch``, and lays the parts,
    largest first, at even distances.

    Args:
        sample_lengths: rows of every part (``Mixture.sample_lengths``).
        batch_size: rows per process and step.
        replica_count: number of processes.
        rank: of this process.
        seed: of the shuffles.
        quotas: rows of every part in an epoch where it differs (temperature sampling); rows are then drawn in
            whole seeded passes, the last of them cut.

    Raises:
        UserError: if the rank does not exist, or no part fills a global batch.
    """

    def __init__(
        self,
        sample_lengths: Sequence[int],
        batch_size: int,
        replica_count: int = 1,
        rank: int = 0,
        seed: int = 42,
        quotas: Sequence[int] | None = None,
    ) -> None:
        if not 0 <= rank < replica_count:
            raise UserError(f"rank {rank} does not exist among {replica_count} processes")
        self.sample_lengths = list(sample_lengths)
        self.batch_size = batch_size
        self.rank = rank
        self.seed = seed
        self.quotas = None if quotas is None else list(quotas)
        shown = self.sample_lengths if self.quotas is None else self.quotas
        global_batch = batch_size * replica_count
        self.counts = [length // global_batch * batch_size for length in shown]
        if not sum(self.counts):
            raise UserError(
                f"no data set fills one batch of {batch_size} x {replica_count} rows (they have {shown}); "
                "take a smaller batch_size"
            )
        self.epoch = 0
        self.first_step = 0

    def __len__(self) -> int:
        return sum(self.counts) - self.first_step * self.batch_size

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Choose an epoch, and the step that the next iteration starts with; skipped rows are never read.

        Raises:
            UserError: if the epoch has no such step.
        """
        steps = sum(self.counts) // self.batch_size
        if not 0 <= first_step <= steps:
            raise UserError(f"step {first_step} does not exist; an epoch has {steps} steps of {self.batch_size} rows")
        self.epoch = epoch
        self.first_step = first_step

    def __iter__(self) -> Iterator[int]:
        return iter(self.order()[self.first_step * self.batch_size :].tolist())

    def order(self) -> np.ndarray:
        """Return the whole epoch's indices of this process, ``(rows,)``."""
        # The generator of VILA is the process-wide one of `random`; one of our own gives the same draws.
        rng = random.Random(self.seed + self.epoch)
        parts = [self._block(index) for index in range(len(self.counts))]
        for part in parts:
            rng.shuffle(part)
        return interleave(parts)

    def _block(self, index: int) -> list[int]:
        """Return the rows of a part that belong to this process."""
        start, count = sum(self.sample_lengths[:index]), self.counts[index]
        first = self.rank * count
        if self.quotas is None:
            return list(range(start + first, start + first + count))
        length = self.sample_lengths[index]
        rows: list[int] = []
        for number in range(first // length, -(-(first + count) // length)) if count else ():
            one_pass = list(range(start, start + length))
            random.Random(f"{self.seed}/{self.epoch}/{index}/{number}").shuffle(one_pass)
            rows += one_pass[max(0, first - number * length) : max(0, first + count - number * length)]
        return rows


def interleave(parts: Sequence[Sequence[int]]) -> np.ndarray:
    """Lay lists into one, largest first, each at even distances over the places that are left.

    Returns:
        ``(sum of lengths,)``.
    """
    order = np.full(sum(map(len, parts)), -1, np.int64)
    free = np.arange(len(order))
    for part in sorted(parts, key=len, reverse=True):
        if not len(part):
            continue
        places = np.arange(len(part)) * len(free) // len(part)
        order[free[places]] = part
        free = np.delete(free, places)
    return order
