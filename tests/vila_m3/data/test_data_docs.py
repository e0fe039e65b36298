"""The documented command works on small copies of each release's layout, through the bundle's configs."""

import json
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser
from PIL import Image

SLAKE = {"img_id": 1, "img_name": "x/a.jpg", "question": "What?", "answer": "CT", "q_lang": "en"}
RAD = {
    "phrase_type": "test_freeform",
    "image_name": "a.jpg",
    "question": "Q?",
    "answer": "yes",
    "answer_type": "CLOSED",
}
VQA = {"subject_id": 10000001, "study_id": 5, "image_id": "d", "question": "Q?", "answer": ["edema", "mass"]}
CSV = "mimic-cxr-2.0.0-"
MIMIC = "files/p10/p10000001/s5"
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "slake": ("test", {"test.json": [SLAKE], "imgs/x/a.jpg": None}),
    "vqa_rad": ("test", {"VQA_RAD_Dataset_Public.json": [RAD], "images/a.jpg": None}),
    "mimic_cxr_vqa": ("test", {"test.json": [VQA], f"{MIMIC}/d.jpg": None}),
    "medical_diff_vqa": (
        "test",
        {
            "mimic_all.csv": "subject_id,study_id,dicom_id\n10000001,5,d\n",
            "mimic_pair_questions.csv": "study_id,subject_id,ref_id,question_type,question,answer,split\n"
            "5,10000001,4,view,which view?,ap view,test\n",
            f"{MIMIC}/d.jpg": None,
        },
    ),
    "mimic_report": (
        "test",
        {
            f"{CSV}split.csv": "dicom_id,study_id,subject_id,split\nd,5,10000001,test\n",
            f"{CSV}metadata.csv": "dicom_id,ViewPosition\nd,PA\n",
            f"{CSV}chexpert.csv": "subject_id,study_id,Edema\n10000001,5,1.0\n",
            f"{MIMIC}.txt": "INDICATION: Pain.\n\nFINDINGS: Mild\n edema.\n\nIMPRESSION: Edema.\n",
            f"{MIMIC}/d.jpg": None,
        },
    ),
    "usmle": ("test", {"test.jsonl": '{"question": "Q?", "options": {"A": "a", "B": "b"}, "answer_idx": "B"}\n'}),
    "table": ("test", {"questions.csv": "image,question,answer\nscan/a.png,Q?,yes\n", "scan/a.png": None}),
    "openi": (
        "all",
        {"1.xml": '<e><uId id="C1"/><AbstractText Label="FINDINGS">Clear.</AbstractText></e>'},
    ),
}
ANSWERS = {"slake": "CT", "mimic_cxr_vqa": "edema, mass", "mimic_report": "Mild edema. Edema.", "usmle": "B. b"}


def write_layout(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            Image.new("RGB", (8, 8)).save(path)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content))


@pytest.mark.parametrize("name", LAYOUTS)
def test_documented_overlay_converts_a_small_release(repository: Path, tmp_path: Path, name: str) -> None:
    split, files = LAYOUTS[name]
    write_layout(tmp_path / "in", files)
    configs = repository / "vila_m3_bundle/configs"
    parser = ConfigParser()
    parser.read_config([str(configs / "prepare_data.json"), str(configs / f"data/{name}.json")])
    parser.update({"source": str(tmp_path / "in"), "split": split, "output_dir": str(tmp_path / "out")})
    parser.get_parsed_content("run")
    summary = json.loads((tmp_path / f"out/{name}_{split}.summary.json").read_text())
    assert (summary["written"], summary["rejected"]) == (1, 0)
    row = json.loads((tmp_path / f"out/{name}_{split}.jsonl").read_text())
    assert row["conversations"][1]["value"] == ANSWERS.get(name, row["conversations"][1]["value"])
    assert f"`{name}.json`" in (configs.parent / "docs/data.md").read_text()
