"""VQA-RAD (Lau et al., 2018): clinicians' questions about radiographs, CT and MRI, with rephrasings."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vila_m3_common.errors import check_choice

from ..record import Message, Record
from ..source import Item, Located, Rejected, RowProblem, ask, check_folder, find_file, get_text, read_json_list

FILE_NAME = "VQA_RAD_Dataset_Public.json"
SPLITS = ("train", "test")
QUESTIONS = ("published", "all")

# Asked about every training image by the original converter (recorded in its output, misspelling included).
ORGAN_QUESTIONS = (
    "What is the visible organ?",
    "What organ is it?",
    "Is any organ visible?",
    "Which can organ can be seen?",
    "Any visible organs?",
)


def read_vqa_rad(
    source: str | Path,
    split: str,
    questions: str = "published",
    organ_questions: bool = True,
    seed: int = 0,
    image_first: bool = False,
    suffix: str = "",
    suffix_share: float = 1.0,
    capitalizes: bool = False,
) -> Iterator[Item]:
    """Yield the questions of a split in the order of the release.

    Args:
        source: folder with ``VQA_RAD_Dataset_Public.json`` and ``images``.
        split: train, or test (rows whose ``phrase_type`` starts with ``test_``).
        questions: ``published`` gives the 491 test questions of the published score (closed rows and their
            rephrasings) and the original's training set; ``all`` gives each row once as it is: 451 in test.
        organ_questions: whether every training row also asks for the organ, as in the original (``published`` only).
        seed: of the wording of the organ questions.
        image_first: whether the image stands before the question; behind it, as in the original.
        suffix: sentence behind questions, as benchmarks append one.
        suffix_share: share of the rows that have it, drawn.
        capitalizes: whether answers begin with a capital, as SLAKE's do; the release has "yes", "Yes" and "YES".

    Raises:
        UserError: for an unknown split or choice of questions, or a folder without the file.
    """
    check_choice(split, SPLITS, "split")
    check_choice(questions, QUESTIONS, "choice of questions")
    file = find_file(check_folder(source), FILE_NAME)
    generator, position = random.Random(seed), 0
    coin = random.Random(f"suffix/{seed}")
    for row_number, row in enumerate(read_json_list(file), start=1):
        try:
            if not _is_selected(row, split, questions):
                continue
            organ = generator.choice(ORGAN_QUESTIONS) if split == "train" and organ_questions else ""
            for kind, question, answer in _list_questions(row, questions, organ):
                position += 1
                answer = _capitalize(answer) if capitalizes else answer
                messages = ask(question, answer, image_first, suffix if coin.random() < suffix_share else "")
                record = _convert(row, str(position), split, kind, question, messages)
                yield Located(row_number, record, file.name)
        except RowProblem as problem:
            yield Rejected(row_number, str(problem), file.name)


def _capitalize(answer: str) -> str:
    return answer.capitalize() if answer.strip().lower() in ("yes", "no") else answer[:1].upper() + answer[1:]


def _is_selected(row: Any, split: str, questions: str) -> bool:
    if get_text(row, "phrase_type").startswith("test_") != (split == "test"):
        return False
    # Two training rows say "CLOSED " with a blank; the published test questions are those without one.
    return split == "train" or questions == "all" or row.get("answer_type") == "CLOSED"


def _list_questions(row: Mapping[str, Any], questions: str, organ: str) -> Iterator[tuple[str, str, str]]:
    answer = get_text(row, "answer")
    yield "question", get_text(row, "question"), answer
    if questions == "all":
        return
    if organ:
        yield "organ", organ, get_text(row, "image_organ")
    rephrased = row.get("question_rephrase")
    if rephrased not in (None, "NULL"):
        yield "rephrase", get_text(row, "question_rephrase"), answer


def _convert(
    row: Mapping[str, Any], name: str, split: str, kind: str, question: str, messages: tuple[Message, Message]
) -> Record:
    metadata = {
        "dataset": "vqa_rad",
        "split": split,
        "qid": row.get("qid"),
        "linked_qid": row.get("qid_linked_id"),
        "patient": get_text(row, "image_case_url", ""),
        "language": "en",
        "answer_type": "OPEN" if kind == "organ" else get_text(row, "answer_type", "").strip(),
        "content_type": "ORGAN" if kind == "organ" else get_text(row, "question_type", "").strip(),
        "phrase_type": get_text(row, "phrase_type"),
        "wording": kind,
        "location": get_text(row, "image_organ", ""),
        "question": question,
        "base_question": get_text(row, "question"),
    }
    return Record(name, messages, (get_text(row, "image_name"),), metadata)
