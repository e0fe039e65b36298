"""Chest X-ray findings in a label file: ChestX-ray14 (also the adjudicated labels), CheXpert, and files like them."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vila_m3_common.errors import UserError, check_choice
from vila_m3_common.patients import is_held_out
from vila_m3_common.prompts import EXPERT_FORMS, FINDING_FORMS, WHICH_FINDINGS, is_there

from ..experts.cxr import finding_messages, read_scores
from ..record import Record
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
    prompt: str | Sequence[str] = "",
    expert: str | Path = "",
    cards: str = "",
    seed: int = 0,
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
        prompt: words the questions as benchmarks do, ``multi_choice`` for that form and any other of
            :data:`vila_m3_common.prompts.FINDING_FORMS` for ``binary``; of several one is drawn for every question.
            Empty asks the bare question.
        expert: folder of an expert's saved findings, ``<image>.json``, which such a prompt then tells; see
            :func:`vila_m3.data.experts.cxr.read_scores`.
        cards: text of the model cards, for ``binary_conv``.
        seed: of the drawn forms.

    Raises:
        UserError: for an unknown split, form or prompt, or a missing file or column.
    """
    check_choice(split, SPLITS, "split")
    check_choice(form, FORMS, "form")
    prompts = _check_prompts(prompt, form, bool(expert))
    rng = random.Random(f"finding_labels/{seed}")
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
            try:
                worded = _word(record, rng.choice(prompts), expert, cards) if prompts else record
            except UserError as error:
                yield Rejected(number, str(error), path.name)
                continue
            yield Located(number, worded, path.name)


def limit_negatives(items: Iterable[Item], per_positive: float | None, seed: int = 0) -> Iterator[Item]:
    """Keep of each finding's questions at most so many that are answered with no for each that yes answers.

    Most findings are rare: a model that learns from all questions does best to say no to each.

    Args:
        items: of :func:`read_finding_labels`, one question a finding.
        per_positive: negatives for each positive; None keeps all.
        seed: of the draw.
    """
    if per_positive is None:
        yield from items
        return
    kept = list(items)
    records = [item.record for item in kept if isinstance(item, Located)]
    draw = random.Random(f"negatives/{seed}")
    left_out: set[str] = set()
    for finding in dict.fromkeys(record.metadata["finding"] for record in records):
        asked = [record for record in records if record.metadata["finding"] == finding]
        no = [record.id for record in asked if record.messages[-1].text == "no"]
        count = max(0, len(no) - round(per_positive * (len(asked) - len(no))))
        left_out.update(draw.sample(no, count))
    yield from (item for item in kept if not isinstance(item, Located) or item.record.id not in left_out)


def _check_prompts(prompt: str | Sequence[str], form: str, has_expert: bool) -> list[str]:
    """Return the forms to draw from."""
    prompts = [prompt] if isinstance(prompt, str) and prompt else list(prompt)
    allowed = ["multi_choice"] if form == "multi_choice" else [name for name in FINDING_FORMS if name != "multi_choice"]
    for name in prompts:
        check_choice(name, allowed, "prompt")
        if name in EXPERT_FORMS and not has_expert:
            raise UserError(f"prompt {name} tells an expert's findings; give their folder as expert")
    return prompts


def _word(record: Record, prompt: str, expert: str | Path, cards: str) -> Record:
    """Put a question into the form in which a benchmark asks it."""
    told = record.metadata
    scores = read_scores(expert, record.images[0]) if expert else None
    messages = finding_messages(prompt, told["findings"], told.get("finding", ""), scores, cards)
    images = () if prompt == "text_only" else record.images
    return replace(record, messages=(*messages, record.messages[-1]), images=images)


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
