"""A user's own folder: a CSV with an image, a question and an answer per row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from ..record import Record
from ..source import Item, Located, Rejected, RowProblem, ask, check_folder, find_file, read_csv_rows

DEFAULT_COLUMNS = {"image": "image", "question": "question", "answer": "answer"}


def read_table(
    source: str | Path,
    split: str,
    file: str = "questions.csv",
    columns: Mapping[str, str] | None = None,
    dataset: str = "table",
) -> Iterator[Item]:
    """Yield the rows of a CSV. Columns ``id``, ``split``, ``patient`` and ``study`` are used when they are there.

    Args:
        source: folder with the CSV and the images (PNG, JPEG, DICOM or NIfTI) at any depth.
        split: rows whose ``split`` column says so; all rows when there is no such column.
        file: name of the CSV below ``source``.
        columns: names of the image, question and answer columns, when they are others. An empty image cell makes a
            text-only row.
        dataset: for the metadata.

    Raises:
        UserError: when the file or a column is missing.
    """
    names = {**DEFAULT_COLUMNS, **(columns or {})}
    path = find_file(check_folder(source), file)
    for number, row in read_csv_rows(path, list(names.values())):
        if isinstance(row, str):
            yield Rejected(number, row, path.name)
        elif row.get("split", split) == split:
            try:
                yield Located(number, _convert(row, names, dataset, split, number), path.name)
            except RowProblem as problem:
                yield Rejected(number, str(problem), path.name)


def _convert(row: Mapping[str, str], names: Mapping[str, str], dataset: str, split: str, number: int) -> Record:
    image, question = row[names["image"]], row[names["question"]]
    metadata = {"dataset": dataset, "split": split, "question": question}
    metadata |= {key: row[key] for key in ("patient", "study") if row.get(key)}
    messages = ask(question, row[names["answer"]], False if image else None)
    return Record(row.get("id") or str(number), messages, (image,) if image else (), metadata)
