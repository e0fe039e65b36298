"""VQA-RAD and SLAKE equal the recorded output of the original converters (golden/data_eval/1_data_preparation)."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from vila_m3.benchmarks.choice import is_choice_right, options_of
from vila_m3.benchmarks.definition import Question, load_benchmark, prompt_of
from vila_m3.data.checks import RowChecks
from vila_m3.data.prepare import prepare
from vila_m3.data.record import parse_row
from vila_m3.data.source import Item, Located
from vila_m3.data.sources.finding_labels import read_finding_labels
from vila_m3.data.sources.slake import read_slake, read_slake_choices
from vila_m3.data.sources.vqa_rad import ORGAN_QUESTIONS, read_vqa_rad
from vila_m3.nano_tokenizer import BENCHMARK_SUFFIX
from vila_m3_common.prompts import finding_turns


@pytest.fixture(scope="session")
def recorded(shared: Path) -> Path:
    return shared / "golden/data_eval/1_data_preparation"


@pytest.fixture(scope="session")
def facts(recorded: Path) -> dict[str, Any]:
    return json.loads((recorded / "facts.json").read_text())


def as_recorded(items: list[Item]) -> list[dict[str, Any]]:
    rows = [item.record.to_row() for item in items if isinstance(item, Located)]
    assert len(rows) == len(items)
    return [{"id": row["id"], "image": row["image"], "conversations": row["conversations"]} for row in rows]


def file_hash(rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(rows, indent=4).encode()).hexdigest()


@pytest.mark.parametrize(
    ("split", "name", "fact"),
    [
        ("train_validate", "slake_train_val_instruct_seed0", "train_val_seed0"),
        ("test", "slake_test_instruct_seed0", "test_seed0"),
    ],
)
def test_slake_equals_the_recorded_conversion(
    shared: Path, recorded: Path, facts: dict[str, Any], split: str, name: str, fact: str
) -> None:
    rows = as_recorded(list(read_slake(shared / "data/vqa/slake", split)))
    assert rows == json.loads(gzip.decompress((recorded / f"slake/{name}.json.gz").read_bytes()))
    assert len(rows) == facts["slake"][fact]["n"]
    assert file_hash(rows) == facts["slake"][fact]["sha256_of_json_file"]


@pytest.mark.parametrize(
    ("split", "name", "fact"),
    [
        ("train", "radvqa_train_instruct_fixed_seed0", "train_scratch_fixed_seed0"),
        ("test", "radvqa_test_instruct", "test"),
    ],
)
def test_vqa_rad_equals_the_recorded_conversion(
    shared: Path, recorded: Path, facts: dict[str, Any], split: str, name: str, fact: str
) -> None:
    rows = as_recorded(list(read_vqa_rad(shared / "data/vqa/vqa_rad", split)))
    assert rows == json.loads(gzip.decompress((recorded / f"radvqa/{name}.json.gz").read_bytes()))
    assert len(rows) == facts["radvqa"][fact]["n"]
    assert file_hash(rows) == facts["radvqa"][fact]["sha256_of_json_file"]
    assert list(ORGAN_QUESTIONS) == facts["radvqa"]["organ_questions"]


def test_answers_can_begin_with_one_kind_of_letter(shared: Path) -> None:
    folder = shared / "data/vqa/vqa_rad"
    plain, capital = (
        [item.record.messages[-1].text for item in read_vqa_rad(folder, "train", capitalizes=capitalizes)]  # type: ignore[union-attr]
        for capitalizes in (False, True)
    )
    assert {"yes", "Yes", "no", "No"} <= set(plain)
    assert {text for text in capital if text.lower() in ("yes", "no")} == {"Yes", "No"}
    assert [text.lower() for text in plain] == [text.lower() for text in capital]


def test_all_vqa_rad_rows_are_given_once(shared: Path) -> None:
    folder = shared / "data/vqa/vqa_rad"
    counts = {
        split: len(list(read_vqa_rad(folder, split, questions="all", organ_questions=False)))
        for split in ("train", "test")
    }
    assert counts == {"train": 1797, "test": 451}


@pytest.mark.parametrize(("languages", "counts"), [(["en"], (4919, 1053, 1061)), (["zh"], (4916, 1046, 1033))])
def test_slake_languages_have_the_recorded_counts(
    shared: Path, languages: list[str], counts: tuple[int, int, int]
) -> None:
    folder = shared / "data/vqa/slake"
    found = tuple(len(list(read_slake(folder, split, languages))) for split in ("train", "validate", "test"))
    assert found == counts


def test_real_files_pass_every_check_and_keep_what_graders_need(shared: Path, tmp_path: Path) -> None:
    slake, rad = shared / "data/vqa/slake", shared / "data/vqa/vqa_rad"
    first = prepare(read_slake(slake, "test"), "slake", "test", tmp_path, RowChecks(slake / "imgs"))
    second = prepare(read_vqa_rad(rad, "test"), "vqa_rad", "test", tmp_path, RowChecks(rad / "images"))
    assert (first["written"], first["rejected"]) == (1061, 0)
    assert (second["written"], second["rejected"]) == (491, 0)
    records = [parse_row(line) for line in (tmp_path / "slake_test.jsonl").read_text().splitlines()]
    assert sum(record.metadata["answer_type"] == "CLOSED" for record in records) == 416
    assert {"qid", "language", "modality", "content_type", "question"} <= records[0].metadata.keys()
    digest = hashlib.sha256((tmp_path / "slake_test.jsonl").read_bytes()).hexdigest()
    assert first["files"] == [{"file": "slake_test.jsonl", "rows": 1061, "sha256": digest}]


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("slake", lambda data, suffix: read_slake(data / "vqa/slake", "test", image_first=True, suffix=suffix)),
        ("vqa_rad", lambda data, suffix: read_vqa_rad(data / "vqa/vqa_rad", "test", image_first=True, suffix=suffix)),
    ],
)
def test_questions_can_be_put_as_the_benchmark_puts_them(shared: Path, repository: Path, name: str, rows: Any) -> None:
    benchmark = load_benchmark(name, repository / "vila_m3_bundle/configs/benchmarks")
    found = [item.record for item in rows(shared / "data", BENCHMARK_SUFFIX) if isinstance(item, Located)]
    assert benchmark.suffix == BENCHMARK_SUFFIX
    for record in found:
        question = Question(record.id, record.metadata["question"], "", record.images[0], "", "")
        assert record.messages[0].text == prompt_of(benchmark, question)


def test_findings_can_be_asked_for_as_the_benchmark_does(shared: Path) -> None:
    findings = {name: name for name in ("Effusion", "Cardiomegaly")}
    found = read_finding_labels(
        *(shared / "data/cxr/nih_256", "train", "labels.csv", findings),
        listed="Finding Labels",
        held_out_share=0.2,
        prompt="binary",
    )
    (text,) = finding_turns("binary", list(findings), "Effusion")
    records = [item.record for item in found if isinstance(item, Located)]
    assert records[0].messages[0].text == text
    assert records[0].messages[1].text in ("yes", "no")


def test_a_share_of_the_questions_has_the_suffix(shared: Path) -> None:
    rows = read_slake(shared / "data/vqa/slake", "validate", suffix="Reply briefly.", suffix_share=0.7)
    has = ["Reply briefly." in item.record.messages[0].text for item in rows if isinstance(item, Located)]
    assert 0.6 < sum(has) / len(has) < 0.8


def test_a_trial_takes_the_first_rows(shared: Path, tmp_path: Path) -> None:
    source = shared / "data/vqa/slake"
    checks = RowChecks(source / "imgs")
    for limit in (5, 7):
        summary = prepare(read_slake(source, "train"), "slake", "train", tmp_path, checks, row_limit=limit)
        assert summary["written"] == limit


def test_slake_knowledge_questions_as_multiple_choice_need_no_image(shared: Path) -> None:
    items = list(read_slake_choices(shared / "data/vqa/slake", "test"))
    records = [item.record for item in items if isinstance(item, Located)]
    assert len(records) == len(items) == 148
    truths = {row.record.metadata["qid"]: row.record.messages[1].text for row in questions(shared)}
    for record in records:
        question, truth = (message.text for message in record.messages)
        options = options_of(question)
        wanted = truths[record.metadata["qid"]]
        assert record.images == ()
        assert "<image>" not in question
        assert truth == f"{record.metadata['answer_letter']}. {wanted}"
        assert truth in question
        assert list(options.values()).count(wanted) == 1
        assert len(options) == (2 if wanted in ("Yes", "No") else 4)
        assert is_choice_right(question, truth, wanted) is True
    assert items == list(read_slake_choices(shared / "data/vqa/slake", "test"))


def questions(shared: Path) -> list[Located]:
    return [item for item in read_slake(shared / "data/vqa/slake", "test") if isinstance(item, Located)]
