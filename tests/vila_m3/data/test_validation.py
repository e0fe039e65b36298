"""Validation tells and keeps every bad row; leaks between files are found by patient, content and look."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vila_m3.data.experts import brats, vista3d
from vila_m3.data.record import Message, Record, format_row
from vila_m3.data.validation import Validator, difference_hash, find_leaks, valid_arguments, validate
from vila_m3_common.errors import UserError

ROOT = Path(__file__).parents[3]
CARDS = (ROOT / "vila_m3_bundle/configs/model_cards.txt").read_text()


def record(
    name: str = "a", answer: str = "yes", images: tuple[str, ...] = ("a.png",), question: str = "Any?"
) -> Record:
    text = "<image>\n" * len(images) + question
    return Record(name, (Message("user", text), Message("assistant", answer)), images)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 255, (12, 12), np.uint8)).resize((96, 96), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    return tmp_path


BAD = {
    "schema": '{"id": "x"',
    "turn order": format_row(Record("x", (Message("assistant", "a"), Message("assistant", "b")))),
    "image count": format_row(Record("x", (Message("user", "<image>"), Message("assistant", "b")))),
    "image": format_row(record("x", images=("../../etc/passwd",))),
    "trigger": format_row(record("x", "Let me trigger <VISTA3D(hepatic tumour)>.")),
    "answer length": format_row(record("x", "x" * 10_000_000)),
    "language": format_row(record("x", "是的", question="有肿瘤吗")),
    "duplicate": format_row(record("a", question="Another?")),
}


def test_every_bad_row_is_kept_aside_with_its_number_and_reason(images: Path, capsys: Any) -> None:
    lines = [format_row(record()), *BAD.values(), "", format_row(record("z", "no", question="One more?"))]
    (images / "d.jsonl").write_text("\n".join(lines) + "\n")
    validate([str(images / "d.jsonl")], images, CARDS, str(images / "out"))
    kept = (images / "out/d.jsonl").read_text().splitlines()
    assert kept == [lines[0], lines[-1]]
    dropped = [json.loads(line) for line in (images / "out/d.dropped.jsonl").read_text().splitlines()]
    assert [(row["row"], row["kind"]) for row in dropped] == list(enumerate(BAD, start=2))
    assert all(row["reason"] for row in dropped)
    assert "| d.jsonl | 10 | 2 | 1 | 1 | 1 | 1 | 1 | 1 | 1 | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (record(images=("cut.png",)), "cannot be read"),
        (record(images=("b.png",)), "is missing"),
        (record(answer=" "), "turn 2 is empty"),
        (record(answer="<MAGIC()>"), "without a card; cards: BRATS, VISTA3D, VISTA2D, CXR"),
        (record(answer="<BRATS(liver)>"), "valid: none"),
        (record(answer="<VISTA3D()>"), "valid: everything, hepatic tumor"),
        (
            Record("a", (Message("user", "a"), Message("user", "b"), Message("assistant", "c"))),
            "follows a turn of user",
        ),
        (Record("a", (Message("user", "a"),)), "the last turn is not"),
    ],
)
def test_a_fault_is_told_exactly(images: Path, row: Record, message: str) -> None:
    assert message in Validator(images, CARDS).find_problem(format_row(row))[1]


@pytest.mark.parametrize(("faithful", "kind"), [(False, ""), (True, "image count")])
def test_the_recorded_image_count_faults_are_named(images: Path, faithful: bool, kind: str) -> None:
    ct = vista3d.describe_record("c", "a.png", "a.png", "What?", "organs", [("liver", "red")], CARDS, faithful)
    mri = brats.describe_record("m", ["a.png"] * 4, "a.png", "What?", CARDS, faithful)
    validator = Validator(images, CARDS)
    assert [validator.find_problem(format_row(row))[0] for row in (ct, mri)] == [kind, kind]


def test_the_cards_name_the_valid_arguments() -> None:
    assert valid_arguments(CARDS)["BRATS"] == ()
    assert len(valid_arguments(CARDS)["VISTA3D"]) == 10


def test_output_into_the_folder_of_the_data_is_refused(images: Path) -> None:
    (images / "d.jsonl").write_text("")
    with pytest.raises(UserError, match="would overwrite"):
        validate([str(images / "d.jsonl")], images, CARDS, str(images))


def test_leaks_are_found_by_patient_content_and_look(images: Path) -> None:
    picture = Image.open(images / "a.png")
    picture.resize((80, 80)).save(images / "near.jpg", quality=80)
    (images / "copy.png").write_bytes((images / "a.png").read_bytes())
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (96, 96), np.uint8)).save(images / "other.png")
    rows = {
        "train": ("a.png", "p1"),
        "test": ("copy.png", "p1"),
        "near": ("near.jpg", "p2"),
        "other": ("other.png", "p3"),
    }
    for name, (image, patient) in rows.items():
        row = Record(name, record().messages, (image,), {"patient": patient})
        (images / f"{name}.jsonl").write_text(format_row(row) + "\n")
    sets = {name: {"file": str(images / f"{name}.jsonl"), "images": str(images)} for name in rows}
    found = {(r["first"], r["second"]): (r["patients"], r["same_images"], r["near_images"]) for r in find_leaks(sets)}
    assert found[("train", "test")] == (1, 1, 0)
    assert found[("train", "near")] == (0, 0, 1)
    assert found[("train", "other")] == (0, 0, 0)
    assert "p1" not in json.dumps(find_leaks(sets))


def test_the_hash_is_the_sign_of_neighbouring_differences() -> None:
    ramp = np.tile(np.arange(0, 252, 28, np.uint8), (8, 1))
    assert difference_hash(Image.fromarray(ramp)) == 2**64 - 1
    assert difference_hash(Image.fromarray(ramp[:, ::-1].copy())) == 0


def run_bundle(config: Any, **overrides: Any) -> None:
    from monai.bundle import run

    run(config_file=config, **overrides)


def test_the_documented_commands_run(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = ROOT / "vila_m3_bundle/configs"
    monkeypatch.chdir(images)
    for name in ("train", "test"):
        Path(f"{name}.jsonl").write_text(format_row(record(name)) + "\n")
    run_bundle(str(configs / "validate_data.json"), files=["train.jsonl"], image_root=".", output_dir="validated")
    assert len(Path("validated/train.jsonl").read_text().splitlines()) == 1
    run_bundle(str(configs / "leak_report.json"))
    assert json.loads(Path("leaks.json").read_text())[0]["same_images"] == 1
    overlays = [str(configs / f"mixture_{name}.json") for name in ("report", "m3")]
    sets = {"usmle": {"files": ["train.jsonl"], "repeats": 3}}
    run_bundle(overlays, data_root=".", data_sets=sets, output_dir="report")
    assert "usmle,1,3,3,3," in Path("report/mixture.csv").read_text()
