"""Conversations made by the nano experts, on phantoms and on real studies, pass validation."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from vila_m3.data.checks import RowChecks
from vila_m3.data.experts import DATA_SETS
from vila_m3.data.experts.labels import read_label_table
from vila_m3.data.prepare import prepare
from vila_m3.data.record import Message, Record, format_row, parse_row
from vila_m3.data.sources.cxr_expert import read_with_predictions
from vila_m3.data.validation import Validator, validate_file
from vila_m3.questions import is_held_out
from vila_m3_common import phantoms
from vila_m3_common.anatomy import GROUPS, NAMES, TUMORS
from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest, ExpertResult
from vila_m3_common.hooks import BundleExpert
from vila_m3_common.slices import take_slice, window_ct
from vila_m3_composite import expert_data
from vila_m3_composite.expert_data import Settings, make_expert_data
from vila_m3_composite.expert_predictions import save_predictions
from vila_m3_composite.expert_studies import Segmentation, centre_slices, ras_volume, run_expert, segment, spread_slices

ROOT = Path(__file__).parents[2]
BUNDLE = str(ROOT / "bundles/vila_m3_with_experts")
CARDS = (ROOT / "vila_m3_bundle/configs/model_cards.txt").read_text()
FOLDERS = {"CT": "expert_vista3d", "MRI": "expert_brats", "CXR": "expert_cxr"}


def make(folder: Path, modality: str, cases: list[list[str]], **settings: Any) -> list[Record]:
    """Make conversations; every one must pass validation."""
    make_expert_data(
        {modality: cases}, str(folder), BUNDLE, [str(ROOT / FOLDERS[modality])], Settings(CARDS, **settings)
    )
    name = f"{DATA_SETS[modality]}_{settings.get('split', 'train')}"
    summary = validate_file(
        folder / f"{name}.jsonl", Validator(folder / DATA_SETS[modality], CARDS), folder / "validated"
    )
    assert summary["dropped"] == {}
    return [parse_row(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def refused(folder: Path, name: str) -> list[tuple[int, str]]:
    lines = (folder / f"{name}.rejected.jsonl").read_text().splitlines()
    return [(row["row"], row["reason"]) for row in map(json.loads, lines)]


def kinds(records: list[Record]) -> list[str]:
    return [record.metadata["question_type"] for record in records]


def test_data_sets_have_the_names_of_the_mixture() -> None:
    mixture = json.loads((ROOT / "vila_m3_bundle/configs/mixture_m3.json").read_text())["data_sets"]
    for modality in ("CT", "MRI"):
        name = DATA_SETS[modality]
        assert mixture[name]["files"] == [f"{name}_train.jsonl"]
        assert mixture[name]["images"] == name


class TruthfulExpert:
    """Gives the phantom's ground truth, as the CT expert gives its label map."""

    def __init__(self, phantom: phantoms.VolumePhantom) -> None:
        self.phantom = phantom
        self.arguments: list[str] = []

    def run(self, request: ExpertRequest) -> ExpertResult:
        self.arguments.append(request.argument)
        labels = np.where(np.isin(self.phantom.labels, GROUPS[request.argument]), self.phantom.labels, 0)
        path = request.file("_labels.nii.gz")
        nib.save(nib.Nifti1Image(labels.astype(np.uint8), self.phantom.affine), path)
        rows = [{"name": NAMES[label], "label": int(label)} for label in np.unique(labels) if label]
        return ExpertResult("", label_map_path=path, measurements=rows)

    def close(self) -> None:
        pass


@pytest.fixture
def truthful(ct_phantom: phantoms.VolumePhantom, monkeypatch: pytest.MonkeyPatch) -> TruthfulExpert:
    expert = TruthfulExpert(ct_phantom)
    monkeypatch.setattr(expert_data, "open_experts", lambda *_: {"VISTA3D": expert})
    return expert


def test_ct_is_asked_for_structures_tumours_and_a_segmentation(
    truthful: TruthfulExpert, ct_file: Path, tmp_path: Path
) -> None:
    arguments = ["organs", "hepatic tumor", "lung tumor"]
    records = make(tmp_path, "CT", [[str(ct_file)]], arguments=arguments, slices=2)
    asked = [record for record in records if record.metadata["question_type"] == "tumor"]
    assert len(asked) == 4
    assert asked[0].messages[1].text.endswith("<VISTA3D(hepatic tumor)>. ")
    assert [record.messages[3].text for record in asked] == ["yes", "yes", "no", "no"]
    label = TUMORS["hepatic tumor"]
    areas = (truthful.phantom.labels == label).sum(axis=(0, 1))
    for record, index in zip(asked, spread_slices(areas, 2), strict=False):
        count = ndimage.label(truthful.phantom.labels[:, :, index] == label, np.ones((3, 3)))[1]
        assert record.messages[5].text == f"There are {count} hepatic tumor{'s' if count > 1 else ''}."
    assert kinds(records).count("segment") == 6
    assert kinds(records).count("describe") == 2
    assert truthful.arguments == arguments, "one run for each argument, not for each question"
    assert all(not is_held_out(record.messages[0].text.rsplit("\n", 1)[1]) for record in records)


