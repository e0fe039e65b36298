import json

import numpy as np
import pytest
from PIL import Image

from cxr_expert.data import (
    PHANTOM_SEEDS,
    add_related,
    evaluation_items,
    label_vector,
    phantom_label,
    read_labels_csv,
    split_by_patient,
    trained_targets,
    training_items,
    write_phantoms,
)
from vila_m3_common.errors import UserError
from vila_m3_common.prompts import CXR_FINDINGS

HEADER = "Image Index,Finding Labels,Patient ID,View Position\n"


def value(label, finding):
    return label[CXR_FINDINGS.index(finding)]


@pytest.fixture
def pictures(tmp_path):
    """A folder with six pictures of three patients and their CSV."""
    rows = []
    for index, finding in enumerate(["No Finding", "Mass|Effusion", "Mass", "Nodule", "No Finding", "Edema"]):
        name = f"{index}.png"
        Image.new("L", (8, 8), index).save(tmp_path / name)
        rows.append(f"{name},{finding},{index // 2},PA\n")
    (tmp_path / "labels.csv").write_text(HEADER + "".join(rows) + "absent.png,Mass,9,PA\n")
    return tmp_path


def test_phantom_label_adds_what_follows_and_the_rest_is_absent():
    label = phantom_label(["Nodule"])
    assert (value(label, "Nodule"), value(label, "Lung Lesion"), value(label, "Lung Opacity")) == (1, 1, 1)
    assert (value(label, "Mass"), value(label, "Effusion"), value(label, "Hernia")) == (0, 0, 0)
    assert value(label, "Pneumonia") == 0
    assert np.isnan(value(label, "Fracture"))


def test_phantom_with_an_opacity_may_show_what_else_it_could_be_called():
    label = phantom_label(["Consolidation"])
    assert np.isnan([value(label, name) for name in ("Infiltration", "Pneumonia", "Atelectasis")]).all()


def test_related_findings_follow_from_known_ones_only():
    label = add_related(label_vector(["Mass", "Nodule", "Effusion"], ["Mass"]))
    assert (value(label, "Lung Lesion"), value(label, "Lung Opacity")) == (1, 1)
    label = add_related(label_vector(["Mass", "Nodule", "Effusion"], ["Effusion"]))
    assert (value(label, "Lung Lesion"), value(label, "Lung Opacity")) == (0, 0)
    label = add_related(label_vector(["Effusion", "Lung Lesion"], ["Lung Lesion"]))
    assert value(label, "Lung Lesion") == 1
    assert np.isnan(value(label, "Lung Opacity"))


def test_phantoms_of_the_sections_have_different_seeds(tmp_path):
    names = [{item["image"] for item in write_phantoms(tmp_path, section, 2)} for section in PHANTOM_SEEDS]
    assert len(set.union(*names)) == 6


def test_phantoms_are_drawn_once(tmp_path):
    first = write_phantoms(tmp_path, "testing", 2)
    stamp = (tmp_path / "phantoms" / "testing" / "2000000.png").stat().st_mtime_ns
    again = write_phantoms(tmp_path, "testing", 3)
    assert (tmp_path / "phantoms" / "testing" / "2000000.png").stat().st_mtime_ns == stamp
    assert [item["image"] for item in again[:2]] == [item["image"] for item in first]
    np.testing.assert_array_equal(again[1]["label"], first[1]["label"])


def test_targets_are_the_findings_with_a_yes_and_a_no():
    items = [{"label": label_vector(["Mass", "Edema"], present)} for present in (["Mass"], [])]
    assert [name for name in trained_targets(items) if name] == ["Mass"]


def test_csv_gives_the_nih_findings_and_leaves_the_other_four_unknown(pictures):
    items = read_labels_csv(pictures, pictures / "labels.csv")
    assert [item["patient"] for item in items] == ["0", "0", "1", "1", "2", "2"]
    assert (value(items[1]["label"], "Mass"), value(items[1]["label"], "Effusion")) == (1, 1)
    assert np.nansum(items[0]["label"]) == 0
    assert np.isnan(items[0]["label"]).tolist() == [False] * 14 + [True] * 4


