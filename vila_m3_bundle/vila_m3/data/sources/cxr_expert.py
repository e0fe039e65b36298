"""Prepared conversations about radiographs, with the saved predictions of the chest X-ray expert in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from vila_m3_common.errors import UserError, near_match_hint

from ..experts.cxr import add_expert, read_scores
from ..record import Record, parse_row
from ..source import Item, Pending, RowProblem, check_folder


def read_with_predictions(
    source: str | Path, split: str, input_name: str, predictions: str | Path, cards: str, dataset: str
) -> Iterator[Item]:
    """Yield the rows of a prepared data set with the expert's call and predictions before the first answer.

    Args:
        source: folder of the prepared files, ``<input_name>_<split>.jsonl`` or its shards.
        split: of the prepared data set.
        input_name: name of the prepared data set, such as ``mimic_report`` or ``medical_diff_vqa``.
        predictions: folder of ``<image>.json``, see :func:`.experts.cxr.read_scores`.
        cards: text of the model cards.
        dataset: for the metadata.

    Raises:
        UserError: if there are no such files.
    """
    folder, saved = check_folder(source), check_folder(predictions)
    for file in find_files(folder, f"{input_name}_{split}"):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    convert = partial(_convert, line, str(saved), cards, dataset)
                    yield Pending(number, convert, file.name)


def find_files(folder: Path, name: str) -> list[Path]:
    """Return the file of a prepared data set, or its shards.

    Raises:
        UserError: if there are none.
    """
    whole = folder / f"{name}.jsonl"
    files = [whole] if whole.is_file() else sorted(folder.glob(f"{name}-[0-9][0-9][0-9][0-9][0-9].jsonl"))
    if not files:
        prepared = sorted(path.name for path in folder.glob("*.jsonl") if not path.name.endswith(".rejected.jsonl"))
        hint = near_match_hint(whole.name, prepared)
        raise UserError(f"{folder} has no {whole.name}; {hint}prepare it first, or set options#input_name and split")
    return files


def _convert(line: bytes, predictions: str, cards: str, dataset: str) -> Record:
    try:
        record = parse_row(line.decode("utf-8", "surrogateescape"))
        if len(record.images) != 1:
            raise RowProblem(f"shows {len(record.images)} images; the expert's form has one")
        record = add_expert(record, read_scores(predictions, record.images[0]), cards)
    except UserError as error:
        raise RowProblem(str(error)) from error
    return replace(record, metadata={**record.metadata, "dataset": dataset, "expert": "CXR"})
