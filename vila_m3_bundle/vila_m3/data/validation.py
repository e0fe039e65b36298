"""Validation of JSONL files and search for leaks; bad rows are told and kept aside, and stop nothing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from vila_m3_common.errors import UserError
from vila_m3_common.trigger import parse_triggers

from .record import Record, find_count_problem, find_image_problem, load_image, parse_row, resolve_image

# Bits that may differ between the 64-bit hashes of near-duplicates.
HASH_DISTANCE = 4
_CARD = re.compile(r"^<(\w+)\(args\)>.*Valid args are: (.*)$", re.MULTILINE)


def valid_arguments(cards: str) -> dict[str, tuple[str, ...]]:
    """Read the experts and the arguments they take out of the text of the model cards."""
    return {name: tuple(re.findall(r"'([^']*)'", told)) for name, told in _CARD.findall(cards)}


@dataclass
class Validator:
    """Finds what is wrong with a row; keeps hashes of the rows seen.

    Args:
        image_root: folder of the images.
        cards: text of the model cards, which names the experts and their arguments.
        decodes_images: whether images are read, not only looked for.
        max_answer: longest answer in characters.
        ascii_share: least share of Latin characters among a text's letters; 0 allows every language.
    """

    image_root: str | Path
    cards: str
    decodes_images: bool = True
    max_answer: int = 20_000
    ascii_share: float = 0.8
    _rows: set[bytes] = field(default_factory=set)
    _ids: set[bytes] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.arguments = valid_arguments(self.cards)

    def find_problem(self, line: str) -> tuple[str, str]:
        """Return the kind of fault and what exactly is wrong, empty when the row is good."""
        try:
            record = parse_row(line)
        except UserError as error:
            return "schema", str(error)
        checks: Mapping[str, Callable[[Record], str]] = {
            "turn order": find_turn_problem,
            "image count": find_count_problem,
            "image": self._image_problem,
            "trigger": self._trigger_problem,
            "answer length": self._answer_problem,
            "language": self._language_problem,
            "duplicate": self._duplicate_problem,
        }
        for kind, check in checks.items():
            if problem := check(record):
                return kind, problem
        return "", ""

    def _image_problem(self, record: Record) -> str:
        return find_image_problem(record, self.image_root, decodes=self.decodes_images)

    def _trigger_problem(self, record: Record) -> str:
        for message in record.messages:
            for trigger in parse_triggers(message.text) if message.role == "assistant" else ():
                if trigger.name not in self.arguments:
                    return f"{trigger} calls an expert without a card; cards: {', '.join(self.arguments)}"
                valid = self.arguments[trigger.name]
                if trigger.argument not in (valid or ("",)):
                    return f"{trigger} has an invalid argument; valid: {', '.join(valid) or 'none'}"
        return ""

    def _answer_problem(self, record: Record) -> str:
        for number, message in enumerate(record.messages, start=1):
            if message.role == "assistant" and not message.text.strip():
                return f"the answer in turn {number} is empty"
            if message.role == "assistant" and len(message.text) > self.max_answer:
                return f"the answer in turn {number} has {len(message.text)} characters; {self.max_answer} are allowed"
        return ""

    def _language_problem(self, record: Record) -> str:
        letters = [char for message in record.messages for char in message.text if char.isalpha()]
        share = sum(char < "\u0250" for char in letters) / max(1, len(letters))
        return f"{share:.0%} of the letters are Latin; {self.ascii_share:.0%} are asked for" * (
            share < self.ascii_share
        )

    def _duplicate_problem(self, record: Record) -> str:
        texts = [f"{message.role}\t{message.text}" for message in record.messages]
        content = hashlib.blake2b("\n".join((*texts, *record.images)).encode(errors="replace"), digest_size=12).digest()
        name = hashlib.blake2b(record.id.encode(errors="replace"), digest_size=12).digest()
        if content in self._rows:
            return "the same conversation about the same images stands in an earlier row"
        if record.id and name in self._ids:
            return f"id {record.id} stands in an earlier row"
        self._rows.add(content)
        self._ids.add(name)
        return ""


def find_turn_problem(record: Record) -> str:
    """Return why the order of the turns is wrong: a user first, an assistant last, no speaker twice in a row."""
    spoken = [message.role for message in record.messages if message.in_context]
    if not spoken or spoken[0] != "user":
        return "the first turn is not the user's"
    if spoken[-1] != "assistant":
        return "the last turn is not the assistant's"
    for number, (before, after) in enumerate(zip(spoken, spoken[1:], strict=False), start=2):
        if (before == "assistant") == (after == "assistant"):
            return f"turn {number} ({after}) follows a turn of {before}"
    return ""


def validate_file(path: str | Path, validator: Validator, output_dir: str | Path) -> dict[str, Any]:
    """Validate one JSONL file.

    Writes ``<name>.jsonl`` with the good rows as they are, ``<name>.dropped.jsonl`` with the others (row number,
    kind, reason, the line's beginning), and ``<name>.validation.json`` with the counts, each in one step at the end.

    Args:
        path: the file.
        validator: tells what is wrong with a row.
        output_dir: folder of the output; not that of ``path``.

    Returns:
        ``rows``, ``kept``, and ``dropped``: kind of fault -> count.

    Raises:
        UserError: if the file cannot be read, or would be overwritten.
    """
    path, folder = Path(path), Path(output_dir)
    if not path.is_file():
        raise UserError(f"data file {path} does not exist; prepare it first")
    if folder.resolve() == path.parent.resolve():
        raise UserError(f"output_dir {folder} is the folder of {path.name}, which it would overwrite; give another")
    folder.mkdir(parents=True, exist_ok=True)
    kept, dropped = folder / f"{path.stem}.jsonl", folder / f"{path.stem}.dropped.jsonl"
    counts: Counter[str] = Counter()
    row_count = 0
    with _replacing(kept) as good, _replacing(dropped) as bad:
        for number, line in _numbered_lines(path):
            row_count += 1
            kind, reason = validator.find_problem(line)
            if not kind:
                good.write(line + "\n")
                continue
            counts[kind] += 1
            row = {"row": number, "kind": kind, "reason": reason[:500], "line": line[:2000]}
            bad.write(json.dumps(row, ensure_ascii=False) + "\n")
    summary = {"file": path.name, "rows": row_count, "kept": row_count - counts.total(), "dropped": dict(counts)}
    (folder / f"{path.stem}.validation.json").write_text(json.dumps(summary, indent=1) + "\n")
    return summary


class _replacing:
    """A text file that takes its name when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")

    def __enter__(self) -> Any:
        self.file = self.partial.open("w", encoding="utf-8", errors="replace")
        return self.file

    def __exit__(self, kind: object, *rest: object) -> None:
        self.file.close()
        if kind is None:
            os.replace(self.partial, self.path)


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    # Split at line feeds only: a text may hold other characters that Python counts as line breaks.
    with path.open("rb") as file:
        for number, raw in enumerate(tqdm(file, desc=path.name, unit="row"), start=1):
            if raw.strip():
                yield number, raw.decode("utf-8", errors="replace").rstrip("\r\n")


def validate(files: Sequence[str], image_root: str | Path, cards: str, output_dir: str, **limits: Any) -> None:
    """Validate files and print the table of what was dropped and why.

    Args:
        files: JSONL files.
        image_root: folder of their images.
        cards: text of the model cards.
        output_dir: see :func:`validate_file`.
        limits: other settings of :class:`Validator`.
    """
    summaries = [validate_file(file, Validator(image_root, cards, **limits), output_dir) for file in files]
    kinds = sorted({kind for summary in summaries for kind in summary["dropped"]})
    print("| file | rows | kept |" + "".join(f" {kind} |" for kind in kinds))
    print("| --- | --- | --- |" + " --- |" * len(kinds))
    for summary in summaries:
        dropped = "".join(f" {summary['dropped'].get(kind, 0)} |" for kind in kinds)
        print(f"| {summary['file']} | {summary['rows']} | {summary['kept']} |{dropped}")


def difference_hash(image: Image.Image) -> int:
    """Return the 64 signs of the differences between neighbours of the 9 x 8 grey image, first the top row."""
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.LANCZOS), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, 1:] > grey[:, :-1]).tobytes(), "big")