def test_every_argument_is_asked_with_and_what_is_not_there_is_filed(
    truthful: TruthfulExpert, ct_file: Path, tmp_path: Path
) -> None:
    questions = {"CT": ["describe", "tumor"]}
    records = make(tmp_path, "CT", [[str(ct_file)]], questions=questions, split="test")
    assert set(truthful.arguments) == set(GROUPS)
    assert kinds(records).count("tumor") == 4
    reasons = [reason for _, reason in refused(tmp_path, "expert_vista3d_test")]
    assert len(records) + len(reasons) == 10
    assert all(reason.startswith("the expert found nothing of ") for reason in reasons)


def test_a_slice_is_drawn_and_named_as_the_expert_does(tmp_path: Path) -> None:
    phantom = phantoms.ct_phantom(seed=7001, shape=(40, 36, 32), spacing=3.0)
    path = str(phantoms.save_volume(phantom.image, phantom.affine, tmp_path / "ct.nii.gz"))
    expert = BundleExpert(ROOT / "expert_vista3d")
    try:
        found = segment(expert, [path], tmp_path, "organs")
        index = int(np.argmax((found.labels > 0).sum(axis=(0, 1))))
        own = expert.run(ExpertRequest((path,), "organs", index, 2, "", str(tmp_path), "own"))
    finally:
        expert.close()
    grey = window_ct(take_slice(ras_volume(path), index))
    assert found.labels.any()
    np.testing.assert_array_equal(found.overlay(grey, index), own.images[0])
    assert dict(found.legend(index)) == own.legend


def test_mri_is_graded_where_the_path_tells(mri_folder: Path, tmp_path: Path) -> None:
    names = ("t1c", "t1n", "t2w", "t2f")
    (tmp_path / "HGG").symlink_to(mri_folder)
    told, untold = ([str(folder / f"{name}.nii.gz") for name in names] for folder in (tmp_path / "HGG", mri_folder))
    records = make(tmp_path / "out", "MRI", [told, untold], contrast_only=True)
    assert kinds(records) == ["describe", "grade", "segment", "describe", "segment"]
    assert records[1].messages[-1].text == "The scan indicates high grade glioma."
    assert refused(tmp_path / "out", "expert_brats_train") == [
        (2, "the path names neither LGG nor HGG; keep the folders of the BraTS release")
    ]
    assert [len(record.images) for record in records] == [4, 5, 5, 4, 5]
    assert {len(set(record.images[:4])) for record in records} == {1}, "T1c stands in all four places"


@pytest.fixture
def radiographs(cxr_file: Path, tmp_path: Path) -> list[list[str]]:
    """A good one and one that is cut off."""
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(cxr_file.read_bytes())
    bad.write_bytes(cxr_file.read_bytes()[:300])
    return [[str(good)], [str(bad)]]


def test_unreadable_studies_are_filed_and_stop_nothing(radiographs: list[list[str]], tmp_path: Path) -> None:
    records = make(tmp_path, "CXR", radiographs[::-1], split="test")
    assert kinds(records) == ["multilabel", "binary"]
    assert {record.metadata["truth"] for record in records} == {"expert"}
    assert all(is_held_out(record.messages[0].text.rsplit("\n", 1)[1]) for record in records)
    rows = refused(tmp_path, "expert_cxr_test")
    assert [row for row, _ in rows] == [1, 1]
    assert "cannot be read" in rows[0][1] or "bad.png" in rows[0][1]


def test_an_expert_that_failed_reads_the_next_image(radiographs: list[list[str]], tmp_path: Path) -> None:
    expert = BundleExpert(ROOT / "expert_cxr")
    try:
        first = run_expert(expert, radiographs[0], tmp_path, "").scores
        with pytest.raises(UserError, match="bad.png cannot be read"):
            run_expert(expert, radiographs[1], tmp_path, "")
        assert run_expert(expert, radiographs[0], tmp_path, "").scores == first
    finally:
        expert.close()


