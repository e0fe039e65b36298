"""Expert conversations equal the recorded ones; wordings are many, and held-out ones stay apart."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from vila_m3.data.experts import brats, cxr, vista3d
from vila_m3.data.experts.wording import frames, pick, segment_wordings, tumor_wordings, wordings
from vila_m3.data.record import Record
from vila_m3.questions import is_held_out, tables
from vila_m3_common.errors import UserError

ROOT = Path(__file__).parents[3]
CARDS = (ROOT / "vila_m3_bundle/configs/model_cards.txt").read_text()


@pytest.fixture
def experts(shared: Path) -> Path:
    return shared / "golden/data_eval/1_data_preparation/experts"


def as_recorded(record: Record) -> dict[str, Any]:
    """The row as the reference wrote it: experts speak as humans, no metadata."""
    row = record.to_row()
    row.pop("metadata", None)
    for turn in row["conversations"]:
        turn["from"] = turn["from"].replace("expert", "human")
    return row


def first_question(row: dict[str, Any]) -> str:
    return row["conversations"][0]["value"].rsplit("\n", 1)[1]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    paths = [path for path in sorted(folder.glob("*_t*.json")) if "kinds" not in path.name]
    return [row for path in paths for row in json.loads(path.read_text())]


def test_chest_xray_conversion_equals_the_recorded_one_as_a_whole(experts: Path) -> None:
    folder = experts / "cxr"
    records = [Record.from_row(row) for row in json.loads((folder / "input/conversations.json").read_text())]
    train, test = cxr.sample_and_split(records, folder / "input/pred", CARDS, 9, 0.5)
    for name, part in (("train", train), ("test", test)):
        assert [as_recorded(record) for record in part] == json.loads(
            (folder / f"output/cxr_expert_{name}.json").read_text()
        )


def test_ct_conversations_equal_the_recorded_ones(experts: Path) -> None:
    metadata = {
        f"{path.parent.name}/{item['image']}": item
        for path in (experts / "vista3d/input").rglob("*_meta.json")
        for item in json.loads(path.read_text())
    }
    rows = rows_of(experts / "vista3d/output")
    assert len(rows) == 30
    for row in rows:
        assert as_recorded(render_ct(row, metadata[row["images"][0]])) == as_written(row)


def as_written(row: dict[str, Any]) -> dict[str, Any]:
    """A list of one image is written as ``image`` in this project."""
    return Record.from_row(row).to_row()


def render_ct(row: dict[str, Any], item: dict[str, Any]) -> Record:
    turns, image, question = row["conversations"], row["images"][0], first_question(row)
    label = image.replace("_img.png", "_label.png")
    if len(turns) == 2:
        return vista3d.segment_record(row["id"], image, question, turns[1]["value"], CARDS)
    legend, argument = vista3d.parse_legend(item["label_colors"]), item["group_name"]
    if "found_tumor" not in item:
        return vista3d.describe_record(row["id"], image, label, question, argument, legend, CARDS, faithful=True)
    counts = dict(zip(item["found_tumor"], item["num_tumors"], strict=True))
    count_question = turns[4]["value"] if counts else ""
    return vista3d.tumor_record(row["id"], image, label, question, argument, legend, counts, count_question, CARDS)


def test_mri_conversations_equal_the_recorded_ones(experts: Path) -> None:
    items = json.loads((experts / "brats/input/extracted_slices_meta.json").read_text())
    metadata = {item["image"][0]: item for item in items}
    rows = rows_of(experts / "brats/output")
    assert len(rows) == 18
    for row in rows:
        item = metadata[row["images"][0]]
        rendered = as_recorded(render_mri(row, item))
        assert rendered.pop("id") == ""
        assert rendered == row


def render_mri(row: dict[str, Any], item: dict[str, Any]) -> Record:
    images, label, turns = brats.sequences(item["image"]), item["label"], row["conversations"]
    if len(turns) == 2:
        return brats.describe_record("", images, label, turns[0]["value"], CARDS, faithful=True)
    if "segmented" in turns[1]["value"]:
        return brats.segment_record("", images, label, first_question(row), CARDS)
    return brats.grade_record("", images, label, first_question(row), brats.read_grade(item["orig_images"][0]), CARDS)


def test_image_counts_are_right_unless_the_faithful_form_is_asked_for() -> None:
    legend = [("liver", "red")]
    ct = [
        vista3d.describe_record("", "i", "l", "What?", "organs", legend, CARDS, faithful) for faithful in (False, True)
    ]
    mri = [brats.describe_record("", list("abcd"), "l", "What?", CARDS, faithful) for faithful in (False, True)]
    assert [record.placeholder_count - len(record.images) for record in (*ct, *mri)] == [0, 1, 0, -5]


def test_several_kinds_of_tumour_are_counted_where_the_reference_stops(experts: Path) -> None:
    cases = json.loads((experts / "vista3d/output/several_tumour_kinds.json").read_text())
    counts = dict(zip(cases[0]["found_tumor"], cases[0]["num_tumors"], strict=True))
    record = vista3d.tumor_record("", "i", "l", "Any?", "hepatic tumor", [], counts, "How many?", CARDS)
    assert record.messages[-1].text == "There are 2 hepatic tumors, 1 hepatic cyst."


def test_predictions_that_are_strings_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png.json").write_text('{"Mass": "0.7"}')
    with pytest.raises(UserError, match="give those of the ensemble"):
        cxr.read_scores(tmp_path, "a.png")
    with pytest.raises(UserError, match="leaves the image folder"):
        cxr.read_scores(tmp_path, "../a.png")


def every_table() -> dict[str, list[str]]:
    names = ("describe", "count", "grade", "brain_segment", "report", "multilabel")
    found = {name: wordings(name) for name in names}
    found |= {argument: wordings("group", [what]) for argument, what in frames()["groups"].items()}
    found |= {
        f"segment {name}": [t for t, _, _ in segment_wordings(name)] for name in tables()["ct_segment"]["objects"]
    }
    found |= {f"finding {name}": wordings("binary", what) for name, what in tables()["cxr_findings"].items()}
    return found


@pytest.mark.parametrize("name", sorted(every_table()))
def test_every_argument_has_forty_wordings_to_train_on_and_some_held_out(name: str) -> None:
    texts = set(every_table()[name])
    held_out = {text for text in texts if is_held_out(text)}
    assert len(texts) >= 40
    assert held_out
    assert all(re.fullmatch(r"[A-Z].*[^{}]", text) for text in texts)
    rng = random.Random(0)
    assert {pick(sorted(texts), rng, True) for _ in range(50)} <= held_out


@pytest.mark.parametrize("argument", sorted(tables()["ct_tumors"]))
def test_every_kind_of_tumour_has_forty_wordings(argument: str) -> None:
    texts = set(tumor_wordings(argument))
    assert len(texts) >= 40
    assert {is_held_out(text) for text in texts} == {True, False}
