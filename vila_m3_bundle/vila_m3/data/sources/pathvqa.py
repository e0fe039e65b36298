"""PathVQA (He et al., 2020): the parquet release, read in the original's two stages, and the pickle release."""

from __future__ import annotations

import io
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from vila_m3_common.errors import UserError, check_choice

from ..record import Record, resolve_image
from ..source import Item, Located, Rejected, RowProblem, ask, check_folder, get_text

# The original's training set is train followed by validation. Coins are thrown in the order train, validation, test.
SPLITS = {
    "train": ("train",),
    "validate": ("validation",),
    "test": ("test",),
    "train_validate": ("train", "validation"),
}
_FOLDERS = {"train": "train", "validation": "val", "test": "test"}
IDS = ("unique", "file_name")


def read_pathvqa(
    source: str | Path, split: str, images: str | Path, ids: str = "unique", seed: int = 0
) -> Iterator[Item]:
    """Yield the rows of the parquet shards and write their images, as JPEG, below ``images``.

    Args:
        source: folder of the shards, ``train-00000-of-00007-....parquet`` and so on; those of the parts before
            ``split`` must be there too, since coins are thrown for their rows first.
        split: train, validate, test or train_validate.
        images: folder for ``train/``, ``val/`` and ``test/``; a name that comes again is overwritten, as recorded.
        ids: ``file_name`` are the recorded ids, equal for all questions of an image; ``unique`` appends a number
            from the second question on.
        seed: of the placement of the image.

    Raises:
        UserError: for an unknown split, or missing shards.
    """
    folder = check_folder(source)
    wanted = SPLITS[check_choice(split, list(SPLITS), "split")]
    check_choice(ids, IDS, "form of ids")
    coin = random.Random(seed)
    counts: dict[str, int] = {}
    parts = ("train", "validation", "test")
    for part in parts[: parts.index(wanted[-1]) + 1]:
        if part not in wanted:
            for _ in range(_count_rows(folder, part)):
                coin.choice((0, 1))
            continue
        for file in _find_shards(folder, part):
            for number, row in enumerate(_read_rows(file), start=1):
                image_first = coin.choice((0, 1)) == 0
                try:
                    record = _convert_row(row, part, Path(images), image_first)
                except RowProblem as problem:
                    yield Rejected(number, str(problem), file.name)
                    continue
                counts[record.id] = counts.get(record.id, 0) + 1
                if ids == "unique" and counts[record.id] > 1:
                    name = f"{record.id}#{counts[record.id]}"
                    record = Record(name, record.messages, record.images, record.metadata)
                yield Located(number, record, file.name)


def _find_shards(folder: Path, part: str) -> list[Path]:
    found = sorted([*folder.glob(f"{part}-*.parquet"), *folder.glob(f"data/{part}-*.parquet")])
    if not found:
        raise UserError(f"{folder} has no {part}-*.parquet; give the folder of the parquet shards")
    expected = found[0].name.split("-of-")[-1][:5]
    if expected.isdigit() and int(expected) != len(found):
        raise UserError(f"{folder} has {len(found)} of {int(expected)} {part} shards; download the others")
    return found


def _count_rows(folder: Path, part: str) -> int:
    return sum(pq.ParquetFile(file).metadata.num_rows for file in _find_shards(folder, part))


def _read_rows(file: Path) -> Iterator[dict[str, Any]]:
    try:
        for batch in pq.ParquetFile(file).iter_batches(batch_size=64, columns=["image", "question", "answer"]):
            yield from batch.to_pylist()
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); it may be cut off or of another layout") from error


def _convert_row(row: dict[str, Any], part: str, images: Path, image_first: bool) -> Record:
    image = row.get("image") or {}
    name = get_text(image, "path")
    question, answer = get_text(row, "question"), get_text(row, "answer")
    messages = ask(question, answer, image_first)
    relative = f"{_FOLDERS[part]}/{name}"
    _write_image(image.get("bytes"), relative, images)
    closed = answer.strip().lower() in ("yes", "no")
    metadata = {
        "dataset": "pathvqa",
        "split": "validate" if part == "validation" else part,
        "patient": name,
        "language": "en",
        "answer_type": "CLOSED" if closed else "OPEN",
        "question": question,
    }
    return Record(name, messages, (relative,), metadata)


def _write_image(data: bytes | None, name: str, images: Path) -> None:
    """Write an image as JPEG; only CMYK is converted, as recorded."""
    try:
        path = resolve_image(name, images)
        image = Image.open(io.BytesIO(data or b""))
        image.load()
        path.parent.mkdir(parents=True, exist_ok=True)
        (image.convert("RGB") if image.mode in ("CMYK", "RGBA", "P") else image).save(path, format="JPEG")
    except (UserError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise RowProblem(f"image {name}: {error}") from error


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, texts and numbers; a pickle that names any class or function is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise UserError(
            f"the pickle asks for {module}.{name}; a question file holds plain values only: do not trust it"
        )


def read_plain_pickle(file: Path) -> Any:
    """Read a pickle of lists, dictionaries, texts and numbers.

    Raises:
        UserError: if it holds anything else, or is cut off.
    """
    try:
        with file.open("rb") as stream:
            return _PlainUnpickler(stream).load()
    except UserError:
        raise
    except (pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}); it may be cut off") from error


def read_pathvqa_pickle(source: str | Path, split: str) -> Iterator[Item]:
    """Yield the rows of the original release (``qas/test_vqa.pkl``); ids are the question ids that graders need.

    Args:
        source: folder with ``qas`` and ``images``.
        split: train, validate or test.

    Raises:
        UserError: for a missing file, or a pickle that holds more than plain values.
    """
    folder = check_folder(source)
    name = {"train": "train", "validate": "val", "test": "test"}[check_choice(split, list(SPLITS)[:3], "split")]
    candidates = [folder / f"qas/{name}_vqa.pkl", folder / f"qas/{name}/{name}_vqa.pkl", folder / f"{name}_vqa.pkl"]
    file = next((path for path in candidates if path.is_file()), None)
    if file is None:
        raise UserError(f"{folder} has no qas/{name}_vqa.pkl; give the folder of the original release")
    rows = read_plain_pickle(file)
    if not isinstance(rows, list):
        raise UserError(f"{file} holds a {type(rows).__name__}; a list of rows is needed")
    for number, row in enumerate(rows, start=1):
        try:
            yield Located(number, _convert_pickled(row, name, split), file.name)
        except RowProblem as problem:
            yield Rejected(number, str(problem), file.name)


def _convert_pickled(row: Any, folder: str, split: str) -> Record:
    question, image = get_text(row, "sent"), get_text(row, "img_id")
    label = row.get("label")
    answer = next(iter(label), "") if isinstance(label, dict) else get_text(row, "answer")
    metadata = {
        "dataset": "pathvqa",
        "split": split,
        "qid": row.get("question_id"),
        "patient": image,
        "language": "en",
        "answer_type": get_text(row, "answer_type", ""),
        "content_type": get_text(row, "question_type", ""),
        "question": question,
    }
    return Record(get_text(row, "question_id"), ask(question, str(answer), False), (f"{folder}/{image}.jpg",), metadata)