@dataclass
class _Fingerprints:
    """What the rows of one file share with others: patients, and images by content and look."""

    patients: set[str] = field(default_factory=set)
    contents: dict[bytes, str] = field(default_factory=dict)
    looks: dict[str, int] = field(default_factory=dict)


def _read_fingerprints(path: Path, image_root: Path) -> _Fingerprints:
    found = _Fingerprints()
    for _, line in _numbered_lines(path):
        try:
            record = parse_row(line)
        except UserError:
            continue
        if patient := record.metadata.get("patient"):
            found.patients.add(str(patient))
        for name in set(record.images) - found.looks.keys():
            _add_image(found, name, image_root)
    return found


def _add_image(found: _Fingerprints, name: str, image_root: Path) -> None:
    """Images that cannot be read are the validation's business."""
    try:
        path = resolve_image(name, image_root)
        found.contents[hashlib.sha256(path.read_bytes()).digest()] = name
        found.looks[name] = difference_hash(Image.fromarray(load_image(path)))
    except (UserError, OSError, ValueError):
        return


def find_leaks(sets: Mapping[str, Mapping[str, str]], distance: int = HASH_DISTANCE) -> list[dict[str, Any]]:
    """Compare every pair of data files.

    Args:
        sets: name -> ``{"file": JSONL file, "images": folder of its images}``.
        distance: bits that may differ between near-duplicates.

    Returns:
        One row per pair: ``first``, ``second``, counts ``patients``, ``same_images``, ``near_images``, and examples
        of image pairs. Patients are counted, never named.
    """
    found = {name: _read_fingerprints(Path(entry["file"]), Path(entry["images"])) for name, entry in sets.items()}
    names = list(found)
    return [
        {"first": first, "second": second, **_compare(found[first], found[second], distance)}
        for index, first in enumerate(names)
        for second in names[index + 1 :]
    ]


