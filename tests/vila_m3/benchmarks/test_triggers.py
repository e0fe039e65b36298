"""The trigger benchmark: its cases are drawn by a seed from what training never saw; its grading tells faults apart."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vila_m3.benchmarks import trigger_cases, triggers
from vila_m3.benchmarks.asking import ask_record
from vila_m3.benchmarks.definition import Benchmark, Question, image_root, load_benchmark, read_questions
from vila_m3.benchmarks.grading import grade, grade_to_file
from vila_m3.benchmarks.nih import held_out_films
from vila_m3.benchmarks.predictions import Predictions
from vila_m3.data.record import parse_row, to_conversation
from vila_m3.questions import is_held_out, tables
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError
from vila_m3_common.prompts import opening
from vila_m3_common.trigger import parse_triggers


@pytest.fixture(scope="module")
def nih(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nih")
    rows = ["Image Index,Finding Labels,Patient ID,View Position"]
    for patient in range(20):
        for film in range(2):
            name = f"{patient:04d}_{film}.png"
            Image.fromarray(np.full((24, 24), 10 * patient, np.uint8)).save(folder / name)
            rows.append(f"{name},{'No Finding' if patient % 2 else 'Effusion|Mass'},{patient},PA")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def data_root(tmp_path_factory: pytest.TempPathFactory, cards: str, nih: Path) -> Path:
    root = tmp_path_factory.mktemp("data")
    trigger_cases.write_trigger_cases(str(root / "trigger"), cards, 1, 510_000, str(nih), film_count=3)
    return root


@pytest.fixture(scope="module")
def benchmark(repository: Path) -> Benchmark:
    return load_benchmark("trigger", repository / "vila_m3_bundle/configs/benchmarks")


@pytest.fixture(scope="module")
def questions(benchmark: Benchmark, data_root: Path) -> list[Question]:
    return read_questions(benchmark, data_root)


@pytest.mark.parametrize(
    ("wanted", "called", "outcome"),
    [
        ("<VISTA3D(organs)>", "Let me trigger <VISTA3D(organs)>.", "right"),
        ("<VISTA3D(everything)>", "<VISTA3D()>", "right"),
        ("<VISTA3D(organs)>", "<VISTA3D(muscles)>", "wrong argument"),
        ("<CXR()>", "<CXR(organs)>", "wrong argument"),
        ("<CXR()>", "<BRATS()>", "wrong expert"),
        ("<CXR()>", "<BRATS()> and <VISTA3D()>", "wrong expert"),
        ("<CXR()>", "<CXR()>, then <CXR()>", "double"),
        ("<CXR()>", "<BRATS()> or <CXR()>", "double"),
        ("<CXR()>", "yes", "missed"),
        ("<CXR()>", "<CXR(", "missed"),
        ("", "<BRATS()>", "spurious"),
        ("", "This is a CT image.", "right"),
    ],
)
def test_each_fault_has_its_name(wanted: str, called: str, outcome: str) -> None:
    assert triggers.judge(parse_triggers(wanted), parse_triggers(called)) == outcome


def test_cases_are_of_every_kind_and_follow_their_seed(data_root: Path, cards: str, nih: Path, tmp_path: Path) -> None:
    text = (data_root / "trigger/cases.jsonl").read_text()
    kinds = {parse_row(line).metadata["kind"] for line in text.splitlines()}
    assert kinds == {"tables", "later turns", "far wordings", "real films", "no expert", "decoys"}
    trigger_cases.write_trigger_cases(str(tmp_path), cards, 1, 510_000, str(nih), film_count=3)
    assert (tmp_path / "cases.jsonl").read_text() == text


def test_no_wording_of_training_is_asked(questions: list[Question], cards: str) -> None:
    for question in questions:
        assert question.record is not None
        asked = [message.text for message in question.record.messages if message.role == "user"]
        last = asked[-1] if len(asked) > 1 else asked[0].removeprefix(cards).partition("\n")[2]
        assert is_held_out(last), last


def test_a_table_without_a_kept_wording_gives_no_case(cards: str) -> None:
    for text in tables()["mri_grade"]:
        turns = Conversation()
        turns.add("user", opening("CT", text, cards), [np.zeros((4, 4, 3), np.uint8)])
        assert not trigger_cases.is_unseen(trigger_cases.Case(turns, "", "tables", "CT", "p"), cards)


def test_decoys_and_unread_images_want_nobody(questions: list[Question]) -> None:
    wanted = {
        kind: {len(parse_triggers(q.answer)) for q in questions if q.record and q.record.metadata["kind"] == kind}
        for kind in ("decoys", "no expert", "far wordings", "real films")
    }
    assert wanted == {"decoys": {0}, "no expert": {0}, "far wordings": {1}, "real films": {1}}


def test_films_are_of_patients_that_were_kept_apart(questions: list[Question], nih: Path) -> None:
    apart = {film.patient for film in held_out_films(nih)}
    assert 0 < len(apart) < 20
    films = [q.group for q in questions if q.group.startswith("NIH ")]
    assert len(set(films)) == len(films), "one film of a patient"
    assert {name.removeprefix("NIH ") for name in films} <= apart


def test_a_case_is_asked_as_the_model_is_served(
    benchmark: Benchmark, questions: list[Question], data_root: Path, cards: str
) -> None:
    case = next(q for q in questions if q.record and q.record.metadata["modality"] == "MRI")
    talk = to_conversation(ask_record(benchmark, case, data_root), image_root(benchmark, data_root))
    assert talk.turns[0].text.startswith(opening("MRI", "", cards))
    assert len(talk.turns[0].images) == 4
    assert talk.turns[-1].role != "assistant"


def test_right_and_wrong_answers_are_counted_by_kind(
    benchmark: Benchmark, questions: list[Question], data_root: Path, tmp_path: Path
) -> None:
    perfect = grade(benchmark, questions, Predictions(tuple((q.id, q.answer) for q in questions)))
    assert perfect["accuracy"]["value"] == perfect["corrected_accuracy"]["value"] == 1
    assert perfect["outcomes"]["right"]["cases"] == len(questions)
    always = Predictions(tuple((q.id, "Let me first trigger <CXR()>.") for q in questions))
    result = grade(benchmark, questions, always)
    decoys = result["per_kind"]["decoys"]["right"]
    assert decoys["value"] == 0
    assert result["per_kind"]["real films"]["right"]["value"] == 1
    assert result["per_expert"]["BRATS"]["right_expert"]["value"] == 0
    low, high = result["outcomes"]["spurious"]["interval"]
    assert low < result["outcomes"]["spurious"]["value"] < high
    confusion = result["details"]["confusion"]
    assert {"BRATS", "CXR", "VISTA3D", "none"} <= set(confusion["labels"])
    assert sum(map(sum, confusion["matrix"])) == len(questions)
    column = confusion["labels"].index("CXR")
    assert all(row[column] == sum(row) for row in confusion["matrix"])
    assert grade_to_file(tmp_path / "items.jsonl", benchmark, questions, always, data_root) == result
    rows = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert {row["outcome"] for row in rows} == {"right", "spurious", "wrong expert"}


def test_no_phantom_gives_no_case(tmp_path: Path, cards: str) -> None:
    with pytest.raises(SystemExit, match="1"):
        trigger_cases.write_trigger_cases(str(tmp_path), cards, 0)


def test_a_row_without_an_answer_is_refused(tmp_path: Path, benchmark: Benchmark) -> None:
    (tmp_path / "trigger").mkdir()
    row = {"id": "1", "conversations": [{"from": "human", "value": "q"}]}
    (tmp_path / "trigger/cases.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match="row 1 of cases.jsonl cannot be used: needs at least a question"):
        read_questions(benchmark, tmp_path)
