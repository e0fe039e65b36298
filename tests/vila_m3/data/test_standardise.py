"""Sentence standardisation against a local server that answers like an OpenAI-compatible one."""

import json
from pathlib import Path

import pytest
from answering_server import Server

from vila_m3.data.record import Message, Record, format_row, parse_row
from vila_m3.data.standardise import Endpoint, find_rewrite_problem, standardise
from vila_m3_common.errors import UserError


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    report = "Lungs clear. Small bilateral pleural effusions. Heart normal."
    rows = [Record(str(k), (Message("user", "Describe."), Message("assistant", report))) for k in range(3)]
    source, pool = tmp_path / "in.jsonl", tmp_path / "pool.txt"
    source.write_text("".join(format_row(row) + "\n" for row in rows))
    pool.write_text("The lungs are clear.\nNo pleural effusions.\n")
    return source, tmp_path / "out.jsonl", pool


def test_accepted_rewrites_replace_and_a_denied_finding_stays(
    answering_server: Server, files: tuple[Path, Path, Path]
) -> None:
    source, output, pool = files
    summary = standardise(source, output, pool, Endpoint(answering_server.url, "m"))
    expected = "The lungs are clear. Small bilateral pleural effusions. The heart is normal in size."
    assert [parse_row(line).messages[1].text for line in output.read_text().splitlines()] == [expected] * 3
    assert summary == {"reports": 3, "asked": 3, "refused": 3}
    log = [json.loads(line) for line in Path(f"{output}.rewrites.jsonl").read_text().splitlines()]
    assert [row["problem"] for row in log] == ["", "the rewrite denies effusion", ""]


def test_nothing_is_asked_twice_after_a_kill_in_the_middle_of_a_line(
    answering_server: Server, files: tuple[Path, Path, Path]
) -> None:
    source, output, pool = files
    standardise(source, output, pool, Endpoint(answering_server.url, "m"))
    whole, log = output.read_bytes(), Path(f"{output}.rewrites.jsonl")
    log.write_bytes(log.read_bytes()[:-20])
    answering_server.asked.clear()
    standardise(source, output, pool, Endpoint(answering_server.url, "m"))
    assert answering_server.asked == ["Heart normal."]
    assert output.read_bytes() == whole


def test_busy_server_is_asked_again_with_growing_waits(answering_server: Server) -> None:
    waits: list[float] = []
    answering_server.failures = [429, 503]
    endpoint = Endpoint(answering_server.url, "m", sleep=waits.append)
    assert endpoint.ask("Sentence: Lungs clear.") == "The lungs are clear."
    assert waits == [1.0, 2.0]


def test_refusing_and_failing_servers_are_named(answering_server: Server) -> None:
    answering_server.failures = [401]
    with pytest.raises(UserError, match="refuses with status 401; check url, model and key"):
        Endpoint(answering_server.url, "m").ask("x")
    answering_server.failures = [500] * 5
    with pytest.raises(UserError, match=r"failed 5 times \(status 500\); what is done is kept"):
        Endpoint(answering_server.url, "m", sleep=lambda _: None).ask("x")


@pytest.mark.parametrize(
    ("original", "rewrite", "problem"),
    [
        ("Small bilateral pleural effusions.", "No pleural effusions.", "denies effusion"),
        ("No pneumothorax.", "There is a pneumothorax.", "affirms pneumothorax"),
        ("Edema and a small effusion.", "There is edema.", "drops effusion"),
        ("Lungs are clear.", "No pneumonia.", "adds pneumonia"),
        ("Left effusion.", "Right effusion.", "changes the side"),
        ("Bones are intact.", "Bones are not intact.", "changes a negation"),
        ("Lungs are clear.", " ", "is empty"),
    ],
)
def test_rewrites_that_change_the_report_are_refused(original: str, rewrite: str, problem: str) -> None:
    assert problem in find_rewrite_problem(original, rewrite)


@pytest.mark.parametrize(
    ("original", "rewrite"),
    [
        ("No effusion or pneumothorax.", "There is no pneumothorax or pleural effusion."),
        ("Effusion is not seen.", "No pleural effusion."),
        ("The lungs are without consolidation, but there is a nodule.", "A nodule is seen; no consolidation."),
        ("Heart size normal.", "The heart is normal in size."),
    ],
)
def test_faithful_rewrites_pass(original: str, rewrite: str) -> None:
    assert find_rewrite_problem(original, rewrite) == ""