def _compare(first: _Fingerprints, second: _Fingerprints, distance: int) -> dict[str, Any]:
    same = [(first.contents[key], second.contents[key]) for key in first.contents.keys() & second.contents.keys()]
    near = sorted(set(_near_pairs(first.looks, second.looks, distance)) - set(same))
    return {
        "patients": len(first.patients & second.patients),
        "same_images": len(same),
        "near_images": len(near),
        "examples": [*sorted(same)[:5], *near[:5]],
    }


def _near_pairs(first: Mapping[str, int], second: Mapping[str, int], distance: int) -> Iterable[tuple[str, str]]:
    """Two hashes that differ in at most ``distance`` bits agree in one of ``distance + 1`` pieces."""
    for low, high in _pieces(distance + 1):
        mask = (1 << (high - low)) - 1
        buckets: dict[int, list[str]] = defaultdict(list)
        for name, value in second.items():
            buckets[value >> low & mask].append(name)
        for name, value in first.items():
            for other in buckets.get(value >> low & mask, ()):
                if (value ^ second[other]).bit_count() <= distance:
                    yield name, other


def _pieces(count: int) -> list[tuple[int, int]]:
    edges = np.linspace(0, 64, count + 1).astype(int)
    return [(int(low), int(high)) for low, high in zip(edges[:-1], edges[1:], strict=True)]


def report_leaks(sets: Mapping[str, Mapping[str, str]], output: str | Path, distance: int = HASH_DISTANCE) -> None:
    """Write what :func:`find_leaks` finds as JSON, and print the table."""
    rows = find_leaks(sets, distance)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    Path(output).write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print("| first | second | same patients | same images | near-duplicates |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        cells = (row[key] for key in ("first", "second", "patients", "same_images", "near_images"))
        print(f"| {' | '.join(map(str, cells))} |")
