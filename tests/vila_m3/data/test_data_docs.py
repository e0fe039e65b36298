"""Overlays and the page's commands work on small copies of each release's layout, through the bundle's configs."""

import base64
import json
import pickle
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import fire
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from answering_server import Server
from monai.bundle import ConfigParser, run
from PIL import Image

from vila_m3.data.mixture import Mixture
from vila_m3.data.record import parse_row
from vila_m3.data.sources.pathvqa import read_plain_pickle
from vila_m3_common import phantoms

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "vila_m3_bundle/configs"
SLAKE = {"img_id": 1, "img_name": "x/a.jpg", "question": "What?", "answer": "CT", "q_lang": "en"}
RAD = {
    "phrase_type": "test_freeform",
    "image_name": "a.jpg",
    "question": "Q?",
    "answer": "yes",
    "answer_type": "CLOSED",
    "image_organ": "CHEST",
}
RAD_TRAIN = {**RAD, "phrase_type": "freeform"}
VQA = {"subject_id": 10000001, "study_id": 5, "image_id": "d", "question": "Q?", "answer": ["edema", "mass"]}
USMLE = '{"question": "Q?", "options": {"A": "a", "B": "b"}, "answer_idx": "B"}\n'
CSV = "mimic-cxr-2.0.0-"
MIMIC = "files/p10/p10000001/s5"


def mimic_reports(split: str) -> dict[str, Any]:
    return {
        f"{CSV}split.csv": f"dicom_id,study_id,subject_id,split\nd,5,10000001,{split}\n",
        f"{CSV}metadata.csv": "dicom_id,ViewPosition\nd,PA\n",
        f"{CSV}chexpert.csv": "subject_id,study_id,Edema\n10000001,5,1.0\n",
        f"{MIMIC}.txt": "INDICATION: Pain.\n\nFINDINGS: Mild\n edema.\n\nIMPRESSION: Edema.\n",
        f"{MIMIC}/d.jpg": None,
    }


def medical_diff_vqa(split: str) -> dict[str, Any]:
    return {
        "mimic_all.csv": "subject_id,study_id,dicom_id\n10000001,5,d\n",
        "mimic_pair_questions.csv": "study_id,subject_id,ref_id,question_type,question,answer,split\n"
        f"5,10000001,4,view,which view?,ap view,{split}\n",
        f"{MIMIC}/d.jpg": None,
    }


def picture(seed: int = 0, side: int = 64) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8), np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC).convert("RGB")


def parquet(name: str) -> pa.Table:
    """A shard of PathVQA."""
    with Path(name).open("wb") as file:
        picture().save(file, format="PNG")
    data = Path(name).read_bytes()
    Path(name).unlink()
    return pa.table({"image": [{"bytes": data, "path": "p.jpg"}], "question": ["Q?"], "answer": ["yes"]})


