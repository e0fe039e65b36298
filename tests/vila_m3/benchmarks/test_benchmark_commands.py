"""``evaluate``, ``grade`` and ``compare`` as commands, on a small folder of the true layout, with the nano model."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.bundle import run
from PIL import Image

from vila_m3.benchmarks.definition import load_benchmark
from vila_m3.benchmarks.page import html_page
from vila_m3_common.hooks import quiet
from vila_m3_common.patients import is_held_out
from vila_m3_common.phantoms import cxr_phantom, save_radiograph
from vila_m3_common.prompts import CXR_FINDINGS

PATIENTS = [str(number) for number in range(60) if is_held_out(str(number), 0.2)][:4]


def write_slake(folder: Path) -> None:
    (folder / "imgs/xmlab1").mkdir(parents=True)
    picture = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(picture).save(folder / "imgs/xmlab1/source.jpg")
    asked = [("Is this a chest?", "Yes", "CLOSED"), ("Which organ?", "Lung", "OPEN"), ("Is it normal?", "No", "CLOSED")]
    learnt = [("Is it normal?", "No", "CLOSED"), ("What organ is it?", "Liver", "OPEN")]
    for split, told in {"test": asked, "train": learnt, "validate": learnt[:1]}.items():
        rows = [
            {"img_id": 1, "img_name": "xmlab1/source.jpg", "question": text, "answer": answer, "q_lang": "en",
             "location": "Lung", "modality": "X-Ray", "answer_type": kind, "base_type": "vqa",
             "content_type": "Organ", "triple": ["vhead", "_", "_"], "qid": number}
            for number, (text, answer, kind) in enumerate(told, start=1)
        ]  # fmt: skip
        (folder / f"{split}.json").write_text(json.dumps(rows))


def write_films(folder: Path, findings: Path) -> None:
    folder.mkdir()
    findings.mkdir(parents=True)
    lines = ["Image Index,Finding Labels,Patient ID"]
    for number, patient in enumerate(PATIENTS):
        phantom = cxr_phantom(seed=number, findings=["Effusion"] if number % 2 else [])
        save_radiograph(phantom, folder / f"{number}.png")
        (findings / f"{number}.png.json").write_text(json.dumps({"Effusion": 0.9 if number % 2 else 0.1}))
        lines.append(f"{number}.png,{'Effusion' if number % 2 else 'No Finding'},{patient}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_slake(folder / "slake")
    write_films(folder / "nih_256", folder / "expert_findings/nih_256")
    return folder


def config(repository: Path, name: str) -> str:
    return str(repository / f"vila_m3_bundle/configs/{name}.json")


def call(repository: Path, name: str, **options: Any) -> None:
    with quiet():
        run(config_file=config(repository, name), **options)


@pytest.fixture(scope="module")
def evaluated(repository: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    options = {
        "benchmarks": "['slake','nih','nih_expert']",
        "data_root": data,
        "output_dir": folder,
        "max_new_tokens": 6,
        "batch_size": 8,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", config(repository, "evaluate"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "written to" in done.stdout
    return folder


def test_evaluate_writes_scores_prompts_and_raw_answers(evaluated: Path) -> None:
    results = json.loads((evaluated / "results.json").read_text())
    kinds = {"slake", "slake_blank", "slake_prior", "slake_majority", "nih", "nih_blank", "nih_majority"}
    assert kinds | {"nih_expert", "nih_expert_blank", "nih_expert_majority"} == set(results)
    assert results["slake"]["accuracy"]["count"] == 3
    assert set(results["slake"]["accuracy"]) == {"value", "interval", "count"}
    assert results["slake"]["details"]["reliability"]["bins"]
    # Training says "No" to normal, and knows "Liver" alone for open questions.
    assert results["slake_prior"]["accuracy"]["value"] == pytest.approx(1 / 3)
    prior = [json.loads(line) for line in (evaluated / "predictions/slake_prior.jsonl").read_text().splitlines()]
    assert [row["text"] for row in prior] == ["No", "Liver", "No"]
    rows = [json.loads(line) for line in (evaluated / "predictions/nih_expert.jsonl").read_text().splitlines()]
    assert len(rows) == results["nih_expert"]["corrected_f1"]["count"] > 0
    assert all(" effusion: " in row["prompt"] and 0 <= row["confidence"] <= 1 for row in rows)
    assert "## SLAKE" in (evaluated / "results.md").read_text()


def test_the_report_is_whole_in_itself(evaluated: Path) -> None:
    page = (evaluated / "report.html").read_text()
    assert "Without and with the expert" in page
    assert "Confidence against accuracy" in page
    assert "data:image/jpeg;base64," in page
    links = re.findall(r"(?:src|href)=['\"]([^'\"#]*)", page)
    assert all(link.startswith("data:") for link in links if link)
    assert "<script" not in page


def test_answers_are_told_as_text_and_a_confusion_is_drawn(repository: Path, tmp_path: Path) -> None:
    definition = load_benchmark("slake", repository / "vila_m3_bundle/configs/benchmarks")
    row = {"question_id": "1", "question": "q", "image": "gone.png", "answer": "yes", "confidence": 0.9}
    row |= {"text": "<script>alert(1)</script>", "corrected": None}
    (tmp_path / "slake.items.jsonl").write_text(json.dumps(row) + "\n")
    confusion = {"labels": ["CXR", "none"], "matrix": [[3, 1], [0, 4]]}
    score = {"value": 0.5, "interval": [0.4, 0.6], "count": 4}
    results = {
        "slake": {"accuracy": score, "metrics": ["accuracy"]},
        "trigger": {"benchmark": "trigger", "details": {"confusion": confusion}},
    }
    page = html_page([definition], results, tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "trigger: confusion" in page
    assert "unparsable (90 % sure)" in page


def test_grade_takes_predictions_with_every_fault_and_loses_nothing(
    repository: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "given.jsonl"
    rows = [("1", "yes"), ("9", "yes"), ("3", "no"), ("3", "Diagnosis: no")]
    lines = [json.dumps({"question_id": name, "text": text, "confidence": float("nan")}) for name, text in rows]
    path.write_text("\n".join(lines) + '\n{"question_id": "2", "te')
    output = tmp_path / "graded"
    call(repository, "grade", benchmark="slake", predictions=str(path), data_root=str(data), output_dir=str(output))
    result = json.loads((output / "results.json").read_text())["slake"]
    assert result["accuracy"]["value"] == pytest.approx(1 / 3)
    assert result["corrected_accuracy"]["value"] == pytest.approx(2 / 3)
    notes = " ".join(result["notes"])
    for told in ("not valid JSON", "1 ids stand in several", "1 ids are no question's", "1 questions have no answer"):
        assert told in notes
    assert "3 confidences are no probability" in notes
    assert "note: slake" in capsys.readouterr().out
    assert (output / "report.html").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"benchmark": "slak"}, "unknown benchmark 'slak'; did you mean 'slake'"),
        ({"predictions": "gone.jsonl"}, "gone.jsonl cannot be read"),
        ({"data_root": "nowhere"}, "source folder nowhere/slake does not exist"),
    ],
)
def test_grade_says_what_is_wrong(
    repository: Path, data: Path, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    path = tmp_path / "given.jsonl"
    path.write_text('{"question_id": "1", "text": "yes"}\n')
    given = {"benchmark": "slake", "predictions": str(path), "data_root": str(data), "output_dir": str(tmp_path / "o")}
    with pytest.raises(SystemExit, match=message):
        call(repository, "grade", **(given | options))


def test_compare_tells_with_from_without_expert_and_ours_from_published(
    repository: Path, data: Path, evaluated: Path, tmp_path: Path
) -> None:
    call(repository, "compare", first=str(evaluated), data_root=str(data), output_dir=str(tmp_path))
    found = json.loads((tmp_path / "comparison.json").read_text())
    assert {"nih -> nih_expert", "slake_blank -> slake", "nih_blank -> nih"} <= set(found["pairs"])
    row = found["pairs"]["nih -> nih_expert"]["metrics"]["corrected_f1"]
    assert row["difference"] == pytest.approx(row["second"] - row["first"])
    assert row["interval"][0] <= row["difference"] <= row["interval"][1]
    assert 0 < row["p_value"] <= 1
    models = {row["model"]: row for row in found["published"]["slake"]}
    assert models["VILA-M3 8B"]["published"] == 0.845
    assert "VILA-M3 8B" in (tmp_path / "comparison.md").read_text()


def test_compare_takes_two_files_and_names_what_is_missing(
    repository: Path, data: Path, evaluated: Path, tmp_path: Path
) -> None:
    better = tmp_path / "better/slake.jsonl"
    better.parent.mkdir()
    answers = {"1": "yes", "2": "lung", "3": "no"}
    lines = [json.dumps({"question_id": name, "text": text}) for name, text in answers.items()]
    better.write_text("\n".join(lines))
    given = {"first": str(evaluated), "second": str(better), "data_root": str(data), "output_dir": str(tmp_path)}
    call(repository, "compare", **given)
    pairs = json.loads((tmp_path / "comparison.json").read_text())["pairs"]
    assert pairs["slake -> slake"]["metrics"]["accuracy"]["second"] == 1
    with pytest.raises(SystemExit, match="no predictions for 'slacke'; did you mean 'slake'"):
        call(repository, "compare", **given, pairs=[["slacke", "slake"]])


def test_an_oracle_tells_just_what_the_labels_say(repository: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "nih_oracle"
    run(config_file=config(repository, "oracle_findings"), nih_root=str(data / "nih_256"), output_dir=str(folder))
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    assert len(found) == len(PATIENTS)
    for number in range(len(PATIENTS)):
        scores = found[f"{number}.png.json"]
        assert set(scores) == set(CXR_FINDINGS)
        assert {name for name, score in scores.items() if score} == ({"Effusion"} if number % 2 else set())
    oracle = load_benchmark("nih_oracle", repository / "vila_m3_bundle/configs/benchmarks")
    assert (oracle.expert, oracle.prompt) == ("expert_findings/nih_oracle", "binary")
