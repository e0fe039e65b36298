"""Conversations about phantoms on disk: valid, repeatable, apart by split, and right about what was drawn."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from vila_m3.data.checks import RowChecks
from vila_m3.data.prepare import prepare
from vila_m3.data.record import Record, format_row, parse_row
from vila_m3.data.source import Located
from vila_m3.data.sources.phantom import (
    CountedSlice,
    count_tumors,
    counted_slices,
    invent_tumors,
    read_forms,
    read_phantoms,
)
from vila_m3.data.validation import Validator
from vila_m3.phantom_conversations import FOREIGN_REPLY
from vila_m3.questions import is_held_out
from vila_m3_common.errors import UserError
from vila_m3_common.phantoms import CT_TUMORS, ct_phantom


def write(folder: Path, cards: str, split: str = "train") -> list[Record]:
    pictures = folder / "pictures"
    rows = read_phantoms(split, pictures, cards, count=12, counted_count=8, foreign_count=4, volume_count=1)
    summary = prepare(rows, "phantom", split, folder, RowChecks(pictures))
    assert (summary["written"], summary["rejected"]) == (24, 0)
    return [parse_row(line) for line in (folder / f"phantom_{split}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantoms")


@pytest.fixture(scope="module")
def records(folder: Path, cards: str) -> list[Record]:
    return write(folder, cards)


@pytest.fixture(scope="module")
def studies() -> list[CountedSlice]:
    return [found for seed in (7, 8) for found in counted_slices(seed)]


def test_every_conversation_passes_validation(records: list[Record], folder: Path, cards: str) -> None:
    validator = Validator(folder / "pictures", cards)
    assert [validator.find_problem(format_row(record)) for record in records] == [("", "")] * len(records)


def test_a_second_run_gives_the_same_bytes(records: list[Record], folder: Path, cards: str, tmp_path: Path) -> None:
    write(tmp_path, cards)
    name = "phantom_train.jsonl"
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_splits_share_no_picture_and_no_wording(records: list[Record], cards: str, tmp_path: Path) -> None:
    others = write(tmp_path, cards, "validate")
    names = [{Path(name).name for record in part for name in record.images} for part in (records, others)]
    assert not names[0] & names[1]
    counted = [record for record in others if record.metadata["question_type"] in ("count", "size")]
    assert len(counted) == 8
    for record in counted:
        first, *later = [message.text for message in record.messages if message.role == "user"]
        assert all(map(is_held_out, [first.removeprefix(cards).partition("\n")[2], *later]))


def test_a_count_is_that_of_the_measurements_or_else_of_the_slice(studies: list[CountedSlice]) -> None:
    told = set()
    for seed in range(120):
        found = studies[seed % len(studies)]
        turns = count_tumors(found, "", random.Random(seed), False).conversation.turns
        tumor = re.search(r"<VISTA3D\((.*)\)>", turns[1].text)[1]  # type: ignore[index]
        measured = "Measurements: " in turns[2].text
        in_study = {row["name"]: row["component_count"] for row in found.measured}.get(tumor, 0)
        number = in_study if measured else found.count(tumor)
        counted = next((turn.text for turn in turns if turn.text.startswith("There are")), None)
        if counted is None:
            assert (turns[3].text, number) == ("no", 0)
        else:
            assert re.fullmatch(rf"There are {number or 'no'} {tumor}s?\.", counted)
            told.add((measured, number))
    assert {(True, 1), (True, 2), (False, 0), (False, 1)} <= told


def test_all_counts_can_be_told_by_measurements(studies: list[CountedSlice]) -> None:
    for seed in range(40):
        found = studies[seed % len(studies)]
        turns = count_tumors(found, "", random.Random(seed), False, measured_share=1.0).conversation.turns
        tumor = re.search(r"<VISTA3D\((.*)\)>", turns[1].text)[1]  # type: ignore[index]
        row = next((row for row in found.measured if row["name"] == tumor), None)
        assert row is None or f"{tumor}, {row['volume_ml']} mL" in turns[2].text


def test_invented_tumours_are_told_as_they_are_shown(studies: list[CountedSlice]) -> None:
    numbers = set()
    for seed in range(30):
        rng = random.Random(seed)
        found = invent_tumors(studies[seed % len(studies)], rng)
        told = {row["name"]: row for row in found.measured if row["name"] in CT_TUMORS}
        assert {name for name in CT_TUMORS if found.count(name)} <= set(told)
        for name, row in told.items():
            assert row["component_count"] >= found.count(name)
            assert row["label"] == CT_TUMORS[name]
        numbers.update(found.count(name) for name in told)
        turns = count_tumors(found, "", rng, False, 1.0).conversation.turns
        tumor = re.search(r"<VISTA3D\((.*)\)>", turns[1].text)[1]  # type: ignore[index]
        if tumor in told:
            assert f"{tumor}, {told[tumor]['volume_ml']:g} mL" in turns[2].text
    assert {1, 2, 3, 4} <= numbers
    np.testing.assert_array_equal(found.grey, studies[29 % len(studies)].grey)


def test_only_training_sees_invented_tumours(tmp_path: Path, cards: str) -> None:
    def texts(split: str, share: float) -> list[str]:
        folder = tmp_path / f"{split}{share}"
        items = read_phantoms(split, folder, cards, 0, 8, 0, 1, measured_share=1.0, invented_share=share)
        return [message.text for item in items for message in item.record.messages]  # type: ignore[union-attr]

    assert texts("validate", 0.0) == texts("validate", 1.0)
    assert texts("train", 0.0) != texts("train", 1.0)


def test_forms_of_benchmarks_are_answered_as_the_expert_says(cards: str, tmp_path: Path) -> None:
    rows = list(read_forms("train", tmp_path, cards, count=40, volume_count=2))
    records = [row.record for row in rows if isinstance(row, Located)]
    assert len(records) == 40
    validator = Validator(tmp_path, cards)
    assert {validator.find_problem(format_row(record)) for record in records} == {("", "")}
    for record in records:
        told, answer = record.messages[-2].text, record.messages[-1].text
        finding = re.search(r"is there ([a-z ]+) according", told)
        assert finding
        assert f" {finding[1]}: {answer}\n" in told
    assert {record.metadata["question_type"] for record in records} == {"binary", "binary_conv", "text_only"}
    assert {record.messages[-1].text for record in records} == {"yes", "no"}
    assert all(bool(record.images) == (record.metadata["question_type"] != "text_only") for record in records)
    with pytest.raises(UserError, match="about 0 phantoms cannot be made"):
        next(read_forms("train", tmp_path, cards, count=1, volume_count=0))


def test_measurements_are_those_of_the_phantom(studies: list[CountedSlice]) -> None:
    measured = {row["name"]: row["component_count"] for row in studies[0].measured}
    drawn = ct_phantom(7).tumor_counts
    assert drawn
    assert {name: count for name, count in measured.items() if name in CT_TUMORS} == drawn
    seen = False
    for seed in range(60):
        turns = count_tumors(studies[0], "", random.Random(seed), False).conversation.turns
        if turns[-1].text.startswith("The expert measured"):
            told = re.fullmatch(r"The expert measured (\w+ \w+, [\d.]+ mL, .*longest [\d.]+ x .*)\.", turns[-1].text)
            assert told
            assert told[1] in turns[2].text
            seen = True
    assert seen


def test_pictures_are_named_by_their_content(records: list[Record], folder: Path) -> None:
    shown = {name for record in records for name in record.images}
    assert shown == {f"train/{path.name}" for path in (folder / "pictures/train").iterdir()}
    assert len(shown) < sum(len(record.images) for record in records)


def test_questions_that_do_not_fit_the_image_call_no_expert(records: list[Record]) -> None:
    foreign = [record for record in records if record.metadata["question_type"] == "foreign"]
    assert len(foreign) == 4
    assert {record.messages[-1].text for record in foreign} == {FOREIGN_REPLY}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"split": "all"}, "unknown split 'all'; valid: train, validate, test"),
        ({"volume_count": 0}, "give at least one phantom"),
        ({"counted_count": -1}, "no negative number"),
    ],
)
def test_bad_options_are_refused(values: dict[str, object], message: str, tmp_path: Path) -> None:
    options = {"split": "train", "count": 1, "counted_count": 1, "foreign_count": 1, "volume_count": 1, **values}
    with pytest.raises(UserError, match=message):
        next(iter(read_phantoms(images=tmp_path, cards="", **options)))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
