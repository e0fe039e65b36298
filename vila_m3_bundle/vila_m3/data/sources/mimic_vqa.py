"""Medical-Diff-VQA (Hu et al., 2023) and MIMIC-CXR-VQA (Bae et al., 2023): questions about MIMIC-CXR-JPG images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vila_m3_common.errors import check_choice

from ..record import Record
from ..source import (
    Item,
    Located,
    Rejected,
    RowProblem,
    ask,
    check_folder,
    find_file,
    get_text,
    read_csv_rows,
    read_json_list,
)

TYPES = ("abnormality", "presence", "view", "location", "level", "type")
DIFFERENCE = "difference"
_DIFF_SPLITS = {"train": ("train",), "validate": ("val", "validate"), "test": ("test",)}
_VQA_FILES = {"train": "train.json", "validate": "valid.json", "test": "test.json"}


def find_answer_type(answer: str) -> str:
    """Return closed or open as recorded: closed when "yes" or "no" is anywhere in the answer, as in "abnormal"."""
    text = answer.strip().lower()
    return "closed" if "yes" in text or "no" in text else "open"


def read_medical_diff_vqa(source: str | Path, split: str, has_difference: bool = False) -> Iterator[Item]:
    """Yield a question per row of the CSV, in its order.

    Args:
        source: folder with ``mimic_pair_questions.csv`` and ``mimic_all.csv``, which names each study's image.
        split: train, validate or test.
        has_difference: whether questions about the change between two studies are kept (two images: reference,
            then current; the original leaves them out).

    Raises:
        UserError: for an unknown split, or missing files and columns.
    """
    folder = check_folder(source)
    names = _DIFF_SPLITS[check_choice(split, list(_DIFF_SPLITS), "split")]
    file = find_file(folder, "mimic_pair_questions.csv")
    images: dict[str, str] = {}
    yield from _read_images(find_file(folder, "mimic_all.csv"), images)
    columns = ("study_id", "subject_id", "ref_id", "question_type", "question", "answer", "split")
    for number, row in read_csv_rows(file, columns):
        if isinstance(row, str):
            yield Rejected(number, row, file.name)
        elif row["split"] in names and (has_difference or row["question_type"] != DIFFERENCE):
            try:
                yield Located(number, _convert_diff(row, images, number, split), file.name)
            except RowProblem as problem:
                yield Rejected(number, str(problem), file.name)


def _read_images(file: Path, images: dict[str, str]) -> Iterator[Rejected]:
    """Fill in the first image of each study; yield the broken rows."""
    for number, row in read_csv_rows(file, ("subject_id", "study_id", "dicom_id")):
        if isinstance(row, str):
            yield Rejected(number, row, file.name)
        else:
            subject = row["subject_id"]
            path = f"files/p{subject[:2]}/p{subject}/s{row['study_id']}/{row['dicom_id']}.jpg"
            images.setdefault(row["study_id"], path)


def _convert_diff(row: Mapping[str, str], images: Mapping[str, str], number: int, split: str) -> Record:
    kind = row["question_type"]
    if kind not in (*TYPES, DIFFERENCE):
        raise RowProblem(f"question_type {kind!r:.40} is none of {', '.join((*TYPES, DIFFERENCE))}")
    studies = [row["ref_id"], row["study_id"]] if kind == DIFFERENCE else [row["study_id"]]
    missing = [study for study in studies if study not in images]
    if missing:
        raise RowProblem(f"study {', '.join(missing)} has no image in mimic_all.csv")
    question, answer = row["question"], row["answer"]
    messages = ask(question, answer, image_first=False)
    if kind == DIFFERENCE:
        messages = (type(messages[0])("user", f"{question}\n<image>\n<image>"), messages[1])
    metadata = {
        "dataset": "medical_diff_vqa",
        "split": split,
        "patient": f"p{row['subject_id']}",
        "study": f"s{row['study_id']}",
        "question_type": kind,
        "answer_type": find_answer_type(answer),
        "question": question,
    }
    return Record(f"{split}-{number}", messages, tuple(images[study] for study in studies), metadata)


def read_mimic_cxr_vqa(source: str | Path, split: str) -> Iterator[Item]:
    """Yield the questions of the release's ``train.json``, ``valid.json`` or ``test.json``.

    An answer is a list; an empty one is said as "none", several are joined with commas.

    Args:
        source: folder of the JSON files; images are ``files/p10/p.../s.../<image_id>.jpg`` below the image root.
        split: train, validate or test.

    Raises:
        UserError: for an unknown split or a missing file.
    """
    name = _VQA_FILES[check_choice(split, list(_VQA_FILES), "split")]
    file = find_file(check_folder(source), name, f"MIMIC-CXR-VQA/dataset/{name}")
    for number, row in enumerate(read_json_list(file), start=1):
        try:
            yield Located(number, _convert_vqa(row, number, split), file.name)
        except RowProblem as problem:
            yield Rejected(number, str(problem), file.name)


def _convert_vqa(row: Any, number: int, split: str) -> Record:
    question, subject, study = get_text(row, "question"), get_text(row, "subject_id"), get_text(row, "study_id")
    answers = row.get("answer")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise RowProblem("the answer is not a list of texts")
    image = f"files/p{subject[:2]}/p{subject}/s{study}/{get_text(row, 'image_id')}.jpg"
    kind = get_text(row, "semantic_type", "")
    metadata = {
        "dataset": "mimic_cxr_vqa",
        "split": split,
        "patient": f"p{subject}",
        "study": f"s{study}",
        "question_type": kind,
        "content_type": get_text(row, "content_type", ""),
        "answer_type": "closed" if kind == "verify" else "open",
        "question": question,
    }
    return Record(f"{split}-{number}", ask(question, ", ".join(answers) or "none", False), (image,), metadata)


# The four steps of the original's notebook, on rows in LLaVA's form.

Row = dict[str, Any]


def attach_paths(rows: Sequence[Row], paths: Mapping[str, str]) -> list[Row]:
    """Replace each row's image name by its path."""
    return [{**row, "image": paths[row["image"]]} for row in rows]