PREDICTED = {"id": "r", "image": "d.jpg", "conversations": [{"from": "human", "value": "<image>\nDescribe."}]}
PREDICTED["conversations"].append({"from": "gpt", "value": "Clear."})  # type: ignore[attr-defined]
PICKLED = {"sent": "Q?", "img_id": "i", "label": {"no": 1}, "question_id": "7", "answer_type": "yes/no"}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "slake": ("test", {"test.json": [SLAKE], "imgs/x/a.jpg": None}),
    "slake_choice": ("test", {"test.json": [{**SLAKE, "content_type": "KG"}]}),
    "vqa_rad": ("test", {"VQA_RAD_Dataset_Public.json": [RAD], "images/a.jpg": None}),
    "vqa_rad+vqa_rad_all": ("test", {"VQA_RAD_Dataset_Public.json": [RAD], "images/a.jpg": None}),
    "pathvqa": ("test", {f"{part}-00000-of-00001-ab.parquet": parquet for part in ("train", "validation", "test")}),
    "pathvqa_pickle": ("test", {"qas/test_vqa.pkl": pickle.dumps([PICKLED]), "images/test/i.jpg": None}),
    "mimic_cxr_vqa": ("test", {"test.json": [VQA], f"{MIMIC}/d.jpg": None}),
    "medical_diff_vqa": ("test", medical_diff_vqa("test")),
    "mimic_report": ("test", mimic_reports("test")),
    "mimic_annotated": (
        "train",
        {
            "mimic_annotation.json": {"train": [{"image_path": ["p10/d.jpg"], "subject_id": 1, "study_id": 2}]},
            "report_new/d.txt": "Clear lungs.",
            "images/p10/d.jpg": None,
        },
    ),
    "mimic_report_expert": (
        "train",
        {"mimic_report_train.jsonl": PREDICTED, "d.jpg": None, "predictions/d.jpg.json": {"Edema": 0.7}},
    ),
    "mimic_report_expert+expert_mimic_vqa": (
        "train",
        {"medical_diff_vqa_train.jsonl": PREDICTED, "d.jpg": None, "predictions/d.jpg.json": {"Edema": 0.7}},
    ),
    "usmle": ("test", {"test.jsonl": USMLE}),
    "table": ("test", {"questions.csv": "image,question,answer\nscan/a.png,Q?,yes\n", "scan/a.png": None}),
    "nih": (
        "train",
        {"labels.csv": "Image Index,Finding Labels,Patient ID\na.png,Mass|Effusion,1\n", "a.png": None},
    ),
    "phantom": ("train", {}),
    "phantom_forms": ("train", {}),
    "phantom_structures": ("train", {}),
    "phantom_findings": ("train", {}),
    "without_expert": ("train", {"phantom_train.jsonl": PREDICTED, "d.jpg": None}),
    "openi": ("all", {"1.xml": '<e><uId id="C1"/><AbstractText Label="FINDINGS">Clear.</AbstractText></e>'}),
}
# What makes one row where there would be more.
ONE_ROW = {
    "nih": {"row_limit": 1},
    **dict.fromkeys(
        ("phantom", "phantom_forms", "phantom_structures", "phantom_findings"),
        {"row_limit": 1, "options#volume_count": 1},
    ),
}
ANSWERS = {
    "nih": "no",
    "phantom": "This is a chest x-ray.",
    "phantom_forms": "no",
    "phantom_structures": "This a CT image. It contains several anatomical structures such as identified by VISTA3D: "
    "red: liver, blue: spleen, yellow: left lung lower lobe, magenta: right lung lower lobe, green: spinal cord.",
    "phantom_findings": "no",
    "without_expert": "Clear.",
    "slake": "CT",
    "slake_choice": "A. CT",
    "vqa_rad": "yes",
    "vqa_rad_all": "yes",
    "pathvqa": "yes",
    "pathvqa_pickle": "no",
    "mimic_cxr_vqa": "edema, mass",
    "medical_diff_vqa": "ap view",
    "mimic_report": "Mild edema. Edema.",
    "mimic_annotated": "Clear lungs.",
    "mimic_report_expert": "Clear.",
    "expert_mimic_vqa": "Clear.",
    "usmle": "B. b",
    "table": "yes",
    "openi": "Clear.",
}