def test_a_label_table_is_the_truth_in_place_of_the_expert(radiographs: list[list[str]], tmp_path: Path) -> None:
    table = tmp_path / "labels.csv"
    table.write_text("Image Index,Finding Labels\ngood.png,Hernia|Mass\nx.png,No Finding\nbroken\n")
    labels = {"file": str(table), "image_column": "Image Index", "findings_column": "Finding Labels"}
    other = tmp_path / "other.png"
    other.write_bytes(Path(radiographs[0][0]).read_bytes())
    records = make(tmp_path / "out", "CXR", [radiographs[0], [str(other)]], labels=labels)
    assert records[0].messages[-1].text == "Findings: hernia, mass."
    assert records[1].messages[-1].text == "yes"
    assert {record.metadata["truth"] for record in records} == {"labels"}
    assert refused(tmp_path / "out", "expert_cxr_train") == [
        (3, "has 1 fields, the header has 2; the file may be cut off"),
        *[(2, "the image has no labels in the label table")] * 2,
    ]


def test_label_tables_of_both_layouts_are_read(tmp_path: Path) -> None:
    (tmp_path / "wide.csv").write_text("image,Edema,Pleural Effusion,Sex\na.png,1.0,0,F\nb.png,-1.0,,M\n")
    assert read_label_table(tmp_path / "wide.csv") == ({"a.png": {"Edema": True, "Effusion": False}, "b.png": {}}, [])
    (tmp_path / "none.csv").write_text("image,Sex\na.png,F\n")
    with pytest.raises(UserError, match="names no finding that the expert knows"):
        read_label_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match="or null to take the expert's predictions"):
        read_label_table(tmp_path / "absent.csv")


