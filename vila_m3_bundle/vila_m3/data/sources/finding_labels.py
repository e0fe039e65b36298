"""Chest X-ray findings in a label file: ChestX-ray14 (also the adjudicated labels), CheXpert, and files like them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vila_m3_common.errors import check_choice
from vila_m3_common.patients import is_held_out
from vila_m3_common.prompts import WHICH_FINDINGS, finding_turns, is_there

from ..record import Message, Record
from ..source import Item, Located, Rejected, RowProblem, ask, check_folder, find_file, read_csv_rows

FORMS = ("binary", "multi_choice")
SPLITS = ("train", "validate", "test")


def read_finding_labels(
    source: str | Path,
    split: str,
    file: str,
    findings: Mapping[str, str],
    form: str = "binary",
    image: str = "Image Index",
    image_ending: str = "",
    patient: str = "Patient ID",
    patient_pattern: str = "",
    positive: Sequence[str] = ("YES",),
    split_column: str = "",
    listed: str = "",
    held_out_share: float | None = None,
    dataset: str = "finding_labels",
    prompt: str = "",
) -> Iterator[Item]:
    """Yield whether each finding is present, image by image in the order of the file.

    Args:
        source: folder with the label file and the images.
        split: train, validate or test.
        file: name of the CSV.
        findings: name, as it is asked for -> column (or, with ``listed``, name in the list).
        form: ``binary`` asks once per finding, ``multi_choice`` once per image.
        image: column of the image's path.
        image_ending: appended to that path (``/view1_frontal.jpg`` for a study).
        patient: column of the patient.
        patient_pattern: regular expression that cuts the patient out of that column; empty takes all of it.
        positive: texts of a column that mean present.
        split_column: column that names the split; empty when the file is one split, or ``held_out_share`` splits it.
        listed: column with all findings of an image, separated by ``|``; empty when each has a column.
        held_out_share: share of the patients in test, chosen by the checksum of their id, so that a patient stays where
            it is when others are added; the chest X-ray expert splits so too.
        dataset: for the metadata.
        prompt: words the questions as benchmarks do, ``binary`` or ``multi_choice`` (equal to ``form``); empty asks the
            bare question.

    Raises:
        UserError: for an unknown split or form, or a missing file or column.
    """
    check_choice(split, SPLITS, "split")
    check_choice(form, FORMS, "form")
    check_choice(prompt, ("", *FORMS), "prompt")
    path = find_file(check_folder(source), file)
    columns = [image, patient, *([listed] if listed else findings.values()), *([split_column] if split_column else [])]
    for number, row in read_csv_rows(path, columns):
        if isinstance(row, str):
            yield Rejected(number, row, path.name)
            continue
        try:
            owner = _find_patient(row[patient], patient_pattern)
            part = row[split_column] if split_column else split
            if held_out_share is not None:
                part = "test" if is_held_out(owner, held_out_share) else "train"
            if part != split:
                continue
            present = {name: _is_present(row, column, listed, positive) for name, column in findings.items()}
        except RowProblem as problem:
            yield Rejected(number, str(problem), path.name)
            continue
        metadata = {"dataset": dataset, "split": split, "patient": owner, "answer_type": "CLOSED"}
        for record in _ask(row[image] + image_ending, present, form, metadata):
            yield Located(number, _word(record, prompt), path.name)


def _word(record: Record, prompt: str) -> Record:
    """Put a question into the form in which a benchmark asks it."""
    if not prompt:
        return record
    (text,) = finding_turns(prompt, record.metadata["findings"], record.metadata.get("finding", ""))
    return replace(record, messages=(Message("user", text), *record.messages[1:]))


def _find_patient(text: str, pattern: str) -> str:
    if not pattern:
        return text
    found = re.search(pattern, text)
    if found is None:
        raise RowProblem(f"{text!r:.80} holds no patient (pattern {pattern})")
    return found.group()


def _is_present(row: Mapping[str, str], column: str, listed: str, positive: Sequence[str]) -> bool:
    if listed:
        return column in [name.strip() for name in row[listed].split("|")]
    return row[column].strip() in positive


def _ask(image: str, present: Mapping[str, bool], form: str, metadata: Mapping[str, object]) -> Iterator[Record]:
    names = list(present)
    if form == "multi_choice":
        letters = [f"({chr(ord('A') + place)})" for place, name in enumerate(names) if present[name]]
        answer = ",".join(letters) or f"({chr(ord('A') + len(names))})"
        told = {**metadata, "findings": names, "question": WHICH_FINDINGS}
        yield Record(image, ask(WHICH_FINDINGS, answer, True), (image,), told)
        return
    for name, is_present in present.items():
        told = {**metadata, "findings": names, "finding": name, "question": is_there(name)}
        yield Record(
            f"{image}#{name.lower()}", ask(is_there(name), "yes" if is_present else "no", True), (image,), told
        )
