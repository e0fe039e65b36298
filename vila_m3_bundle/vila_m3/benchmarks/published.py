"""The graders of the VILA-M3 reference, faults included, so that its published scores can be compared with.

Each fault is named where it stands; :mod:`.answers` holds the corrected readings. The definitions come from
running the reference (Project-MONAI VLM, commit 8398861b).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from sklearn.metrics import f1_score


class PublishedGraderError(ValueError):
    """The reference grader ends with an error on this answer, or stops in its debugger."""


# Exact match: VQA-RAD, SLAKE, PathVQA -----------------------------------------------------------------------------


def exact_match(truths: Mapping[str, str], predictions: Sequence[tuple[Any, str]]) -> dict[str, bool]:
    """Grade VQA-RAD and SLAKE: equal after ``strip`` and ``lower``, nothing else.

    Ids are compared as they are, so that the number 1 is not the id "1"; the last of several lines with one id
    counts; a question without an answer is wrong.

    Args:
        truths: question id -> answer.
        predictions: (question id, text) in the order of the file.
    """
    texts = dict(predictions)
    return {name: name in texts and _simple(texts[name]) == _simple(truth) for name, truth in truths.items()}


def _simple(text: str) -> str:
    return text.strip().lower()


def pathvqa_match(truths: Mapping[str, str], predictions: Sequence[tuple[Any, str]]) -> dict[str, bool]:
    """Grade PathVQA's yes/no questions: equal after ``lower``; a blank at the end makes an answer wrong."""
    texts = dict(predictions)
    return {name: name in texts and texts[name].lower() == truth.lower() for name, truth in truths.items()}


# Medical-Diff-VQA -------------------------------------------------------------------------------------------------

_PUNCTUATION = (*';/[]"{}()=+\\_-><@`,?!',)
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The reference passes a flag where the number of replacements belongs; re.UNICODE is 32.
_REMOVED_PERIODS = int(re.UNICODE)
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_ARTICLES = ("a", "an", "the")
_CONTRACTED = [
    "ain't",
    "aren't",
    "can't",
    "could've",
    "couldn't",
    "didn't",
    "doesn't",
    "don't",
    "hadn't",
    "hasn't",
    "haven't",
    "he'd",
    "he's",
    "how'd",
    "how'll",
    "how's",
    "isn't",
    "it'd",
    "it'll",
    "let's",
    "ma'am",
    "mightn't",
    "might've",
    "mustn't",
    "must've",
    "needn't",
    "not've",
    "o'clock",
    "oughtn't",
    "shan't",
    "she's",
    "should've",
    "shouldn't",
    "somebody'll",
    "somebody's",
    "someone'd",
    "someone'll",
    "someone's",
    "something'd",
    "something'll",
    "that's",
    "there'd",
    "there're",
    "there's",
    "they'd",
    "they'll",
    "they're",
    "they've",
    "'twas",
    "wasn't",
    "we've",
    "weren't",
    "what'll",
    "what're",
    "what's",
    "what've",
    "when's",
    "where'd",
    "where's",
    "where've",
    "who'd",
    "who'll",
    "who's",
    "who've",
    "why'll",
    "why're",
    "why's",
    "won't",
    "would've",
    "wouldn't",
    "y'all",
    "you'd",
    "you'll",
    "you're",
    "you've",
]
_TWICE_CONTRACTED = [
    "couldn't've",
    "hadn't've",
    "he'd've",
    "it'd've",
    "mightn't've",
    "she'd've",
    "shouldn't've",
    "somebody'd've",
    "someone'd've",
    "something'd've",
    "there'd've",
    "they'd've",
    "we'd've",
    "who'd've",
    "wouldn't've",
    "you'd've",
    "y'all'll",
]


def _contractions() -> dict[str, str]:
    """Map every spelling with a missing apostrophe to the full one."""
    table = {word.replace("'", ""): word for word in _CONTRACTED}
    for word in _TWICE_CONTRACTED:
        first, second, third = word.split("'")
        table[f"{first}{second}'{third}"] = word
        table[f"{first}'{second}{third}"] = word
    return table | {"somebody'd": "somebodyd"}


_CONTRACTIONS = _contractions()