def test_a_killed_run_goes_on_with_the_next_question(
    radiographs: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [radiographs[0], radiographs[1], radiographs[0]]
    make(tmp_path / "whole", "CXR", cases)
    asked: list[str] = []
    real: Callable[..., Record] = expert_data._ask_cxr

    def counted(study: Any, kind: str, rng: random.Random) -> Record:
        asked.append(f"{study.name}_{kind}")
        if len(asked) == 5:
            raise KeyboardInterrupt
        return real(study, kind, rng)

    monkeypatch.setattr(expert_data, "_ask_cxr", counted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "resumed", "CXR", cases)
    make(tmp_path / "resumed", "CXR", cases)
    assert asked[4:] == ["cxr_00002_multilabel", "cxr_00002_multilabel", "cxr_00002_binary"]
    for name in ("expert_cxr_train.jsonl", "expert_cxr_train.rejected.jsonl", "expert_cxr_train.summary.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "resumed" / name).read_bytes()


def test_reports_and_questions_get_the_experts_predictions(radiographs: list[list[str]], tmp_path: Path) -> None:
    question = (Message("user", "<image>\nDescribe the image in detail."), Message("assistant", "Large heart."))
    rows = [Record(str(k), question, (f"{name}.png",)) for k, name in enumerate(("good", "bad", "good"))]
    rows.append(Record("4", (Message("user", "<image>\n<image>\nWhat changed?"), question[1]), ("good.png",) * 2))
    (tmp_path / "mimic_report_train.jsonl").write_text("".join(f"{format_row(row)}\n" for row in rows))
    file, saved = str(tmp_path / "mimic_report_train.jsonl"), tmp_path / "predictions"
    save_predictions([file], str(tmp_path), str(saved), BUNDLE, str(ROOT / "expert_cxr"))
    assert len(json.loads((saved / "good.png.json").read_text())) == 18
    [line] = map(json.loads, (saved / "rejected.jsonl").read_text().splitlines())
    assert (line["file"], line["row"]) == ("mimic_report_train.jsonl", 2)

    source = read_with_predictions(tmp_path, "train", "mimic_report", saved, CARDS, "mimic_report_expert")
    prepare(source, "mimic_report_expert", "train", tmp_path / "out", RowChecks(tmp_path))
    output = tmp_path / "out/mimic_report_expert_train.jsonl"
    first = parse_row(output.read_text().splitlines()[0])
    assert [message.role for message in first.messages] == ["user", "assistant", "expert", "assistant"]
    assert first.messages[-1].text == "Large heart."
    assert first.metadata["dataset"] == "mimic_report_expert"
    reasons = refused(tmp_path / "out", "mimic_report_expert_train")
    assert [row for row, _ in reasons] == [2, 4]
    assert "run the expert on the image" in reasons[0][1]
    assert "shows 2 images" in reasons[1][1]
    assert validate_file(output, Validator(tmp_path, CARDS), tmp_path / "validated")["dropped"] == {"duplicate": 1}


def test_predictions_that_are_there_are_not_made_again(radiographs: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(
        format_row(Record("1", (Message("user", "<image>"), Message("assistant", "a")), ("good.png",)))
    )
    (tmp_path / "p").mkdir()
    (tmp_path / "p/good.png.json").write_text("{}")
    save_predictions([str(tmp_path / "d.jsonl")], str(tmp_path), str(tmp_path / "p"), BUNDLE, str(ROOT / "expert_cxr"))
    assert (tmp_path / "p/good.png.json").read_text() == "{}"


def test_without_files_every_film_of_the_folder_is_predicted(radiographs: list[list[str]], tmp_path: Path) -> None:
    save_predictions([], str(tmp_path), str(tmp_path / "p"), BUNDLE, str(ROOT / "expert_cxr"))
    assert len(json.loads((tmp_path / "p/good.png.json").read_text())) == 18
    with pytest.raises(SystemExit, match="holds no films"):
        save_predictions([], str(tmp_path / "none"), str(tmp_path / "q"), BUNDLE, str(ROOT / "expert_cxr"))


def test_slices_are_spread_over_what_is_found_or_the_volume() -> None:
    assert spread_slices(np.zeros(10), 1) == [5]
    assert spread_slices(np.zeros(10), 2) == [2, 7]
    assert spread_slices(np.array([0, 0, 3, 9, 1, 1, 5, 0]), 1) == [3]
    assert spread_slices(np.array([0, 0, 3, 9, 1, 1, 5, 0]), 2) == [3, 6]
    assert spread_slices(np.array([0, 4]), 5) == [1]


def test_the_reference_exports_the_centre_of_every_part_larger_than_a_millilitre() -> None:
    labels = np.zeros((20, 20, 40), np.uint8)
    labels[2:12, 2:12, 4:15] = 1  # 1100 mm3, centre at 9
    labels[2:12, 2:12, 20:31] = 1  # centre at 25
    labels[0:2, 0:2, 35:38] = 2  # 12 mm3
    found = Segmentation(labels, {1: "liver"}, voxel_ml=0.001)
    assert centre_slices(found) == [9, 25]
    assert found.count_parts(9, 1) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slices": 0}, "neither a number from 1 on nor 'reference'"),
        ({"slices": "all"}, "neither a number from 1 on nor 'reference'"),
        ({"questions": {"CT": ["tumour"]}}, "did you mean 'tumor'"),
        ({"questions": {"PET": []}}, "unknown modality 'PET'"),
        ({"arguments": ["hepatic tumour"]}, "did you mean 'hepatic tumor'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Settings(CARDS, **settings)


def test_an_unknown_modality_and_a_missing_expert_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="unknown modality 'PET'"):
        make_expert_data({"PET": []}, str(tmp_path), BUNDLE, [], Settings(CARDS))
    with pytest.raises(SystemExit, match="no bundle gives the expert BRATS"):
        make_expert_data({"MRI": [["a"]]}, str(tmp_path), BUNDLE, [], Settings(CARDS))


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_real_radiograph_gives_valid_conversations(shared: Path, tmp_path: Path) -> None:
    folder = shared / "data/cxr/nih_256"
    cases = [[str(path)] for path in sorted(folder.rglob("*.png"))]
    labels = {
        "file": str(folder / "labels.csv"),
        "image_column": "Image Index",
        "findings_column": "Finding Labels",
    }
    assert len(make(tmp_path / "expert", "CXR", cases)) == 2 * len(cases)
    assert len(make(tmp_path / "labels", "CXR", cases, labels=labels)) == 2 * len(cases)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_real_ct_gives_valid_conversations(shared: Path, tmp_path: Path) -> None:
    scans = ("example_ct.nii.gz", "example_ct_dicom", "aorta_ct_1.5mm.nii.gz")
    records = make(tmp_path, "CT", [[str(shared / "data/ct" / name)] for name in scans])
    assert {record.metadata["question_type"] for record in records} == {"describe", "tumor", "segment"}
    assert len(records) + len(refused(tmp_path, "expert_vista3d_train")) == 20 * len(scans)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_real_brain_mri_gives_valid_conversations(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "HGG").symlink_to(shared / "data/mri/brats_gli_00001")
    sequences = [str(tmp_path / f"HGG/{name}.nii.gz") for name in ("t1c", "t1n", "t2w", "t2f")]
    records = make(tmp_path / "out", "MRI", [sequences], slices=2)
    assert kinds(records) == ["describe", "grade", "segment"] * 2
