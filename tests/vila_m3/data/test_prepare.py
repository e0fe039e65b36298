"""Bad input is refused with its row number, nothing stops or vanishes, and a killed run gives the same bytes."""

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import pytest
from dicom_files import write_ct_series, write_dicom

from vila_m3.data.checks import RowChecks
from vila_m3.data.prepare import prepare
from vila_m3.data.record import parse_row, to_conversation
from vila_m3.data.source import Item, Located, Rejected
from vila_m3.data.sources.mimic_cxr import read_annotated_reports, read_mimic_reports
from vila_m3.data.sources.mimic_vqa import read_medical_diff_vqa
from vila_m3.data.sources.slake import read_slake
from vila_m3.data.sources.table import read_table
from vila_m3.data.sources.usmle import read_usmle
from vila_m3.data.validation import Validator
from vila_m3_common.errors import UserError
from vila_m3_common.study import open_study, render_images


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(b"png")
    return tmp_path / "in"


def run_table(folder: Path, data: bytes, **checks: Any) -> tuple[list[str], list[tuple[int, str]]]:
    (folder / "questions.csv").write_bytes(data)
    output = folder.parent / "out"
    summary = prepare(read_table(folder, "test"), "t", "test", output, RowChecks(folder, **checks))
    rows = [parse_row(line) for line in (output / "t_test.jsonl").read_text().splitlines()]
    assert summary["written"] == len(rows)
    return [row.id for row in rows], [(row["row"], row["reason"]) for row in summary["rejected_rows"]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"../../etc/passwd,q,a", "leaves the image folder"),
        (b"/etc/passwd,q,a", "leaves the image folder"),
        (b"gone.png,q,a", "image gone.png is missing"),
        (b"a.png,caf\xe9?,a", "not UTF-8"),
        (b"a.png,q,5 &lt; 6", "HTML entity &lt;"),
        (b"a.png,q", "has 2 fields, the header has 3"),
        (b"a.png,q,", "a text is empty"),
        (b"a.png,<image> q,a", "holds <image>"),
        (b"a.png,q," + b"x" * 10_000_000, "field larger than field limit"),
        (b'a.png,q,"x', "not CSV"),
    ],
    ids=[
        "path traversal",
        "absolute path",
        "missing image",
        "not UTF-8",
        "HTML entity",
        "truncated row",
        "empty answer",
        "placeholder in a text",
        "10-million-character answer",
        "truncated in a quotation",
    ],
)
def test_bad_row_is_refused_with_its_number(folder: Path, row: bytes, reason: str) -> None:
    is_last = b'"' in row
    lines = [b"image,question,answer", b"a.png,q,a", row] + ([] if is_last else [b"a.png,q,b"])
    written, rejected = run_table(folder, b"\n".join(lines))
    assert written == (["1"] if is_last else ["1", "3"])
    assert [number for number, _ in rejected] == [2]
    assert reason in rejected[0][1]


def test_repeated_id_is_refused(folder: Path) -> None:
    written, rejected = run_table(folder, b"id,image,question,answer\nx,a.png,q,a\nx,a.png,q,b\n")
    assert (written, rejected) == (["x"], [(2, "id x was already used")])