def write_layout(folder: Path, files: dict[str, Any]) -> None:
    """Write a release: None is a picture, bytes and texts are contents, a function makes a table, others are JSON."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            picture(len(name)).save(path)
        elif callable(content):
            pq.write_table(content(str(path)), path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_every_overlay_has_a_layout_below() -> None:
    overlays = {path.stem for path in (CONFIGS / "data").glob("*.json")}
    assert overlays == {name for names in LAYOUTS for name in names.split("+")} == set(ANSWERS)


@pytest.mark.parametrize("names", LAYOUTS)
def test_documented_overlay_converts_a_small_release(tmp_path: Path, names: str) -> None:
    split, files = LAYOUTS[names]
    write_layout(tmp_path / "in", files)
    parser = ConfigParser()
    overlays = names.split("+")
    parser.read_config([str(CONFIGS / "prepare_data.json"), *(str(CONFIGS / f"data/{name}.json") for name in overlays)])
    own = {"predictions": str(tmp_path / "in/predictions")} if "predictions" in parser.config else {}
    parser.update({"source": str(tmp_path / "in"), "split": split, "output_dir": str(tmp_path / "out"), **own})
    parser.update(ONE_ROW.get(names, {}))
    (tmp_path / "in").mkdir(exist_ok=True)
    parser.get_parsed_content("run")
    [output] = (tmp_path / "out").glob(f"*_{split}.jsonl")
    assert output.name == f"{parser.config['dataset']}_{split}.jsonl"
    summary = json.loads(output.with_suffix(".summary.json").read_text())
    assert (summary["written"], summary["rejected"]) == (1, 0)
    assert json.loads(output.read_text())["conversations"][-1]["value"] == ANSWERS[overlays[-1]]
    assert f"`{overlays[-1]}.json`" in (ROOT / "vila_m3_bundle/docs/data.md").read_text()


def test_a_report_file_of_the_original_shows_the_images_of_the_rows(shared: Path, tmp_path: Path) -> None:
    folder = shared / "golden/data_eval/1_data_preparation/report"
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "prepare_data.json"), str(CONFIGS / "data/mimic_annotated.json")])
    parser.update({"source": str(folder / "input"), "output_dir": str(tmp_path)})
    parser.get_parsed_content("run")
    rows = [parse_row(line) for line in (tmp_path / "mimic_annotated_train.jsonl").read_text().splitlines()]
    recorded = read_plain_pickle(folder / "output/captioning_mimic_train.pkl")
    assert len(rows) == len(recorded)
    for row, item in zip(rows, recorded, strict=True):
        assert row.messages[1].text == item["answer"]
        images = [(folder / "input/images" / name).read_bytes() for name in row.images]
        assert images == [base64.b64decode(text) for text in item["image"]]


def write_releases(data: Path) -> None:
    """What the page says to unpack below ``data``, and files of the user's own."""
    rows = [{**SLAKE, "img_id": number, "img_name": f"{number}.jpg"} for number in range(3)]
    parts = {f"{part}.json": [row] for part, row in zip(("train", "test", "validate"), rows, strict=True)}
    write_layout(data / "slake", {**parts, "imgs/0.jpg": None})
    for number in (1, 2):
        picture(98 + number).save(data / f"slake/imgs/{number}.jpg")
    write_layout(data / "vqa_rad", {"VQA_RAD_Dataset_Public.json": [RAD_TRAIN], "images/a.jpg": None})
    write_layout(data / "pathvqa", {f"{part}-00000-of-00001-ab.parquet": parquet for part in ("train", "validation")})
    write_layout(data / "usmle", {"train.jsonl": USMLE})
    write_layout(data / "mimic_cxr", {**mimic_reports("train"), **medical_diff_vqa("train")})
    write_layout(data / "mine", {"questions.csv": "image,prompt,answer\na.png,Q?,yes\n", "a.png": None})
    labels = "Image Index,Finding Labels\na.png,Mass\nb.png,No Finding\n"
    write_layout(data / "cxr", {"a.png": None, "b.png": None, "labels.csv": labels})
    (data / "sentences.txt").write_text("The lungs are clear.\n")
    phantom = phantoms.ct_phantom(seed=7001, shape=(24, 22, 20), spacing=3.0)
    (data / "ct").mkdir()
    phantoms.save_volume(phantom.image, phantom.affine, data / "ct/scan.nii.gz")


def documented_commands() -> list[list[str]]:
    text = (ROOT / "vila_m3_bundle/docs/data.md").read_text().replace("\\\n", " ")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_commands_of_the_page_lead_from_releases_to_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answering_server: Server
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    for folder in ("vila_m3_bundle", "bundles", "expert_vista3d", "expert_brats", "expert_cxr"):
        Path(folder).symlink_to(ROOT / folder)
    write_releases(Path("data"))
    commands = documented_commands()
    assert len(commands) > 12
    for command in commands:
        assert command[:4] == ["python", "-m", "monai.bundle", "run"]
        arguments = [answering_server.url if word == "http://localhost:8000/v1" else word for word in command[4:]]
        fire.Fire(run, command=arguments)
    summaries = {path.name.removesuffix(".summary.json"): path for path in Path("data").glob("*.summary.json")}
    written = {name: json.loads(path.read_text())["written"] for name, path in summaries.items()}
    assert all(written.values()), written
    mixture = Mixture(json.loads((CONFIGS / "mixture_m3.json").read_text())["data_sets"], "data", missing="skip")
    assert mixture.skipped == ["expert_brats"]
    for index in range(len(mixture)):
        assert mixture[index].conversation().turns
    assert Path("data/mixture_report/mixture.png").is_file()
    dropped = [json.loads(path.read_text())["dropped"] for path in Path("data/validated").glob("*.validation.json")]
    assert dropped == [{}] * 4
    assert json.loads(Path("data/leaks.json").read_text())[0]["same_images"] == 0
