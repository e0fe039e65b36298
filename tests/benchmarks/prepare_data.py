"""Rows per second and peak memory of preparing 400,000 synthetic studies in the layout of MIMIC-CXR-JPG.

Run: ``python tests/benchmarks/prepare_data.py [studies] [folder]``. The images are not made and not looked for; the
report texts are 400,000 files, as in the release. With ``--kill`` the run is killed at a random point and resumed.
"""

import hashlib
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vila_m3.data.prepare import RowChecks, prepare
from vila_m3.data.sources.mimic_cxr import read_mimic_reports

SENTENCES = (
    "The lungs are clear.",
    "No pleural effusion or pneumothorax.",
    "Mild cardiomegaly.",
    "Left basal atelectasis.",
    "The mediastinal contour is normal.",
    "No acute fracture.",
)


def make_release(folder: Path, studies: int) -> None:
    """Write the three CSV files and a report text for each study."""
    draw = random.Random(0)
    names = [f"mimic-cxr-2.0.0-{kind}.csv" for kind in ("split", "metadata", "chexpert")]
    with (
        (folder / names[0]).open("w") as split,
        (folder / names[1]).open("w") as metadata,
        (folder / names[2]).open("w") as labels,
    ):
        split.write("dicom_id,study_id,subject_id,split\n")
        metadata.write("dicom_id,subject_id,study_id,ViewPosition,Rows,Columns\n")
        labels.write("subject_id,study_id,Atelectasis,Cardiomegaly,Edema\n")
        for number in range(studies):
            subject, study, image = 10_000_000 + number // 3, 50_000_000 + number, f"{draw.getrandbits(160):040x}"
            split.write(f"{image},{study},{subject},train\n")
            metadata.write(f"{image},{subject},{study},{'PA' if number % 2 else 'AP'},2544,3056\n")
            labels.write(f"{subject},{study},1.0,{'1.0' if number % 2 else ''},-1.0\n")
            path = folder / f"files/p{subject // 1_000_000}/p{subject}/s{study}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            text = " ".join(draw.choices(SENTENCES, k=4))
            path.write_text(f"FINAL REPORT\n\nFINDINGS: {text}\n\nIMPRESSION: {draw.choice(SENTENCES)}\n")


def convert(folder: Path, output: Path) -> None:
    """Prepare the training split, as the command does."""
    prepare(
        read_mimic_reports(folder, "train"), "mimic_report", "train", output, RowChecks(folder, checks_images=False)
    )


def run(folder: Path, output: Path, killed_after: float | None = None) -> tuple[float, int]:
    """Convert in a process of its own; return its seconds and peak memory in MiB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, "--convert", str(folder), str(output)])
    try:
        process.wait(killed_after)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024


def main() -> None:
    """Make the release, convert it, and convert it again with a kill in between."""
    if sys.argv[1:2] == ["--convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
        return
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 400_000
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder = Path(name)
        make_release(folder, studies)
        seconds, memory = run(folder, folder / "whole")
        killed_after = random.uniform(0.4, 0.9) * seconds
        run(folder, folder / "resumed", killed_after)
        run(folder, folder / "resumed")
        files = [folder / kind / "mimic_report_train.jsonl" for kind in ("whole", "resumed")]
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        result = {
            "studies": studies,
            "seconds": round(seconds, 1),
            "rows_per_second": round(studies / seconds),
            "peak_mib": memory,
            "killed_after_seconds": round(killed_after, 1),
            "same_bytes_after_kill": hashes[0] == hashes[1],
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
