"""The published graders against what the reference returned (../shared/golden/data_eval/2_graders)."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from vila_m3.benchmarks import published


@pytest.fixture(scope="module")
def graders(shared: Path) -> Path:
    return shared / "golden/data_eval/2_graders"


def read_json(path: Path) -> Any:
    return json.loads(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_text())


def read_lines(path: Path) -> list[tuple[Any, str]]:
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
    return [(row["question_id"], row["text"]) for row in map(json.loads, text.splitlines())]


@pytest.mark.parametrize(
    ("name", "converted"),
    [("radvqa", "radvqa/radvqa_test_instruct.json.gz"), ("slakevqa", "slake/slake_test_instruct_seed0.json.gz")],
)
def test_exact_match_equals_the_reference_per_item(graders: Path, name: str, converted: str) -> None:
    rows = read_json(graders.parent / "1_data_preparation" / converted)
    truths = {row["id"]: row["conversations"][1]["value"] for row in rows}
    right = published.exact_match(truths, read_lines(graders / name / "predictions.jsonl.gz"))
    recorded = read_json(graders / name / "per_item.json.gz")
    assert {key: float(value) for key, value in right.items()} == {key: row["correct"] for key, row in recorded.items()}
    assert sum(right.values()) / len(right) == read_json(graders / name / "scores.json")["accuracy"]


def test_exact_match_ignores_integer_ids(graders: Path) -> None:
    assert published.exact_match({"1": "yes"}, [(1, "yes")]) == {"1": False}


def test_pathvqa_equals_the_reference_per_item(graders: Path) -> None:
    rows = read_json(graders / "pathvqa/test_vqa_fabricated.json")
    truths = {str(row["question_id"]): next(iter(row["label"])) for row in rows if row["answer_type"] == "yes/no"}
    right = published.pathvqa_match(truths, read_lines(graders / "pathvqa/predictions.jsonl"))
    recorded = read_json(graders / "pathvqa/per_item.json")
    assert {key: float(value) for key, value in right.items()} == {key: row["correct"] for key, row in recorded.items()}
    assert sum(right.values()) / len(right) == read_json(graders / "pathvqa/scores.json")["accuracy"]


def test_words_are_normalised_as_recorded(graders: Path) -> None:
    for row in read_json(graders / "mimicvqa/function_tables.json")["normalize_word"]:
        assert published.normalize_word(row["text"]) == row["normalize_word"], row["text"]


def test_token_scores_equal_the_recorded_ones(graders: Path) -> None:
    for row in read_json(graders / "mimicvqa/function_tables.json")["pairs"]:
        assert list(published.token_scores(row["candidate"], row["reference"])) == row["f1_precision_recall"], row


def test_diff_vqa_totals_equal_the_reference(graders: Path) -> None:
    scores: dict[str, list[tuple[bool, float]]] = {}
    for kind in ("abnormality", "presence", "view", "location", "level", "type"):
        texts = dict(read_lines(graders / f"mimicvqa/predictions/{kind}.jsonl"))
        scores[kind] = []
        for row in read_json(graders / f"mimicvqa/ground_truth/{kind}.json"):
            is_closed = row["answer_type"] == "closed"
            score = published.diff_vqa_score(row["conversations"][1]["value"], texts[row["id"]], is_closed)
            scores[kind].append((is_closed, score))
    assert published.diff_vqa_totals(scores) == read_json(graders / "mimicvqa/scores.json")["results"]


def test_answers_are_extracted_as_recorded(graders: Path) -> None:
    for row in read_json(graders / "extract_answer_table.json")["rows"]:
        for column, expected in row.items():
            if column == "text":
                continue
            grader, _, fall_back = column.partition("_fallback_")
            given = None if fall_back == "None" else 0
            if isinstance(expected, str):
                match = "debugger" if "DEBUGGER" in expected else "unknown answer"
                with pytest.raises(published.PublishedGraderError, match=match):
                    published.extract_answer(row["text"], grader, given)  # type: ignore[arg-type]
            else:
                read = published.extract_answer(row["text"], grader, given)  # type: ignore[arg-type]
                assert read == expected, (row["text"], column)


CXR = {
    "chexpert": {"atelectasis": -6, "cardiomegaly": -12, "consolidation": -8, "edema": -9, "pleural_effusion": -4},
    "chestxray14": {"fracture": -5, "pneumothorax": -4, "lung_opacity": -3},
}


def cxr_columns(graders: Path, grader: str, finding: str) -> tuple[list[int], list[str]]:
    prefix = "test_vila_chexpert_" if grader == "chexpert" else "test_vila_"
    packed = (graders / grader / "predictions" / f"{prefix}{finding}.csv.gz").read_bytes()
    rows = list(csv.reader(io.StringIO(gzip.decompress(packed).decode())))
    mark = "1" if grader == "chexpert" else "YES"
    place = CXR[grader][finding]
    return [int(mark in row[place]) for row in rows], [row[2] for row in rows]


@pytest.mark.parametrize("grader", list(CXR))
def test_finding_f1_equals_the_reference(graders: Path, grader: Any) -> None:
    recorded = read_json(graders / grader / "scores.json")
    per_class = {name.lower(): value for name, value in recorded["main"]["per_class_f1"].items()}
    for finding in CXR[grader]:
        truths, answers = cxr_columns(graders, grader, finding)
        assert published.finding_f1(truths, answers, grader) == per_class[finding]
        for variant, answer in (("all_yes", "yes"), ("all_no", "no")):
            expected = {k.lower(): v for k, v in recorded["variants"][variant]["per_class_f1"].items()}[finding]
            assert published.finding_f1(truths, [answer] * len(truths), grader) == expected


def test_one_odd_answer_spoils_a_finding_as_recorded(graders: Path) -> None:
    truths, answers = cxr_columns(graders, "chestxray14", "fracture")
    assert published.finding_f1(truths, ["There is evidence of effusion", *answers[1:]], "chestxray14") == 0.0
    truths, answers = cxr_columns(graders, "chexpert", "edema")
    answers[2] = "unsure"
    with pytest.raises(published.PublishedGraderError, match="debugger"):
        published.finding_f1(truths, answers, "chexpert")
    answers[2] = "x"
    with pytest.raises(published.PublishedGraderError, match="unknown answer x -- x"):
        published.finding_f1(truths, answers, "chexpert")
