"""Phantoms or the user's list; items of validation and evaluation; the report."""

import json
import re

import pytest
import torch

from vila_m3_common.errors import UserError
from vila_m3_common.phantoms import VolumePhantom
from vista3d_expert import data
from vista3d_expert.data import FIRST_SEEDS, evaluation_items, prepare_datalists, validation_items
from vista3d_expert.report import SegmentationReport


@pytest.fixture
def drawn_seeds(monkeypatch, ct_phantom):
    """Replace the phantom by one that is already drawn and remember the seeds."""
    seeds = []

    def draw(seed: int) -> VolumePhantom:
        seeds.append(seed)
        return ct_phantom

    monkeypatch.setattr(data, "ct_phantom", draw)
    return seeds


def test_phantoms_are_written_once(tmp_path, drawn_seeds):
    first = prepare_datalists(str(tmp_path), {"training": 2, "validation": 1})
    again = prepare_datalists(str(tmp_path), {"training": 2, "validation": 1})
    assert first == again
    assert drawn_seeds == [FIRST_SEEDS["training"], FIRST_SEEDS["training"] + 1, FIRST_SEEDS["validation"]]


def test_parts_never_share_a_seed_below_100000_phantoms():
    assert sorted(FIRST_SEEDS.values()) == [0, 100_000, 200_000]


def test_users_list_is_used_instead(tmp_path, small_case):
    (tmp_path / "case").symlink_to(small_case)
    case = {"image": "case/image.nii.gz", "label": "case/label.nii.gz"}
    (tmp_path / "datalist.json").write_text(json.dumps({"training": [case], "validation": [case]}))
    lists = prepare_datalists(str(tmp_path), {"training": 99, "validation": 99})
    assert lists["training"] == [{key: str((small_case / f"{key}.nii.gz").resolve()) for key in case}]


@pytest.mark.parametrize(
    ("datalist", "message"),
    [
        ("{", "is not valid JSON"),
        ("{}", 'has no training cases; add "training"'),
        ('{"training": ["a.nii.gz"]}', "holds the case 'a.nii.gz'; a case is"),
        ('{"training": [{"image": "a.nii.gz", "label": "b.nii.gz"}]}', "which does not exist; paths are relative to"),
    ],
)
def test_unusable_list_says_what_to_write(tmp_path, datalist, message):
    (tmp_path / "datalist.json").write_text(datalist)
    with pytest.raises(UserError, match=re.escape(message)):
        prepare_datalists(str(tmp_path), {"training": 1})


@pytest.fixture
def folded_list(tmp_path, small_case):
    (tmp_path / "case").symlink_to(small_case)
    case = {"image": "case/image.nii.gz", "label": "case/label.nii.gz"}
    cases = [{**case, "fold": fold, "dataset_name": f"fold {fold}"} for fold in (0, 1, 2)]
    (tmp_path / "list.json").write_text(json.dumps({"training": cases}))
    return tmp_path / "list.json"


def test_cases_of_one_fold_are_validated_as_in_the_model_zoos_lists(folded_list):
    parts = {"training": 1, "validation": 1}
    lists = prepare_datalists(str(folded_list.parent), parts, data_list=str(folded_list), fold=1)
    assert [case["dataset_name"] for case in lists["training"]] == ["fold 0", "fold 2"]
    assert [case["dataset_name"] for case in lists["validation"]] == ["fold 1"]


def test_real_cases_are_added_to_the_training_phantoms(tmp_path, folded_list, drawn_seeds):
    parts = {"training": 2, "validation": 1}
    lists = prepare_datalists(str(tmp_path / "phantoms"), parts, more_cases=str(folded_list), more_times=3)
    assert [case.get("dataset_name") for case in lists["training"]] == [None, None, *["fold 1", "fold 2"] * 3]
    assert len(lists["validation"]) == 1


def test_a_missing_list_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"data list .*absent.json cannot be read \(No such file"):
        prepare_datalists(str(tmp_path), {"training": 1}, data_list=str(tmp_path / "absent.json"))


def test_evaluation_prompts_every_case_with_every_argument():
    items = evaluation_items([{"image": "a", "label": "b"}], ["hepatic tumor", "bone lesion"])
    assert items == [
        {"image": "a", "label": "b", "label_prompt": [1, 26], "argument": "hepatic tumor"},
        {"image": "a", "label": "b", "label_prompt": [128], "argument": "bone lesion"},
    ]


def test_validation_prompts_everything_at_once():
    (item,) = validation_items([{"image": "a", "label": "b"}], ["everything", "bone lesion"])
    assert len(item["label_prompt"]) == 118


def test_report_counts_dice_sensitivity_and_specificity(tmp_path, capsys):
    report = SegmentationReport(str(tmp_path))
    report.reset()
    empty, tumor, elsewhere = torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4)
    tumor[0, 0] = 26
    elsewhere[0, 3] = 26
    for prediction, truth in [(tumor, tumor), (elsewhere, tumor), (empty, empty), (tumor, empty)]:
        report.add("hepatic tumor", [26], prediction, truth)
    report.write()
    row = json.loads((tmp_path / "metrics.json").read_text())["hepatic tumor"]["classes"]["hepatic tumor"]
    assert row == {"dice": 0.5, "present_count": 2, "sensitivity": 0.5, "absent_count": 2, "specificity": 0.5}
    assert "hepatic tumor: Dice 0.5, sensitivity 0.5 (2 cases), specificity 0.5 (2 cases)" in capsys.readouterr().out
