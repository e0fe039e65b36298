"""Conversations without their experts: cards, calls, feedback and its pictures are gone, questions and answers stay."""

from pathlib import Path
from typing import Any

import pytest

from vila_m3.data.checks import RowChecks
from vila_m3.data.prepare import prepare
from vila_m3.data.record import Message, Record, find_count_problem, format_row, parse_row
from vila_m3.data.source import RowProblem
from vila_m3.data.sources.phantom import read_phantoms
from vila_m3.data.sources.without_expert import read_without_expert, without_expert
from vila_m3.data.validation import find_turn_problem

ASKED = Message("user", "Cards.\n <image>This is a CT image.\nIs there a liver tumor?")
CALL = Message("assistant", "This looks like a CT image. Let me trigger <VISTA3D(hepatic tumor)>. ")
FEEDBACK = Message("expert", "The results are <image>. The colors in this image describe red: liver. Use this.")


def make(*messages: Message) -> Record:
    count = sum(message.text.count("<image>") for message in messages)
    return Record("1", messages, tuple(f"{number}.png" for number in range(count)), {"expert": "VISTA3D", "kind": "x"})


def test_call_feedback_its_picture_and_the_cards_go() -> None:
    more = (Message("user", "How many?"), Message("assistant", "There are 2 hepatic tumors."))
    found = without_expert(make(ASKED, CALL, FEEDBACK, Message("assistant", "yes"), *more), "Cards.\n", "alone")
    assert [message.text for message in found.messages] == [
        " <image>This is a CT image.\nIs there a liver tumor?",
        "yes",
        "How many?",
        "There are 2 hepatic tumors.",
    ]
    assert found.images == ("0.png",)
    assert found.metadata == {"kind": "x", "dataset": "alone"}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ((ASKED, Message("assistant", "I segmented the liver using <VISTA3D(organs)>.")), "a call of an expert alone"),
        (
            (ASKED, CALL, Message("expert", "The expert VISTA3D could not be run: no."), Message("assistant", "no")),
            "an expert that gave no result",
        ),
        ((ASKED, Message("assistant", "Let me <CXR()>."), Message("user", "So?"), Message("assistant", "no")), "alone"),
    ],
)
def test_rows_about_a_call_alone_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(RowProblem, match=message):
        without_expert(make(*messages), "Cards.\n", "alone")


def test_prepared_phantoms_lose_their_experts(tmp_path: Path, cards: str) -> None:
    pictures = tmp_path / "pictures"
    rows = read_phantoms("test", pictures, cards, count=30, counted_count=10, foreign_count=0, volume_count=1)
    prepare(rows, "phantom", "test", tmp_path, RowChecks(pictures))
    rows = read_without_expert(tmp_path, "test", "phantom", cards, "alone")
    summary = prepare(rows, "alone", "test", tmp_path, RowChecks(pictures))
    assert summary["written"] + summary["rejected"] == 40
    assert summary["written"] > 20
    for line in (tmp_path / "alone_test.jsonl").read_text().splitlines():
        record = parse_row(line)
        assert "<VISTA3D" not in line
        assert "expert models" not in format_row(record)
        assert (find_turn_problem(record), find_count_problem(record)) == ("", "")
