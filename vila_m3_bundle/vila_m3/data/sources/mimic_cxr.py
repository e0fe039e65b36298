"""MIMIC-CXR-JPG (Johnson et al., 2019): reports of frontal images, from the split, metadata and label CSVs."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from vila_m3_common.errors import UserError, check_choice

from ..cleaning import clean_report
from ..record import Record
from ..source import Item, Located, Pending, Rejected, RowProblem, ask, check_folder, find_file, open_csv, read_json

SPLITS = ("train", "validate", "test")
TEXTS = ("sections", "raw", "cleaned")
# The recorded prompt of every report question (golden report/output).
QUESTION = "Describe the image in detail."
_HEADING = re.compile(r"^\s*([A-Z][A-Z ]{3,40}):", re.MULTILINE)


def read_mimic_reports(
    source: str | Path,
    split: str,
    reports: str | Path | None = None,
    text: str = "sections",
    views: Sequence[str] = ("PA", "AP"),
) -> Iterator[Item]:
    """Yield one question for a report per image, in the order of the split file.

    Args:
        source: folder with ``mimic-cxr-2.0.0-split.csv``, ``-metadata.csv`` and, when there, ``-chexpert.csv``.
        split: train, validate or test.
        reports: folder with ``files/p10/p10000032/s50414267.txt``; ``source`` when None.
        text: ``raw`` gives the file as it is, ``sections`` its findings and impression, ``cleaned`` these as
            :func:`clean_report` leaves them.
        views: values of ``ViewPosition`` to keep; none keeps all.

    Raises:
        UserError: for an unknown split or text, or missing files and columns.
    """
    folder = check_folder(source)
    check_choice(split, SPLITS, "split")
    check_choice(text, TEXTS, "text")
    texts = str(check_folder(reports) if reports else folder)
    file = find_file(folder, "mimic-cxr-2.0.0-split.csv")
    header, rows = open_csv(file, ("dicom_id", "study_id", "subject_id", "split"))
    positions: dict[str, str] = {}
    labels: dict[str, tuple[str, ...]] = {}
    yield from _read_views(folder, positions)
    yield from _read_labels(folder, labels)
    pick = itemgetter(*map(header.index, ("split", "dicom_id", "study_id", "subject_id")))
    for number, row in rows:
        if isinstance(row, str):
            yield Rejected(number, row, file.name)
            continue
        part, image, study, subject = pick(row)
        if part != split:
            continue
        view = positions.get(image)
        if view is None:
            yield Rejected(number, f"image {image:.60} has no row in the metadata file", file.name)
        elif not views or view in views:
            convert = partial(_convert, part, image, study, subject, texts, text, view, labels.get(study, ()))
            yield Pending(number, convert, file.name)


def _read_views(folder: Path, positions: dict[str, str]) -> Iterator[Rejected]:
    """Fill in the ``ViewPosition`` of each image; yield the broken rows."""
    file = find_file(folder, "mimic-cxr-2.0.0-metadata.csv")
    header, rows = open_csv(file, ("dicom_id", "ViewPosition"))
    image, view = header.index("dicom_id"), header.index("ViewPosition")
    for number, row in rows:
        if isinstance(row, str):
            yield Rejected(number, row, file.name)
        else:
            positions[row[image]] = sys.intern(row[view])  # one text per kind of view, not one per image


def _read_labels(folder: Path, labels: dict[str, tuple[str, ...]]) -> Iterator[Rejected]:
    """Fill in the positive findings of each study; yield the broken rows."""
    file = folder / "mimic-cxr-2.0.0-chexpert.csv"
    if not file.is_file():
        return
    header, rows = open_csv(file, ("subject_id", "study_id"))
    study = header.index("study_id")
    findings = [(index, name) for index, name in enumerate(header) if name[:1].isupper()]
    pick = itemgetter(*(index for index, _ in findings)) if len(findings) > 1 else tuple
    positives: dict[tuple[str, ...], tuple[str, ...]] = {}  # studies with equal labels share one tuple
    for number, row in rows:
        if isinstance(row, str):
            yield Rejected(number, row, file.name)
            continue
        values = pick(row)
        if values not in positives:
            positives[values] = tuple(name for index, name in findings if row[index] in ("1", "1.0"))
        labels[row[study]] = positives[values]


def _convert(
    split: str, image: str, study: str, subject: str, texts: str, text: str, view: str, labels: tuple[str, ...]
) -> Record:
    if not (subject.isdigit() and study.isdigit()):
        raise RowProblem(f"subject_id {subject!r:.40} and study_id {study!r:.40} must be numbers")
    stem = f"files/p{subject[:2]}/p{subject}/s{study}"
    report = _read_text(texts, stem)
    if text != "raw":
        report = take_sections(report)
    if text == "cleaned":
        report = clean_report(report)
    metadata = {
        "dataset": "mimic_report",
        "split": split,
        "patient": f"p{subject}",
        "study": f"s{study}",
        "view": view,
        "labels": list(labels),
        "question": QUESTION,
    }
    return Record(image, ask(QUESTION, report, image_first=True), (f"{stem}/{image}.jpg",), metadata)


def _read_text(folder: str, stem: str) -> str:
    try:
        # Unbuffered: one call each to open, read and close, a fifth of the time of a text file's.
        with open(f"{folder}/{stem}.txt", "rb", buffering=0) as file:
            text = file.read().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise RowProblem(f"report {stem}.txt cannot be read ({error.strerror})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def take_sections(report: str, names: Sequence[str] = ("FINDINGS", "IMPRESSION")) -> str:
    """Return the text under the named headings; the whole text when it has no heading at all."""
    parts = _HEADING.split(report)
    if len(parts) == 1:
        return report.strip()
    found = [body.strip() for heading, body in zip(parts[1::2], parts[2::2], strict=True) if heading.strip() in names]
    return " ".join(" ".join(body.split()) for body in found if body)


def read_annotated_reports(source: str | Path, split: str = "train") -> Iterator[Item]:
    """Yield the original's third step: ``mimic_annotation.json``, ``report_new/<image>.txt`` and ``images``.

    One question per image; a missing image or text skips it. The recorded form keeps texts as they are, also empty.

    Raises:
        UserError: for files that are missing or of another layout.
    """
    folder = check_folder(source)
    file = find_file(folder, "mimic_annotation.json")
    cases = read_json(file)
    if not isinstance(cases, dict) or not isinstance(cases.get(split), list):
        raise UserError(f"{file} has no list {split!r}; give an object with train, val and test")
    for number, case in enumerate(cases[split], start=1):
        images = case.get("image_path") if isinstance(case, dict) else None
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            yield Rejected(number, "has no image_path, a list of texts", file.name)
            continue
        for image in images:
            yield _convert_annotated(case, image, split, folder, number, file.name)


def _convert_annotated(
    case: dict[str, Any], image: str, split: str, folder: Path, number: int, name: str
) -> Located | Rejected:
    text = folder / "report_new" / f"{Path(image).stem}.txt"
    if not text.is_file() or text.is_symlink():
        return Rejected(number, f"report {text.name} is missing", name)
    answer = text.read_bytes().decode("utf-8", "surrogateescape")
    metadata = {
        "dataset": "mimic_report",
        "split": split,
        "patient": f"p{case.get('subject_id')}",
        "study": f"s{case.get('study_id')}",
        "question": QUESTION,
    }
    try:
        return Located(number, Record(Path(image).stem, ask(QUESTION, answer, True), (image,), metadata), name)
    except RowProblem as problem:
        return Rejected(number, str(problem), name)
