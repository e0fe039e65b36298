"""Prompts against the recorded ones (../shared/golden/data_eval/benchmarks.json), byte for byte."""

import json
from pathlib import Path
from typing import Any

import pytest

from vila_m3.benchmarks.asking import ask_record, prompt_text
from vila_m3.benchmarks.definition import Question, load_benchmark
from vila_m3_common.errors import UserError
from vila_m3_common.prompts import WHICH_FINDINGS, finding_lines, finding_turns, is_there, report_turns

FINDINGS = {
    "chestxray14": ("Fracture", "Pneumothorax", "Lung Opacity"),
    "chexpert": ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural effusion"),
}
CASES = [(name, finding) for name, findings in FINDINGS.items() for finding in findings]


@pytest.fixture(scope="module")
def recorded(shared: Path) -> Any:
    return json.loads((shared / "golden/data_eval/benchmarks.json").read_text())


def turns(recorded_turns: Any) -> tuple[str, ...]:
    return tuple(text for _, text in recorded_turns if text is not None)


@pytest.mark.parametrize("name", FINDINGS)
def test_multiple_choice_is_asked_as_recorded(recorded: Any, name: str) -> None:
    asked = recorded[name]
    assert finding_turns("multi_choice", FINDINGS[name], "") == (asked["without_expert"]["multi_choice"],)
    told = finding_turns("multi_choice", FINDINGS[name], "", "<placeholder>")
    assert told == turns(asked["with_expert"]["multi_choice"]["turns_with_placeholder"])


@pytest.mark.parametrize(("name", "finding"), CASES)
def test_one_finding_is_asked_as_recorded_without_an_expert(recorded: Any, name: str, finding: str) -> None:
    assert finding_turns("binary", (), finding) == (recorded[name]["without_expert"][finding.lower()],)


@pytest.mark.parametrize("form", ["binary", "binary_conv", "text_only"])
@pytest.mark.parametrize(("name", "finding"), CASES)
def test_one_finding_is_asked_as_recorded_with_an_expert(
    recorded: Any, cards: str, name: str, finding: str, form: str
) -> None:
    expected = turns(recorded[name]["with_expert"][form][finding.lower()]["turns_with_placeholder"])
    assert finding_turns(form, (), finding, "<placeholder>", cards) == expected


def test_findings_are_told_as_recorded(recorded: Any) -> None:
    (told,) = turns(recorded["chestxray14"]["with_expert"]["binary"]["fracture"]["example_filled"])
    lines = told.split("model:\n")[1].split("Question")[0]
    scores = {line.split(":")[0].strip(): float(line.endswith("yes")) for line in lines.splitlines()}
    assert finding_lines(scores) == lines
    assert finding_lines({"Pleural_Thickening": 0.5}) == " pleural thickening: no\n"


def test_reports_are_asked_as_recorded(recorded: Any, cards: str) -> None:
    asked = recorded["mimic-cxr-report"]
    told = report_turns("Describe the image in detail.", {"Edema": 0.2, "Cardiomegaly": 0.9}, cards)
    assert told == turns(asked["prompt_expert_turns"])


BENCHMARKS = "vila_m3_bundle/configs/benchmarks"


def question(finding: str = "") -> Question:
    text = is_there(finding) if finding else "Is it?"
    return Question("a.png", text, "no", "a.png", "p1", "CLOSED", "", finding, FINDINGS["chestxray14"])


def test_every_prompt_form_is_asked_from_a_benchmarks_file(
    repository: Path, recorded: Any, cards: str, tmp_path: Path
) -> None:
    folder = tmp_path / "expert_findings/chestxray14"
    folder.mkdir(parents=True)
    (folder / "a.png.json").write_text(json.dumps({"Edema": 0.9}))

    def ask(name: str, asked: Question) -> Any:
        return ask_record(load_benchmark(name, repository / BENCHMARKS), asked, tmp_path, cards)

    plain = ask("chestxray14", question("Fracture"))
    assert prompt_text(plain) == recorded["chestxray14"]["without_expert"]["fracture"]
    assert plain.images == ("a.png",)
    told = ask("chestxray14_expert", question("Fracture"))
    template = turns(recorded["chestxray14"]["with_expert"]["binary"]["fracture"]["turns_with_placeholder"])[0]
    assert prompt_text(told) == template.replace("<placeholder>", " edema: yes\n")
    conversation = ask("chestxray14_expert_binary_conv", question("Fracture"))
    assert [message.role for message in conversation.messages] == ["user", "assistant", "expert"]
    assert ask("chestxray14_expert_text_only", question("Fracture")).images == ()
    choice = ask("chestxray14_multi_choice", question())
    assert prompt_text(choice) == recorded["chestxray14"]["without_expert"]["multi_choice"]
    assert "(A) fracture\n" in prompt_text(ask("chestxray14_expert_multi_choice", question()))
    assert WHICH_FINDINGS in prompt_text(choice)
    example = recorded["radvqa"]["example_user_turn_older_runner"]
    asked = Question("1", example.split("\n")[1], "no", "a.png", "p1", "CLOSED")
    assert prompt_text(ask("vqa_rad", asked)) == example
    report = Question("1", "Describe the image in detail.", "Clear.", "a.png", "p1", "OPEN")
    assert prompt_text(ask("mimic_report_raw", report)) == recorded["mimic-cxr-report"]["prompt_plain"]


def test_missing_findings_of_the_expert_are_told_with_the_config_that_writes_them(
    repository: Path, tmp_path: Path
) -> None:
    benchmark = load_benchmark("chexpert_expert", repository / BENCHMARKS)
    with pytest.raises(UserError, match=r"chexpert, which does not exist; write them with .*expert_findings.json"):
        ask_record(benchmark, question("Edema"), tmp_path)
