"""Prepared conversations about radiographs, with the saved predictions of the chest X-ray expert in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from vila_m3_common.errors import UserError

from ..experts.cxr import add_expert, read_scores
from ..record import Record, parse_row
from ..source import Item, RowProblem, check_folder
from .prepared import read_prepared


def read_with_predictions(
    source: str | Path, split: str, input_name: str, predictions: str | Path, cards: str, dataset: str
) -> Iterator[Item]:
    """Return the rows of a prepared data set with the expert's call and predictions before the first answer.

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
    convert = partial(_convert, predictions=str(saved), cards=cards, dataset=dataset)
    return read_prepared(folder, f"{input_name}_{split}", convert)


def _convert(line: bytes, predictions: str, cards: str, dataset: str) -> Record:
    try:
        record = parse_row(line.decode("utf-8", "surrogateescape"))
        if len(record.images) != 1:
            raise RowProblem(f"shows {len(record.images)} images; the expert's form has one")
        record = add_expert(record, read_scores(predictions, record.images[0]), cards)
    except UserError as error:
        raise RowProblem(str(error)) from error
    return replace(record, metadata={**record.metadata, "dataset": dataset, "expert": "CXR"})