def test_real_nih_csv_is_read_and_split_by_patient(shared):
    folder = shared / "data" / "cxr" / "nih_256"
    items = read_labels_csv(folder, folder / "labels.csv")
    parts = split_by_patient(items, 0.2)
    patients = {name: {item["patient"] for item in part} for name, part in parts.items()}
    assert len(items) == 815
    assert not patients["training"] & patients["validation"]
    assert 0.1 < len(parts["validation"]) / len(items) < 0.3


def test_evaluation_takes_every_patient_or_the_kept_ones(pictures):
    csv = str(pictures / "labels.csv")
    every = evaluation_items("", 0, str(pictures), csv)
    kept = evaluation_items("", 0, str(pictures), csv, val_fraction=0.5)
    training = training_items("", {}, str(pictures), csv, val_fraction=0.5)
    assert len(every) == 6
    assert [item["image"] for item in kept] == [item["image"] for item in training["validation"]]


def test_training_repeats_the_rows_mixes_phantoms_in_and_validates_on_rows_alone(pictures):
    csv = str(pictures / "labels.csv")
    options = {"csv_repeats": 2, "mixes_phantoms": True}
    parts = training_items(str(pictures / "data"), {"training": 3, "validation": 3}, str(pictures), csv, 0.5, **options)
    drawn = [item for item in parts["training"] if "phantoms" in item["image"]]
    rows = [item for item in parts["training"] if "phantoms" not in item["image"]]
    assert len(drawn) == 3
    assert len(rows) == 2 * (6 - len(parts["validation"]))
    assert not {item["image"] for item in rows} & {item["image"] for item in parts["validation"]}
    assert {tuple(sorted(item)) for item in parts["training"]} == {("image", "label")}
    assert not np.isnan([value(item["label"], "Lung Lesion") for item in rows]).any()
    assert np.isnan([value(item["label"], "Lung Lesion") for item in parts["validation"]]).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Image Index,Patient ID\n", r"labels.csv lacks the columns \['Finding Labels'\]"),
        (HEADER + "0.png,Efusion,1,PA\n", "unknown finding 'Efusion' in labels.csv; did you mean 'Effusion'"),
        (HEADER + "absent.png,Mass,1,PA\n", "none of the 1 pictures of labels.csv lies in .*; check data_root"),
    ],
)
def test_unusable_csv_is_explained(pictures, text, message):
    (pictures / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_labels_csv(pictures, pictures / "labels.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels_csv": "labels.csv"}, "^error: labels_csv was given without data_root"),
        ({"labels_csv": "nowhere.csv", "data_root": "."}, "^error: labels_csv nowhere.csv does not exist"),
    ],
)
def test_mistakes_in_the_options_end_the_command(arguments, message):
    with pytest.raises(SystemExit, match=message):
        training_items("", {}, **arguments)


def test_split_that_leaves_nothing_is_refused(pictures):
    with pytest.raises(SystemExit, match="val_fraction 0.0 leaves no picture for validation; choose another"):
        training_items("", {}, str(pictures), str(pictures / "labels.csv"), val_fraction=0.0)


def test_datalist_of_the_user_takes_the_place_of_phantoms(pictures):
    entry = {"image": "1.png", "label": {"Mass": 1, "Edema": 0}}
    (pictures / "datalist.json").write_text(json.dumps({"training": [entry], "validation": [entry]}))
    items = training_items(str(pictures), {"training": 5, "validation": 5})
    assert [len(part) for part in items.values()] == [1, 1]
    label = items["training"][0]["label"]
    assert (value(label, "Mass"), value(label, "Edema")) == (1, 0)
    assert np.isnan(value(label, "Nodule"))
    assert evaluation_items(str(pictures), 5)[0]["image"] == str(pictures / "1.png")
    assert not (pictures / "phantoms").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "datalist.json is not valid JSON"),
        ('{"training": []}', "has no section 'training'"),
        ('{"training": [{"image": "x.png", "label": {}}]}', "names x.png, which does not exist"),
        ('{"training": [{"image": "1.png", "label": {"Lump": 1}}]}', "unknown finding 'Lump' in datalist.json"),
    ],
)
def test_unusable_datalist_is_explained(pictures, text, message):
    (pictures / "datalist.json").write_text(text)
    with pytest.raises(SystemExit, match=message):
        training_items(str(pictures), {})