def _split_question(text: str) -> tuple[str, str]:
    """Return the expert's prefix and the question of a human turn, without the image placeholder.

    Raises:
        ValueError: for more than one line before the question, as recorded.
    """
    lines = text.replace("\n<image>", "").split("\n")
    if len(lines) > 2:
        raise ValueError(f"Invalid prefix format: {text}")
    return ("\n".join(lines[:-1]), lines[-1])


def select_type(rows: Sequence[Row], table: Mapping[str, str], kind: str) -> list[Row]:
    """Keep the question/answer pairs of one type; placeholder and prefix move to the first that is kept.

    Raises:
        KeyError: for a question that the table does not have, as recorded.
        ValueError: for a prefix of several lines.
    """
    selected = []
    for row in rows:
        turns: list[Row] = []
        first_prefix = _split_question(row["conversations"][0]["value"])[0]
        for human, answer in zip(row["conversations"][::2], row["conversations"][1::2], strict=True):
            question = _split_question(human["value"])[1]
            if question not in table:
                raise KeyError(f"Question '{question}' not found in question table.")
            if table[question] == kind:
                prefix = f"{first_prefix}\n" if first_prefix and not turns else ""
                text = question if turns else f"{prefix}{question}\n<image>"
                turns += [{"from": "human", "value": text}, dict(answer)]
        if turns:
            selected.append({**row, "conversations": turns})
    return selected


def add_types(rows: Sequence[Row], kind: str) -> list[Row]:
    """Add the type of the questions, and closed or open from the first answer alone, as recorded."""
    return [
        {**row, "question_type": kind, "answer_type": find_answer_type(row["conversations"][1]["value"])}
        for row in rows
    ]


def make_second_round(rows: Sequence[Row], kept: Sequence[Row], predictions: Mapping[str, str]) -> list[Row]:
    """Put the first round's question and predicted answer before the first question of the second round.

    Args:
        rows: the whole conversations of the first round.
        kept: those of one type, from :func:`select_type`.
        predictions: answers under ``<id>_<first human turn>``. As recorded, an entry without one loses its first
            pair, and what remains has no prefix; one with no pair left is dropped.
    """
    first_turns = {row["id"]: row["conversations"][0]["value"] for row in rows}
    result = []
    for row in kept:
        opening = first_turns[row["id"]]
        predicted = predictions.get(f"{row['id']}_{opening}")
        turns = [dict(turn) for turn in row["conversations"]]
        holder = opening.replace("<image>", "<patch_token_holder>")
        if turns[0]["value"] == opening:
            turns = turns[2:] if predicted is None else [{**turns[0], "value": holder}, *turns[1:]]
        elif predicted is not None:
            question = _split_question(turns[0]["value"])[1]
            turns[0]["value"] = f"{holder}\n###{predicted}\n###Human: {question}"
        else:
            turns[0]["value"] = _split_question(turns[0]["value"])[1]
        if turns:
            result.append({**row, "conversations": turns})
    return result
