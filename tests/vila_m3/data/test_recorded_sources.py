"""PathVQA, Medical-Diff-VQA, MIMIC reports and their cleaning equal what the original's scripts gave."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vila_m3.data.checks import RowChecks
from vila_m3.data.cleaning import clean_report
from vila_m3.data.prepare import prepare
from vila_m3.data.record import Record
from vila_m3.data.source import Item, Located, Rejected
from vila_m3.data.sources.mimic_cxr import read_annotated_reports
from vila_m3.data.sources.mimic_vqa import TYPES, add_types, attach_paths, make_second_round, select_type
from vila_m3.data.sources.openi import read_openi
from vila_m3.data.sources.pathvqa import read_pathvqa, read_pathvqa_pickle
from vila_m3_common.errors import UserError


@pytest.fixture(scope="session")
def data_eval(shared: Path) -> Path:
    return shared / "golden/data_eval"


def records(items: list[Item]) -> list[Record]:
    return [item.record for item in items if isinstance(item, Located)]


def plain(rows: list[Record]) -> list[dict[str, Any]]:
    made = [record.to_row() for record in rows]
    return [{key: row[key] for key in ("id", "image", "conversations")} for row in made]


@pytest.mark.parametrize(("split", "name"), [("train_validate", "train"), ("test", "test")])
def test_pathvqa_equals_the_recorded_conversion(data_eval: Path, tmp_path: Path, split: str, name: str) -> None:
    folder = data_eval / "1_data_preparation/pathvqa"
    rows = plain(records(list(read_pathvqa(folder / "input_parquet", split, tmp_path, ids="file_name"))))
    recorded = (folder / f"output_stage2_seed0/{name}_instruct.json").read_text()
    assert rows == json.loads(recorded)
    facts = json.loads((folder.parent / "facts.json").read_text())["pathvqa"]
    assert hashlib.sha256(json.dumps(rows, indent=4).encode()).hexdigest() == facts[f"{name}_instruct_sha256"]


def test_pathvqa_images_equal_the_recorded_ones(data_eval: Path, tmp_path: Path) -> None:
    folder = data_eval / "1_data_preparation/pathvqa"
    for split in ("train_validate", "test"):
        assert list(read_pathvqa(folder / "input_parquet", split, tmp_path))
    written = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.jpg"))
    assert written == sorted(path.relative_to(folder / "output_stage1") for path in folder.rglob("*.jpg"))
    for name in written:
        made, recorded = Image.open(tmp_path / name), Image.open(folder / "output_stage1" / name)
        assert made.mode == recorded.mode
        np.testing.assert_allclose(np.asarray(made, float), np.asarray(recorded, float), atol=1)


def test_pathvqa_ids_are_unique_unless_asked_otherwise(data_eval: Path, tmp_path: Path) -> None:
    rows = records(list(read_pathvqa(data_eval / "1_data_preparation/pathvqa/input_parquet", "test", tmp_path)))
    assert [row.id for row in rows][:2] == ["test_0010.jpg", "test_0010.jpg#2"]
    assert len({row.id for row in rows}) == 6


def test_pathvqa_pickle_release_keeps_question_ids(data_eval: Path, tmp_path: Path) -> None:
    (tmp_path / "qas").mkdir()
    recorded = data_eval / "2_graders/pathvqa"
    (tmp_path / "qas/test_vqa.pkl").write_bytes((recorded / "test_vqa_fabricated.pkl").read_bytes())
    rows = records(list(read_pathvqa_pickle(tmp_path, "test")))
    expected = json.loads((recorded / "test_vqa_fabricated.json").read_text())
    assert [row.metadata["qid"] for row in rows] == [row["question_id"] for row in expected]
    assert [row.messages[1].text for row in rows] == [next(iter(row["label"])) for row in expected]


def test_pickle_that_names_a_function_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_vqa.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(UserError, match=r"asks for builtins\.print"):
        list(read_pathvqa_pickle(tmp_path, "test"))


def test_cleaning_equals_all_recorded_cases(data_eval: Path) -> None:
    cases = json.loads((data_eval / "3_report_metrics/cleaning_before_after.json").read_text())
    both = cases["real"] + cases["edge"]
    assert len(both) == 130
    assert [clean_report(case["before"]) or None for case in both] == [case["after"] for case in both]


def test_cleaning_can_keep_lines_apart() -> None:
    assert clean_report("chest pain\nLungs are clear", joins_lines=False) == "Chest pain Lungs are clear."


def test_report_step_equals_the_recorded_items(data_eval: Path, tmp_path: Path) -> None:
    folder = data_eval / "1_data_preparation/report"
    checks = RowChecks(folder / "input/images", allows_empty=True)
    summary = prepare(read_annotated_reports(folder / "input"), "mimic_annotated", "train", tmp_path, checks)
    rows = [json.loads(line) for line in (tmp_path / "mimic_annotated_train.jsonl").read_text().splitlines()]
    recorded = json.loads((folder / "output/captioning_mimic_train.json").read_text())["items"]
    assert [row["conversations"][1]["value"] for row in rows] == [item["answer"] for item in recorded]
    assert {row["conversations"][0]["value"] for row in rows} == {f"<image>\n{recorded[0]['question']}"}
    reasons = [row["reason"] for row in summary["rejected_rows"]]
    assert reasons == ["image p10/s2/c1.jpg is missing", "report d1.txt is missing"]


@pytest.mark.parametrize("kind", TYPES)
def test_notebook_steps_equal_the_recorded_output(data_eval: Path, kind: str) -> None:
    folder = data_eval / "1_data_preparation/mimic_vqa_notebook"

    def read(name: str) -> Any:
        return json.loads((folder / f"{name}.json").read_text())

    rows = attach_paths(read("input/conversations"), read("input/path_table"))
    assert rows == read("output/1_with_path")
    kept = select_type(rows, read("input/question_table"), kind)
    assert kept == read(f"output/2_selected_{kind}")
    assert add_types(kept, kind) == read(f"output/4_typed_{kind}")
    assert make_second_round(rows, kept, read("input/first_round_predictions")) == read(f"output/3_second_round_{kind}")


def test_unknown_question_and_long_prefix_fail_as_recorded() -> None:
    rows = [{"id": "a", "conversations": [{"value": "unknown?\n<image>"}, {"value": "yes"}]}]
    with pytest.raises(KeyError, match=r"Question 'unknown\?' not found"):
        select_type(rows, {}, "presence")
    rows[0]["conversations"][0]["value"] = "a\nb\nis there edema?\n<image>"
    with pytest.raises(ValueError, match="Invalid prefix format: a"):
        select_type(rows, {"is there edema?": "presence"}, "presence")


def test_openi_archive_gives_a_record_per_report(shared: Path) -> None:
    items = list(read_openi(shared / "data/reports/openi_reports.tgz", has_images=False))
    assert len(items) == 3955
    rejected = [item.reason for item in items if isinstance(item, Rejected)]
    assert set(rejected) == {"has neither findings nor impression"}
    first = records(items)[0]
    assert first.id == "CXR1"
    assert first.messages[1].text.endswith("There is no evidence of pneumothorax. Normal chest x-XXXX.")
