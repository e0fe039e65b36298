"""Writes the rows of a source as JSONL: bounded memory, checked row by row, continued after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vila_m3_common.errors import UserError, exits_with_message

from ..resumable_files import write_atomically
from .checks import Line, RowChecks
from .ordered_pool import CHUNK_ROWS, convert_in_order
from .source import Item, Rejected

# How a line of :func:`.record.format_row` begins: its id.
_ID = re.compile(rb'\{"id": ("(?:[^"\\]|\\.)*")')

# Rejected rows that the summary repeats; all of them are in the file of rejected rows.
_SHOWN_REJECTED = 1000


@dataclass
class _State:
    """How far a run came; what stands behind these offsets in the files is not yet certain."""

    settings: dict[str, Any]
    taken: int = 0
    shard: int = 0
    shard_rows: int = 0
    bytes_written: int = 0
    rejected_bytes: int = 0


class _Writer:
    """The growing output of one run: ``.partial`` shards, the rejected rows, and the progress file."""

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], rows_per_shard: int | None) -> None:
        self.folder, self.name, self.rows_per_shard = folder, name, rows_per_shard
        self.progress_path = folder / f".{name}.progress.json"
        self.state = self._read_state(settings)
        if self.state.taken == 0:
            self._remove_leftovers()
        self.rows = _open_at(self._partial(), self.state.bytes_written)
        self.rejected = _open_at(folder / f".{name}.rejected.partial", self.state.rejected_bytes)

    def _read_state(self, settings: dict[str, Any]) -> _State:
        try:
            state = _State(**json.loads(self.progress_path.read_text()))
        except (OSError, ValueError, TypeError):
            return _State(settings)
        if state.settings != settings or not self._reaches(state):
            return _State(settings)
        return state

    def _reaches(self, state: _State) -> bool:
        """Whether the files hold all that the progress file counts."""
        for shard in range(state.shard):
            if not (self.folder / self._shard_name(shard)).is_file():
                return False
        pairs = [(self._partial(state.shard), state.bytes_written)]
        pairs.append((self.folder / f".{self.name}.rejected.partial", state.rejected_bytes))
        return all(size == 0 or (path.is_file() and path.stat().st_size >= size) for path, size in pairs)

    def _remove_leftovers(self) -> None:
        """Shards of an earlier run with other settings must not stand beside this one's."""
        pattern = re.compile(rf"{re.escape(self.name)}(-\d{{5}})?\.(jsonl|rejected\.jsonl|summary\.json)")
        for path in self.folder.iterdir():
            if pattern.fullmatch(path.name):
                path.unlink()

    def _shard_name(self, shard: int) -> str:
        return f"{self.name}.jsonl" if self.rows_per_shard is None else f"{self.name}-{shard:05d}.jsonl"

    def _partial(self, shard: int | None = None) -> Path:
        return self.folder / f".{self._shard_name(self.state.shard if shard is None else shard)}.partial"

    def written_ids(self) -> Iterator[str]:
        """Yield the ids of the rows that an earlier run has written for certain."""
        finished = [self.folder / self._shard_name(shard) for shard in range(self.state.shard)]
        self.rows.flush()
        for path in (*finished, self._partial()):
            with path.open("rb") as lines:
                yield from (json.loads(match[1]) for line in lines if (match := _ID.match(line)))

    def write(self, text: bytes) -> None:
        if self.rows_per_shard is not None and self.state.shard_rows == self.rows_per_shard:
            self._start_next_shard()
        self.rows.write(text)
        self.rows.write(b"\n")
        self.state.shard_rows += 1

    def reject(self, rejected: Rejected) -> None:
        row = {"file": rejected.file, "row": rejected.row, "reason": rejected.reason}
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self.rejected.write(line + b"\n")

    def _start_next_shard(self) -> None:
        # The finished shard gets its name before the progress file counts it: a kill in between is mended by
        # starting over, because _reaches then finds no partial file of the old shard.
        _close(self.rows)
        os.replace(self._partial(), self.folder / self._shard_name(self.state.shard))
        self.state.shard += 1
        self.state.shard_rows = self.state.bytes_written = 0
        self.rows = _open_at(self._partial(), 0)

    def save(self, taken: int) -> None:
        """Make everything so far certain: the files first, then the progress file in one step."""
        for file in (self.rows, self.rejected):
            file.flush()
            os.fsync(file.fileno())
        self.state.taken = taken
        self.state.bytes_written, self.state.rejected_bytes = self.rows.tell(), self.rejected.tell()
        write_atomically(self.progress_path, json.dumps(vars(self.state)))

    def finish(self) -> tuple[list[Path], Path]:
        """Give the files their names; return the shards and the file of rejected rows."""
        _close(self.rows)
        _close(self.rejected)
        os.replace(self._partial(), self.folder / self._shard_name(self.state.shard))
        rejected = self.folder / f"{self.name}.rejected.jsonl"
        os.replace(self.folder / f".{self.name}.rejected.partial", rejected)
        self.progress_path.unlink(missing_ok=True)
        return [self.folder / self._shard_name(shard) for shard in range(self.state.shard + 1)], rejected