def test_huge_answer_in_json_is_refused(tmp_path: Path) -> None:
    row = {"question": "q", "options": {"A": "x" * 10_000_000, "B": "b"}, "answer_idx": "A"}
    good = {"question": "q", "options": {"A": "a", "B": "b"}, "answer_idx": "B"}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n{{\n{json.dumps(good)}\n")
    summary = prepare(read_usmle(tmp_path, "train"), "usmle", "train", tmp_path / "out", RowChecks(tmp_path))
    reasons = [(row["row"], row["reason"][:24]) for row in summary["rejected_rows"]]
    assert reasons == [(1, "a text has 10000010 char"), (2, "is not valid JSON (Expec")]
    record = parse_row((tmp_path / "out/usmle_train.jsonl").read_text())
    assert [message.text for message in record.messages] == ["q\nA. a\nB. b", "B. b"]


def test_entities_are_decoded_when_asked(folder: Path) -> None:
    assert run_table(folder, b"image,question,answer\na.png,q,5 &lt; 6\n", entities="decode") == (["1"], [])
    assert "5 < 6" in (folder.parent / "out/t_test.jsonl").read_text()


def test_wrong_columns_name_the_near_match(folder: Path) -> None:
    with pytest.raises(SystemExit, match="lacks the columns question; did you mean 'questions'"):
        run_table(folder, b"image,questions,answer\n")


def test_zip_instead_of_folder_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "slake.zip", "w") as archive:
        archive.writestr("test.json", "[]")
    with pytest.raises(UserError, match=r"is a zip archive; unpack the release"):
        list(read_slake(tmp_path / "slake.zip", "test"))


def test_cut_off_json_and_unknown_split_are_refused(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text('[{"question": ')
    with pytest.raises(UserError, match="it may be cut off"):
        list(read_slake(tmp_path, "test"))
    with pytest.raises(UserError, match="did you mean 'validate'"):
        list(read_slake(tmp_path, "validat"))


def test_difference_questions_show_reference_then_current(tmp_path: Path) -> None:
    (tmp_path / "mimic_all.csv").write_text("subject_id,study_id,dicom_id\n10000001,1,a\n10000001,2,b\n")
    (tmp_path / "mimic_pair_questions.csv").write_text(
        "study_id,subject_id,ref_id,question_type,question,answer,split\n"
        "2,10000001,1,difference,what changed?,nothing,train\n2,10000001,1,view,which view?,ap view,train\n"
        "9,10000001,1,view,which view?,ap view,train\n"
    )
    checks = RowChecks(tmp_path, checks_images=False)
    summary = prepare(read_medical_diff_vqa(tmp_path, "train", True), "m", "train", tmp_path / "out", checks)
    first, second = map(parse_row, (tmp_path / "out/m_train.jsonl").read_text().splitlines())
    assert first.images == ("files/p10/p10000001/s1/a.jpg", "files/p10/p10000001/s2/b.jpg")
    assert second.metadata["answer_type"] == "open"
    assert [row["row"] for row in summary["rejected_rows"]] == [3]
    assert len(list(read_medical_diff_vqa(tmp_path, "train"))) == 2


@pytest.mark.parametrize("rows_per_shard", [None, 70])
def test_run_killed_anywhere_gives_the_same_bytes(folder: Path, rows_per_shard: int | None) -> None:
    lines = [f"{'gone' if k % 7 == 0 else 'a'}.png,question {k},answer" for k in range(400)]
    (folder / "questions.csv").write_text("\n".join(["image,question,answer", *lines]))

    def convert(output: Path, killed_at: int = 10**9) -> None:
        def items() -> Iterator[Item]:
            for number, item in enumerate(read_table(folder, "test")):
                if number == killed_at:
                    os._exit(9)  # as kill -9: nothing is flushed or closed
                yield item

        prepare(items(), "t", "test", output, RowChecks(folder), rows_per_shard=rows_per_shard, save_every=50)

    def read_all(output: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(output.iterdir())}

    whole, resumed = folder.parent / "whole", folder.parent / "resumed"
    convert(whole)
    for killed_at in (30, 130, 333):
        child = os.fork()
        if child == 0:
            convert(resumed, killed_at)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert (resumed / ".t_test.progress.json").is_file()
    convert(resumed)
    assert read_all(resumed) == read_all(whole)
    assert len(read_all(whole)) == (3 if rows_per_shard is None else 7)


MIMIC = "mimic-cxr-2.0.0-"
CONVERT = """
import sys
from vila_m3.data.checks import RowChecks
from vila_m3.data.prepare import prepare
from vila_m3.data.sources.mimic_cxr import read_mimic_reports

if __name__ == "__main__":
    source, output, workers = sys.argv[1:]
    checks = RowChecks(source, checks_images=False)
    prepare(read_mimic_reports(source, "train"), "m", "train", output, checks, save_every=50, workers=int(workers))
"""


def write_mimic(folder: Path, studies: int) -> None:
    """A release in which some reports are missing and one id comes twice."""
    rows = [(f"i{k if k < studies - 1 else 1}", 5000 + k, 10000000 + k // 2) for k in range(studies)]
    split = "".join(f"{image},{study},{subject},train\n" for image, study, subject in rows)
    (folder / f"{MIMIC}split.csv").write_text(f"dicom_id,study_id,subject_id,split\n{split}")
    (folder / f"{MIMIC}metadata.csv").write_text("dicom_id,ViewPosition\n" + "".join(f"{r[0]},PA\n" for r in rows))
    for number, (_, study, subject) in enumerate(rows):
        path = folder / f"files/p10/p{subject}/s{study}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number % 11:
            path.write_text(f"FINDINGS: Report {number}.")


def read_outputs(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_workers_give_the_bytes_of_one_process_also_after_kill_9(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_mimic(source, 3000)
    (tmp_path / "convert.py").write_text(CONVERT)

    def start(output: str, workers: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "convert.py", str(source), output, str(workers)]
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start("whole", 1).wait() == 0
    progress = tmp_path / "killed/.m_train.progress.json"
    process = start("killed", 2)
    while not progress.is_file() and process.poll() is None:
        time.sleep(0.001)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    assert progress.is_file()
    assert psutil.wait_procs(workers, timeout=10)[1] == [], "workers must end with the process that was killed"
    assert start("killed", 2).wait() == 0
    assert read_outputs(tmp_path / "killed") == read_outputs(tmp_path / "whole")
    summary = json.loads((tmp_path / "whole/m_train.summary.json").read_text())
    assert (summary["written"], summary["rejected"]) == (2726, 274)
    assert summary["rejected_rows"][-1] == {
        "file": f"{MIMIC}split.csv",
        "row": 3000,
        "reason": "id i1 was already used",
    }


def test_dicom_and_nifti_of_the_users_own_are_shown_as_served(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write_ct_series(folder / "series", count=8)
    write_dicom(folder / "chest.dcm", np.arange(30).reshape(6, 5) * 20, modality="CR", orientation=None)
    volume = np.random.default_rng(0).normal(0, 200, (12, 10, 8)).astype(np.float32) - 100
    nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / "ct.nii.gz")
    (folder / "cut.nii.gz").write_bytes((folder / "ct.nii.gz").read_bytes()[:100])
    names = ["series", "chest.dcm", "ct.nii.gz", "cut.nii.gz", "gone.nii.gz"]
    (folder / "questions.csv").write_text(
        "image,question,answer\n" + "".join(f"{name},Q {name}?,a\n" for name in names)
    )
    summary = prepare(read_table(folder, "train"), "mine", "train", tmp_path / "out", RowChecks(folder))
    assert [row["reason"] for row in summary["rejected_rows"]] == ["image gone.nii.gz is missing"]
    lines = (tmp_path / "out/mine_train.jsonl").read_text().splitlines()
    for line in lines[:3]:
        record = parse_row(line)
        [shown] = to_conversation(record, folder).turns[0].images
        served = render_images(open_study(folder / record.images[0]))[0][0]
        np.testing.assert_array_equal(shown, served)
    kind, reason = Validator(folder, "").find_problem(lines[3])
    assert (kind, "cut.nii.gz" in reason) == ("image", True)


def test_broken_rows_of_side_tables_are_filed_with_their_numbers(tmp_path: Path) -> None:
    write_mimic(tmp_path, 4)
    with (tmp_path / f"{MIMIC}metadata.csv").open("a") as file:
        file.write("i9,PA,extra\n")
    (tmp_path / f"{MIMIC}chexpert.csv").write_text("subject_id,study_id,Edema,Fracture\n1\n10000000,5001,1.0,0\n")
    with (tmp_path / f"{MIMIC}split.csv").open("a") as file:
        file.write("unlisted,5001,10000000,train\n")
    checks = RowChecks(tmp_path, checks_images=False)
    summary = prepare(read_mimic_reports(tmp_path, "train"), "m", "train", tmp_path / "out", checks)
    assert [(row["file"], row["row"], row["reason"]) for row in summary["rejected_rows"]] == [
        (f"{MIMIC}metadata.csv", 5, "has 3 fields, the header has 2; the file may be cut off"),
        (f"{MIMIC}chexpert.csv", 1, "has 1 fields, the header has 4; the file may be cut off"),
        (f"{MIMIC}split.csv", 1, "report files/p10/p10000000/s5000.txt cannot be read (No such file or directory)"),
        (f"{MIMIC}split.csv", 4, "id i1 was already used"),
        (f"{MIMIC}split.csv", 5, "image unlisted has no row in the metadata file"),
    ]
    assert parse_row((tmp_path / "out/m_train.jsonl").read_text().splitlines()[0]).metadata["labels"] == ["Edema"]


def test_broken_rows_of_the_image_table_are_filed(tmp_path: Path) -> None:
    (tmp_path / "mimic_all.csv").write_text("subject_id,study_id,dicom_id\n10000001,1\n10000001,2,b\n")
    (tmp_path / "mimic_pair_questions.csv").write_text(
        "study_id,subject_id,ref_id,question_type,question,answer,split\n2,10000001,1,view,which view?,ap view,train\n"
    )
    items = list(read_medical_diff_vqa(tmp_path, "train"))
    assert isinstance(items[0], Rejected)
    assert (items[0].file, items[0].row) == ("mimic_all.csv", 1)
    assert isinstance(items[1], Located)


def test_an_annotation_of_another_form_is_filed_and_a_missing_split_named(tmp_path: Path) -> None:
    (tmp_path / "mimic_annotation.json").write_text('{"train": [{"image_path": "a.jpg"}, 5]}')
    reasons = [item.reason for item in read_annotated_reports(tmp_path) if isinstance(item, Rejected)]
    assert reasons == ["has no image_path, a list of texts"] * 2
    with pytest.raises(UserError, match="has no list 'test'"):
        list(read_annotated_reports(tmp_path, "test"))


def test_fields_beside_the_texts_that_are_not_utf_8_are_refused(folder: Path) -> None:
    written, rejected = run_table(folder, b"image,question,answer,patient\na.png,q,a,\xff\n")
    assert (written, rejected) == ([], [(1, "a field is not UTF-8")])
