"""SLAKE 1.0 (Liu et al., 2021): questions in English and Chinese about CT, MRI and X-ray images."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from string import ascii_uppercase
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


def read_slake_choices(
    source: str | Path,
    split: str,
    language: str = "en",
    content_types: Sequence[str] = ("KG",),
    option_count: int = 4,
    seed: int = 0,
    suffix: str = "",
) -> Iterator[Item]:
    """Yield questions of a split as multiple choice without their images: what can be known from the text alone.

    Yes/no questions have the two options. The wrong options of an open question are answers to other open questions of
    the split, drawn by the seed and the question.

    Args:
        source: folder with ``train.json``, ``validate.json``, ``test.json``.
        split: train, validate, test or train_validate.
        language: of the questions.
        content_types: kinds of questions to keep; ``KG`` are those that ask for medical knowledge.
        option_count: options of an open question, at most 26 and as many as there are answers.
        seed: of the wrong options and of the order.
        suffix: sentence behind the options.

    Raises:
        UserError: for an unknown split or a folder without the files.
    """
    folder = check_folder(source)
    names = SPLITS[check_choice(split, list(SPLITS), "split")]
    rows = [(name, number, row) for name in names for number, row in _numbered(folder, name)]
    rows = [(name, number, row) for name, number, row in rows if _is_kept(row, language, content_types)]
    answers = sorted({row["answer"] for _, _, row in rows if row.get("answer") and row.get("answer_type") == "OPEN"})
    for name, number, row in rows:
        try:
            question, answer = get_text(row, "question"), get_text(row, "answer")
            draw = random.Random(f"choices/{seed}/{row.get('qid')}")
            options = _options(answer, answers, option_count, draw)
            lines = [f"{letter}. {text}" for letter, text in zip(ascii_uppercase, options, strict=False)]
            truth = lines[options.index(answer)]
            messages = ask("\n".join([question, *lines]), truth, None, suffix)
            metadata = {**_metadata(row, name), "answer_type": "CLOSED", "answer_letter": truth[0]}
            yield Located(number, Record(f"{name}-{row.get('qid')}", messages, (), metadata), f"{name}.json")
        except RowProblem as problem:
            yield Rejected(number, str(problem), f"{name}.json")


def _numbered(folder: Path, name: str) -> Iterator[tuple[int, Any]]:
    yield from enumerate(read_json_list(find_file(folder, f"{name}.json")), start=1)


def _is_kept(row: Any, language: str, content_types: Sequence[str]) -> bool:
    return isinstance(row, dict) and row.get("q_lang") == language and row.get("content_type") in content_types


def _options(answer: str, answers: Sequence[str], count: int, draw: random.Random) -> list[str]:
    if answer in ("Yes", "No"):
        return ["Yes", "No"]
    others = [text for text in answers if text.lower() != answer.lower()]
    options = [answer, *draw.sample(others, min(count - 1, len(others)))]
    draw.shuffle(options)
    return options


def _convert(row: Any, name: str, split: str, image_first: bool, suffix: str) -> Record:
    messages = ask(get_text(row, "question"), get_text(row, "answer"), image_first, suffix)
    return Record(name, messages, (get_text(row, "img_name"),), _metadata(row, split))


def _metadata(row: Any, split: str) -> dict[str, Any]:
    return {
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
        "question": get_text(row, "question"),
    }