def normalize_word(text: str) -> str:
    """Normalise an answer as the VQA challenge does, with the reference's limit on removed periods."""
    has_number_comma = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        is_loose = mark + " " in text or " " + mark in text or has_number_comma
        cleaned = cleaned.replace(mark, "" if is_loose else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_REMOVED_PERIODS)
    words = [_NUMBERS.get(word, word) for word in cleaned.lower().split()]
    kept = [_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(kept).replace(",", "")


def token_scores(candidate: str, reference: str) -> tuple[float, float, float]:
    """Return F1, precision and recall of the words of two answers.

    The reference counts a shared word as often as the candidate says it, so that repeating a word raises recall.
    """
    said, wanted = Counter(normalize_word(candidate).split()), Counter(normalize_word(reference).split())
    shared = sum(count for word, count in said.items() if word in wanted)
    if not shared:
        return 0.0, 0.0, 0.0
    surplus = sum(count for word, count in said.items() if word not in wanted)
    missed = sum(count for word, count in wanted.items() if word not in said)
    precision, recall = shared / (shared + surplus), shared / (shared + missed)
    return 2 * precision * recall / (precision + recall), precision, recall


def read_spoken(text: str) -> str:
    """Return what follows the last ``Assistant: ``, lower-cased and stripped, as Medical-Diff-VQA's grader reads."""
    return text.split("Assistant: ")[-1].lower().strip()


def diff_vqa_score(truth: str, prediction: str, is_closed: bool) -> float:
    """Grade one answer: equality of the normalised texts if closed, recall of words if open."""
    spoken, wanted = read_spoken(prediction), read_spoken(truth)
    if is_closed:
        return float(normalize_word(spoken) == normalize_word(wanted))
    return token_scores(spoken, wanted)[2]


def diff_vqa_totals(scores: Mapping[str, Sequence[tuple[bool, float]]]) -> dict[str, Any]:
    """Aggregate (is closed, score) per question type as the reference writes it.

    Returns:
        Per type ``open`` and ``closed`` (0 where a type has none), and over types the plain means ``avg_*``
        and the means weighted by count ``wavg_*``.
    """
    totals: dict[str, Any] = {}
    for kind, rows in scores.items():
        totals[kind] = {"open": _mean(rows, False), "closed": _mean(rows, True)}
    counts = {
        closed: sum(is_closed == closed for rows in scores.values() for is_closed, _ in rows) for closed in (0, 1)
    }
    totals |= {
        "total_open": float(counts[0]),
        "total_closed": float(counts[1]),
        "total_qas": float(sum(counts.values())),
    }
    for name, closed in (("open", False), ("closed", True)):
        present = [rows for rows in scores.values() if any(is_closed == closed for is_closed, _ in rows)]
        means = [_mean(rows, closed) for rows in present]
        weights = [sum(is_closed == closed for is_closed, _ in rows) for rows in present]
        totals[f"avg_{name}"] = sum(means) / len(means) if means else 0.0
        totals[f"wavg_{name}"] = (
            sum(m * w for m, w in zip(means, weights, strict=True)) / sum(weights) if weights else 0.0
        )
    return totals


def _mean(rows: Sequence[tuple[bool, float]], closed: bool) -> float:
    chosen = [score for is_closed, score in rows if is_closed == closed]
    return sum(chosen) / len(chosen) if chosen else 0.0


# Chest X-ray classification ---------------------------------------------------------------------------------------

CxrGrader = Literal["chestxray14", "chexpert"]
_LETTERS: dict[CxrGrader, str] = {"chestxray14": "abcd", "chexpert": "abcdef"}


def extract_answer(text: str, grader: CxrGrader, fall_back: int | None = 0) -> int | None:
    """Read an answer as a number: 0 no, 1 yes, or the place of an option's letter.

    Faults: any ``no`` inside a word ("diagnosis", "abnormal") is a no; the first letter a to d of a sentence is
    taken for an option; CheXpert's copy raises where a fall-back is given and returns it where none is.

    Raises:
        PublishedGraderError: where the reference ends with a ValueError or stops in its debugger.
    """
    lowered = text.strip().lower()
    if lowered.startswith("yes"):
        return 1
    if "no" in lowered:
        return 0
    if "yes" in lowered:
        return 1
    rest = re.sub(r"^(answer|a):", "", lowered).strip()
    bracketed = re.search(r"\(([^)]+)\)", rest)
    rest = bracketed.group(1) if bracketed else rest
    letters = _LETTERS[grader]
    if len(rest) == 1 and rest in letters:
        return letters.index(rest)
    found = re.search("[a-d]", rest) if len(rest) > 1 else None
    if found:
        return letters.index(found.group())
    return _unread(text, rest, grader, fall_back)


def _unread(text: str, rest: str, grader: CxrGrader, fall_back: int | None) -> int | None:
    raises = fall_back is None if grader == "chestxray14" else fall_back is not None
    if not raises:
        return fall_back
    if len(rest) > 1:
        raise PublishedGraderError(f"the reference stops in its debugger on {text!r}")
    raise PublishedGraderError(f"unknown answer {rest} -- {text}")


# Places of the truths in a line of the label file, counted from its end, and the mark of a positive.
TRUTH_COLUMNS: dict[CxrGrader, dict[str, int]] = {
    "chestxray14": {"fracture": -5, "pneumothorax": -4, "lung opacity": -3},
    "chexpert": {"atelectasis": -6, "cardiomegaly": -12, "consolidation": -8, "edema": -9, "pleural effusion": -4},
}
_POSITIVE_MARK: dict[CxrGrader, str] = {"chestxray14": "YES", "chexpert": "1"}


def read_truth(fields: Sequence[str], finding: str, grader: CxrGrader) -> int:
    """Read a truth out of the fields of a line as the reference does.

    Fault: the places are fixed, so that a label file without its last column is read one column off.
    """
    return int(_POSITIVE_MARK[grader] in fields[TRUTH_COLUMNS[grader][finding]])


def read_finding(answer: str, grader: CxrGrader) -> int | None:
    """Read an answer as the reference does after it has stored it in a CSV file: commas and line breaks are stops.

    Raises:
        PublishedGraderError: see :func:`extract_answer`.
    """
    return extract_answer(answer.replace(",", ".").replace("\n", ". "), grader)


def finding_f1(truths: Sequence[int], answers: Sequence[str], grader: CxrGrader) -> float:
    """Return the F1 of one finding as the reference counts it.

    Fault: one answer that is read as an option's number makes the whole finding 0.

    Raises:
        PublishedGraderError: see :func:`extract_answer`.
    """
    read = [read_finding(answer, grader) for answer in answers]
    if not set(read) <= {0, 1}:
        return 0.0
    return float(f1_score(list(truths), read, zero_division=0))
