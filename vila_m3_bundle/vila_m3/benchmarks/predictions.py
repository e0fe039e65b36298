"""Predictions on disk: written with a checksum per line, read from anyone."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from vila_m3_common.errors import UserError

from ..resumable_files import append_durably, check_settings, write_atomically

CHECKSUM = "sha256"


@dataclass(frozen=True)
class Predictions:
    """What a file holds.

    Args:
        lines: (question id, text) in the order of the file.
        notes: what a reader must know: broken lines, odd scores.
        confidences: question id -> probability that the model gave its own answer, where the file tells it.
    """

    lines: tuple[tuple[Any, str], ...]
    notes: tuple[str, ...] = ()
    confidences: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def texts(self) -> dict[str, str]:
        """Question id as text -> answer; the last of several counts."""
        return {str(name): text for name, text in self.lines}


def checksum(row: Mapping[str, Any]) -> str:
    """Return the checksum of a row without its own field."""
    rest = {key: value for key, value in row.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:16]


def read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the good rows of a JSONL file and what is wrong with the others; nothing raises but a missing file."""
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").split("\n")
    except OSError as error:
        raise UserError(f"predictions {path} cannot be read ({error.strerror}); give a JSONL file") from error
    rows, notes = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            notes.append(f"line {number} is not valid JSON (cut off?) and was left out")
            continue
        if not isinstance(row, dict) or not _is_whole(row):
            notes.append(f"line {number} needs question_id (text or number) and text, and was left out")
        elif CHECKSUM in row and row[CHECKSUM] != checksum(row):
            notes.append(f"line {number} does not have its checksum and was left out")
        else:
            rows.append(row)
    return rows, notes


def _is_whole(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("question_id"), (str, int)) and isinstance(row.get("text"), str)


def read_predictions(path: str | Path, known: Sequence[str]) -> Predictions:
    """Read a predictions file and compare its ids with the questions'.

    Raises:
        UserError: if the file is missing or has no usable line.
    """
    rows, notes = read_rows(Path(path))
    if not rows:
        raise UserError(f"{path} has no usable line; each needs question_id and text")
    counts, asked = Counter(row["question_id"] for row in rows), set(known)
    repeated = sum(count > 1 for count in counts.values())
    unknown = sum(name not in asked for name in counts)
    missing = sum(name not in counts for name in known)
    told = ((repeated, "ids stand in several lines; the last counts"), (unknown, "ids are no question's; ignored"))
    notes += [f"{count} {what}" for count, what in (*told, (missing, "questions have no answer; wrong")) if count]
    failed = [str(row["error"]) for row in rows if row.get("error") and row["question_id"] in asked]
    if failed:
        notes.append(f"{len(failed)} questions could not be asked; wrong. The first: {failed[0]}")
    confidences, odd = _read_confidences(rows)
    if odd:
        notes.append(f"{odd} confidences are no probability (NaN, text or out of 0..1); ignored")
    return Predictions(tuple((row["question_id"], row["text"]) for row in rows), tuple(notes), confidences)


def _read_confidences(rows: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], int]:
    given = {str(row["question_id"]): row["confidence"] for row in rows if row.get("confidence") is not None}
    kept = {
        name: float(value)
        for name, value in given.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    }
    return kept, len(given) - len(kept)


class PredictionFile:
    """Predictions of one process, appended batch by batch; continued after a kill.

    Args:
        path: the JSONL file.
        settings: what the answers depend on; kept beside it.

    Raises:
        UserError: if the file was begun with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        check_settings(path, path.with_suffix(".settings.json"), dict(settings), "--output_dir")
        rows = [row for row in read_rows(path)[0] if CHECKSUM in row] if path.is_file() else []
        self.done = {str(row["question_id"]): row for row in rows if not row.get("error")}
        write_atomically(path, "".join(map(_line, self.done.values())))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows with checksums and make sure that they are on disk."""
        append_durably(self.path, "".join(map(_line, rows)))
        self.done |= {str(row["question_id"]): dict(row) for row in rows if not row.get("error")}


def shard_path(folder: Path, name: str, rank: int) -> Path:
    """Return the file that one of several processes appends to."""
    return folder / f"{name}.shard{rank}.jsonl"


def read_shards(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Return question id -> row of all processes' files, also of a run with more processes; answers before errors."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{name}.shard*.jsonl")):
        for row in read_rows(path)[0]:
            name_of_row = str(row["question_id"])
            if CHECKSUM in row and (not row.get("error") or name_of_row not in found):
                found[name_of_row] = row
    return found


def merge_shards(folder: Path, name: str, known: Sequence[str]) -> Path:
    """Join the processes' files into ``<name>.jsonl`` in the order of the questions.

    Raises:
        UserError: if a question has no row; the run must go on first.
    """
    rows = read_shards(folder, name)
    missing = [question_id for question_id in known if question_id not in rows]
    if missing:
        raise UserError(f"{len(missing)} questions of {name} have no row in {folder}; run the same command again")
    merged = folder / f"{name}.jsonl"
    write_atomically(merged, "".join(_line(rows[question_id]) for question_id in known))
    return merged


def write_predictions(path: Path, predictions: Predictions) -> None:
    """Write answers that no model was asked for."""
    rows = ({"question_id": name, "text": text} for name, text in predictions.lines)
    write_atomically(path, "".join(map(_line, rows)))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps({**row, CHECKSUM: checksum(row)}, ensure_ascii=False) + "\n"