def _open_at(path: Path, size: int) -> Any:
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file


def _close(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


@exits_with_message
def prepare(
    rows: Iterable[Item],
    dataset: str,
    split: str,
    output_dir: str | Path,
    checks: RowChecks,
    source: str | Path = "",
    options: Mapping[str, Any] | None = None,
    rows_per_shard: int | None = None,
    save_every: int = 20_000,
    workers: int = 1,
    row_limit: int | None = None,
) -> dict[str, Any]:
    """Write ``<dataset>_<split>.jsonl``, the rejected rows, and ``<dataset>_<split>.summary.json``.

    A killed run goes on where it was when it is started again with the same settings: the source is read again up
    to that row, which is cheap, and the files are cut to what was certain. The bytes are those of a run in one go,
    with any number of workers.

    Args:
        rows: the source, in an order that does not change between runs.
        dataset: first part of the file name.
        split: second part of the file name.
        output_dir: folder of the files; made when missing.
        checks: what a record must fulfil.
        source: named in the summary.
        options: of the source; a run with others starts anew.
        rows_per_shard: when given, the files are ``<dataset>_<split>-00000.jsonl`` and so on.
        save_every: rows between two savings of the progress.
        workers: processes that convert the rows; with 1, this one does.
        row_limit: take so many rows of the source and no more, for a trial.

    Returns:
        The summary.

    Raises:
        UserError: for a file name or shard size that cannot be, or when the source as a whole cannot be read.
    """
    name = f"{dataset}_{split}"
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(
            f"dataset and split name the output file; {name!r} has characters other than letters, digits, _"
        )
    if rows_per_shard is not None and rows_per_shard < 1:
        raise UserError(f"rows_per_shard is {rows_per_shard}; give a positive number or null for one file")
    items = islice(rows, row_limit)
    first = list(islice(items, 1))  # the source's own errors come before anything is written
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = _describe(source, {**(options or {}), "row_limit": row_limit}, checks, rows_per_shard)
    writer = _Writer(folder, name, settings, rows_per_shard)
    _write_rows(writer, chain(first, items), checks, save_every, workers)
    shards, rejected = writer.finish()
    summary = _summarise(dataset, split, shards, rejected)
    write_atomically(folder / f"{name}.summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    print(f"{name}: {summary['written']} rows written, {summary['rejected']} rejected, in {folder}")
    return summary


def _describe(source: str | Path, options: dict[str, Any], checks: RowChecks, shard: int | None) -> dict[str, Any]:
    """Return what must be equal for a run to be continued, as JSON gives it back."""
    described = {"source": source, "options": options, "checks": vars(checks), "rows_per_shard": shard}
    return json.loads(json.dumps(described, default=str))


class _SeenIds:
    """Tells repeated ids; holds 8 bytes of each."""

    def __init__(self, names: Iterable[str]) -> None:
        self._digests = set(map(self._digest, names))

    @staticmethod
    def _digest(name: str) -> bytes:
        return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()

    def add(self, name: str) -> bool:
        """Add an id; return whether it is new."""
        count = len(self._digests)
        self._digests.add(self._digest(name))
        return len(self._digests) > count


def _write_rows(writer: _Writer, items: Iterator[Item], checks: RowChecks, save_every: int, workers: int) -> None:
    taken = writer.state.taken
    seen = None if checks.allows_repeated_ids else _SeenIds(writer.written_ids())
    with tqdm(desc=writer.name, unit="row", initial=taken, mininterval=1.0) as progress:
        remaining = islice(items, taken, None)
        for lines in convert_in_order(remaining, checks, workers, min(save_every, CHUNK_ROWS)):
            for line in lines:
                taken += 1
                _write_line(writer, line, seen)
                if taken % save_every == 0:
                    writer.save(taken)
            progress.update(len(lines))


def _write_line(writer: _Writer, line: Line | Rejected, seen: _SeenIds | None) -> None:
    if isinstance(line, Rejected):
        writer.reject(line)
    elif seen is None or seen.add(line.id):
        writer.write(line.text)
    else:
        writer.reject(Rejected(line.row, f"id {line.id} was already used", line.file))


def _summarise(dataset: str, split: str, shards: list[Path], rejected: Path) -> dict[str, Any]:
    files = []
    for shard in shards:
        digest, count = _hash_lines(shard)
        files.append({"file": shard.name, "rows": count, "sha256": digest})
    reasons: Counter[str] = Counter()
    shown: list[Any] = []
    with rejected.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            reasons[re.sub(r"\d+", "N", row["reason"])[:80]] += 1
            if len(shown) < _SHOWN_REJECTED:
                shown.append(row)
    return {
        "dataset": dataset,
        "split": split,
        "written": sum(file["rows"] for file in files),
        "rejected": sum(reasons.values()),
        "files": files,
        "rejected_file": rejected.name,
        "reasons": dict(reasons.most_common(50)),
        "rejected_rows": shown,
    }


def _hash_lines(path: Path) -> tuple[str, int]:
    digest, count = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            count += block.count(b"\n")
    return digest.hexdigest(), count
