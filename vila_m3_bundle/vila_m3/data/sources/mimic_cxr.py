"""MIMIC-CXR-JPG (Johnson et al., 2019): reports of frontal images, from the split, metadata and label CSVs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vila_m3_common.errors import UserError

from ..cleaning import clean_report
from ..record import Record
from ..source import Item, Located, Rejected, RowProblem, ask, check_choice, check_folder, find_file, read_csv_rows

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
    texts = check_folder(reports) if reports else folder
    file = find_file(folder, "mimic-cxr-2.0.0-split.csv")
    positions, labels = _read_views(folder), _read_labels(folder)
    for number, row in read_csv_rows(file, ("dicom_id", "study_id", "subject_id", "split")):
        if isinstance(row, str):
            yield Rejected(number, row, file.name)
        elif row["split"] == split and (not views or positions.get(row["dicom_id"]) in views):
            try:
                record = _convert(row, texts, text, positions.get(row["dicom_id"], ""), labels.get(row["study_id"], ""))
                yield Located(number, record, file.name)
            except RowProblem as problem:
                yield Rejected(number, str(problem), file.name)


def _read_views(folder: Path) -> dict[str, str]:
    file = find_file(folder, "mimic-cxr-2.0.0-metadata.csv")
    rows = read_csv_rows(file, ("dicom_id", "ViewPosition"))
    shared: dict[str, str] = {}  # one text per kind of view, not one per image
    return {
        row["dicom_id"]: shared.setdefault(row["ViewPosition"], row["ViewPosition"])
        for _, row in rows
        if not isinstance(row, str)
    }


def _read_labels(folder: Path) -> dict[str, str]:
    """Return the positive findings of each study, separated by semicolons."""
    file = folder / "mimic-cxr-2.0.0-chexpert.csv"
    if not file.is_file():
        return {}
    labels: dict[str, str] = {}
    shared: dict[str, str] = {}
    for _, row in read_csv_rows(file, ("subject_id", "study_id")):
        if not isinstance(row, str):
            positive = ";".join(name for name, value in row.items() if value in ("1", "1.0") and name[0].isupper())
            labels[row["study_id"]] = shared.setdefault(positive, positive)
    return labels


def _convert(row: dict[str, str], texts: Path, text: str, view: str, labels: str) -> Record:
    subject, study, image = row["subject_id"], row["study_id"], row["dicom_id"]
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
        "split": row["split"],
        "patient": f"p{subject}",
        "study": f"s{study}",
        "view": view,
        "labels": labels.split(";") if labels else [],
        "question": QUESTION,
    }
    return Record(image, ask(QUESTION, report, image_first=True), (f"{stem}/{image}.jpg",), metadata)


def _read_text(folder: Path, stem: str) -> str:
    try:
        with open(f"{folder}/{stem}.txt", encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except OSError as error:
        raise RowProblem(f"report {stem}.txt cannot be read ({error.strerror})") from error


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
    cases = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(cases, dict) or split not in cases:
        raise UserError(f"{file} has no split {split!r}; give an object with train, val and test")
    for number, case in enumerate(cases[split], start=1):
        for image in case.get("image_path", ()):
            text = folder / "report_new" / f"{Path(image).stem}.txt"
            if not text.is_file() or text.is_symlink():
                yield Rejected(number, f"report {text.name} is missing", file.name)
                continue
            answer = text.read_bytes().decode("utf-8", "surrogateescape")
            metadata = {
                "dataset": "mimic_report",
                "split": split,
                "patient": f"p{case.get('subject_id')}",
                "study": f"s{case.get('study_id')}",
                "question": QUESTION,
            }
            yield Located(number, Record(Path(image).stem, ask(QUESTION, answer, True), (image,), metadata), file.name)
