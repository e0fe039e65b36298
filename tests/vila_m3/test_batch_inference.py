"""Questions from a JSONL file: every line answered or refused, nothing asked twice."""

import json
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import run

from vila_m3_common.hooks import quiet


@pytest.fixture
def asked(tmp_path: Path, cxr_file: Path, mri_folder: Path) -> Path:
    rows: list[Any] = [
        {"question_id": "cxr", "image": str(cxr_file), "question": "Is there a pleural effusion?"},
        {"question_id": "mri", "image": str(mri_folder), "question": "Is there a brain tumor?"},
        {"question": "What can you do?"},
        {"question_id": 4, "turns": [{"role": "user", "text": "<image>\nAny edema?"}], "images": [str(cxr_file)]},
        {"question_id": "gone", "image": "missing.png", "question": "Is there a mass?"},
        {"question_id": "many", "turns": [{"role": "user", "text": "no placeholder"}], "images": [str(cxr_file)]},
        {"question_id": "few", "turns": [{"role": "user", "text": "<image> <image>"}], "images": [str(cxr_file)]},
        {"question_id": "over", "turns": [{"role": "user", "text": "q"}, {"role": "assistant", "text": "a"}]},
        {"question_id": "who", "turns": [{"role": "system", "text": "obey"}]},
        {"question_id": "empty", "question": " <image> "},
        {"question_id": "none"},
    ]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not json\n")
    return path


ERRORS = {
    "gone": "missing.png does not exist; check the path",
    "many": "1 images were given for 0 <image> placeholders",
    "few": "the turns have more <image> placeholders than the 1 images given",
    "over": "the conversation ends with an assistant turn; add a user turn for the model to answer",
    "who": "needs a role (user, assistant, expert) and a text",
    "empty": "the question is empty; ask something",
    "none": "the line has neither question nor turns",
    "line 12": "line 12 is not valid JSON",
}


def answer(repository: Path, questions: Path, output: Path, **changes: Any) -> None:
    with quiet():
        run(
            config_file=str(repository / "vila_m3_bundle/configs/batch_inference.json"),
            questions=str(questions),
            output=str(output),
            device="cpu",
            max_new_tokens=40,
            **{"batch_size": 3, **changes},
        )


def rows_of(path: Path) -> dict[str | int, dict[str, Any]]:
    return {row["question_id"]: row for row in map(json.loads, path.read_text().splitlines())}


def test_every_line_is_answered_or_refused(
    repository: Path, asked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(repository, asked, tmp_path / "out/answers.jsonl")
    rows = rows_of(tmp_path / "out/answers.jsonl")
    assert list(rows)[:5] == ["cxr", "mri", "line 3", 4, "gone"]
    assert rows["cxr"]["text"] == "This looks like an chest x-ray. Let me first trigger <CXR()>."
    assert rows["mri"]["text"] == "This looks like an MRI image sequence. Let me first trigger <BRATS()>."
    assert rows["cxr"]["stop_reason"] == "stop token"
    assert {name: ERRORS[name] in row["error"] for name, row in rows.items() if "error" in row} == dict.fromkeys(
        ERRORS, True
    )
    printed = capsys.readouterr().out
    assert "4 of 12 questions answered" in printed
    assert "8 questions could not be asked" in printed


def test_a_killed_run_goes_on(repository: Path, asked: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    answer(repository, asked, output)
    whole = rows_of(output)
    lines = output.read_text().splitlines()
    marked = json.dumps({**json.loads(lines[0]), "text": "kept as it was"})
    output.write_text(f"{marked}\n{lines[1]}\n{lines[2][:20]}")
    answer(repository, asked, output)
    rows = rows_of(output)
    assert rows["cxr"]["text"] == "kept as it was"
    assert {name: row for name, row in rows.items() if name != "cxr"} == {
        name: row for name, row in whole.items() if name != "cxr"
    }


def test_other_settings_need_another_file(repository: Path, asked: Path, tmp_path: Path) -> None:
    answer(repository, asked, tmp_path / "answers.jsonl")
    before = (tmp_path / "answers.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=r"was begun with other settings \(seed 0 -> 5\); give another --output"):
        answer(repository, asked, tmp_path / "answers.jsonl", seed=5)
    assert (tmp_path / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"are empty; give lines such as"),
        (b"\xff\xfe", r"cannot be read .*; give a JSONL file in UTF-8"),
        (
            b'{"question_id": 1, "question": "a"}\n{"question_id": 1, "question": "b"}',
            r"question_id 1 stands in several",
        ),
    ],
)
def test_an_unusable_file_is_refused(repository: Path, tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "questions.jsonl").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        answer(repository, tmp_path / "questions.jsonl", tmp_path / "answers.jsonl")
    assert not (tmp_path / "answers.jsonl").exists()
