"""SLAKE 1.0 (Liu et al., 2021): questions in English and Chinese about CT, MRI and X-ray images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vila_m3_common.errors import check_choice

from ..record import Record
from ..source import Item, Located, Rejected, RowProblem, ask, check_folder, find_file, get_text, read_json_list

# The training set of the original is train followed by validate, with ids counted through.
SPLITS = {
    "train": ("train",),
    "validate": ("validate",),
    "test": ("test",),
    "train_validate": ("train", "validate"),
}


def read_slake(
    source: str | Path,
    split: str,
    languages: Sequence[str] = ("en",),
    seed: int = 0,
    image_first: bool | None = None,
    suffix: str = "",
    suffix_share: float = 1.0,
    spared: Sequence[str] = (),
) -> Iterator[Item]:
    """Yield the questions of a split in the order of the release.

    Ids are positions over all languages, and whether the image comes before or after the question is drawn for
    every kept row, both as the original converter does.

    Args:
        source: folder with ``train.json``, ``validate.json``, ``test.json`` and ``imgs``.
        split: train, validate, test or train_validate.
        languages: values of ``q_lang`` to keep.
        seed: of the placement of the image.
        image_first: whether the image stands before the question in every row; None draws it.
        suffix: sentence behind questions, as benchmarks append one.
        suffix_share: share of the rows that have it, drawn.
        spared: languages in whose other parts no image of a kept row may be (test, and validate when ``split`` is
            train). The release draws its parts for each language anew: of 96 images of the English test questions 72
            have Chinese training questions.

    Raises:
        UserError: for an unknown split or a folder without the files.
    """
    folder, position = check_folder(source), 0
    left_out = _images_elsewhere(folder, split, spared)
    coin = random.Random(f"suffix/{seed}")
    generator = random.Random(seed)
    for name in SPLITS[check_choice(split, list(SPLITS), "split")]:
        file = find_file(folder, f"{name}.json")
        for row_number, row in enumerate(read_json_list(file), start=1):
            position += 1
            if isinstance(row, dict) and row.get("q_lang") not in languages and "q_lang" in row:
                continue
            is_drawn_first = generator.randint(0, 1) == 1
            try:
                if left_out and get_text(row, "img_name") in left_out:
                    continue
                is_first = is_drawn_first if image_first is None else image_first
                appended = suffix if coin.random() < suffix_share else ""
                record = _convert(row, str(position), name, is_first, appended)
                yield Located(row_number, record, file.name)
            except RowProblem as problem:
                yield Rejected(row_number, str(problem), file.name)


def _images_elsewhere(folder: Path, split: str, languages: Sequence[str]) -> set[str]:
    """Return the images of the questions in these languages that are in parts other than those of a split."""
    others = [name for name in ("train", "validate", "test") if name not in SPLITS[split]] if languages else []
    rows = [row for name in others for row in read_json_list(find_file(folder, f"{name}.json"))]
    return {row["img_name"] for row in rows if isinstance(row, dict) and row.get("q_lang") in languages}


def _convert(row: Any, name: str, split: str, image_first: bool, suffix: str) -> Record:
    question, answer = get_text(row, "question"), get_text(row, "answer")
    metadata = {
        "dataset": "slake",
        "split": split,
        "qid": row.get("qid"),
        "patient": f"slake-{row.get('img_id')}",
        "language": get_text(row, "q_lang"),
        "answer_type": get_text(row, "answer_type", ""),
        "content_type": get_text(row, "content_type", ""),
        "base_type": get_text(row, "base_type", ""),
        "modality": get_text(row, "modality", ""),
        "location": get_text(row, "location", ""),
        "question": question,
    }
    return Record(name, ask(question, answer, image_first, suffix), (get_text(row, "img_name"),), metadata)
