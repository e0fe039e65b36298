"""Rows per second and peak memory of preparing 400,000 synthetic studies in the layout of MIMIC-CXR-JPG.

Run: ``python tests/benchmarks/prepare_data.py [studies] [workers] [folder]``. The images are neither made nor looked
for; the report texts are one file a study, as in the release, and lie in the page cache since they were just written.
The release is converted whole, then again with ``kill -9`` at a random point and a resume. Printed are the seconds of
the whole process from start to exit and of :func:`vila_m3.data.prepare.prepare` alone; the processor time of a row in
the process and its workers; the load of the machine; and the largest sum of the resident memory of the process and its
workers, looked at ten times a second (shared pages count for each).
"""

import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from vila_m3.data.checks import RowChecks
from vila_m3.data.prepare import prepare
from vila_m3.data.sources.mimic_cxr import read_mimic_reports

SENTENCES = (
    "The lungs are clear.",
    "No pleural effusion or pneumothorax.",
    "Mild cardiomegaly is unchanged.",
    "Left basal atelectasis.",
    "The mediastinal contour is normal.",
    "No acute fracture is seen in the visualised skeleton.",
    "The tip of the right jugular catheter projects over the\n superior vena cava.",
    "There is a small opacity at the right base, which may reflect pneumonia in the right clinical setting.",
)
# The header of the release's label file.
FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Consolidation",
    "Edema",
    "Enlarged Cardiomediastinum",
    "Fracture",
    "Lung Lesion",
    "Lung Opacity",
    "No Finding",
    "Pleural Effusion",
    "Pleural Other",
    "Pneumonia",
    "Pneumothorax",
    "Support Devices",
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
        metadata.write("dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns\n")
        labels.write(f"subject_id,study_id,{','.join(FINDINGS)}\n")
        for number in range(studies):
            subject, study, image = 10_000_000 + number // 3, 50_000_000 + number, f"{draw.getrandbits(160):040x}"
            split.write(f"{image},{study},{subject},train\n")
            view = "PA" if number % 2 else "AP"
            metadata.write(f'{image},{subject},{study},"CHEST (PA AND LAT)",{view},2544,3056\n')
            labels.write(
                f"{subject},{study},{','.join(draw.choices(('', '0.0', '1.0', '-1.0'), (12, 2, 3, 1), k=14))}\n"
            )
            path = folder / f"files/p{subject // 1_000_000}/p{subject}/s{study}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(make_report(draw))


def make_report(draw: random.Random) -> str:
    """Return a report of the usual sections and length."""
    findings = "\n ".join(draw.choices(SENTENCES, k=7))
    return (
        "                                 FINAL REPORT\n EXAMINATION:  CHEST (PA AND LAT)\n\n"
        f" INDICATION:  ___ year old woman with cough.\n\n FINDINGS: \n \n {findings}\n\n"
        f" IMPRESSION: \n \n {' '.join(draw.choices(SENTENCES, k=2))}\n"
    )


def convert(folder: Path, output: Path, workers: int) -> None:
    """Prepare the training split, as the command does."""
    start = time.perf_counter()
    checks = RowChecks(folder, checks_images=False)
    prepare(read_mimic_reports(folder, "train"), "mimic_report", "train", output, checks, workers=workers)
    print(f"{time.perf_counter() - start:.2f}")


def _watch_memory(process: subprocess.Popen, peak: list[int]) -> None:
    while process.poll() is None:
        try:
            tree = [psutil.Process(process.pid)]
            tree += tree[0].children(recursive=True)
            peak[0] = max(peak[0], sum(member.memory_info().rss for member in tree) >> 20)
        except psutil.NoSuchProcess:
            pass
        time.sleep(0.1)


def run(folder: Path, output: Path, workers: int, killed_after: float | None = None) -> tuple[float, float, int]:
    """Convert in a process of its own; return its seconds, those of ``prepare``, and the peak memory in MiB."""
    start, peak = time.perf_counter(), [0]
    command = [sys.executable, __file__, "--convert", str(folder), str(output), str(workers)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watcher = threading.Thread(target=_watch_memory, args=(process, peak))
    watcher.start()
    try:
        told = process.communicate(timeout=killed_after)[0].split()
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        told = []
    seconds = time.perf_counter() - start
    watcher.join()
    return seconds, float(told[-1]) if told else 0.0, peak[0]


def main() -> None:
    """Make the release, convert it, and convert it again with a kill in between."""
    if sys.argv[1:2] == ["--convert"]:
        convert(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
        return
    studies = int(sys.argv[1]) if len(sys.argv) > 1 else 400_000
    workers = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    with tempfile.TemporaryDirectory(dir=sys.argv[3] if len(sys.argv) > 3 else None) as name:
        folder = Path(name)
        make_release(folder, studies)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds, prepare_seconds, memory = run(folder, folder / "whole", workers)
        used, load = resource.getrusage(resource.RUSAGE_CHILDREN), os.getloadavg()[0]
        processor_seconds = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
        killed_after = random.uniform(0.4, 0.9) * seconds
        run(folder, folder / "resumed", workers, killed_after)
        run(folder, folder / "resumed", workers)
        files = [folder / kind / "mimic_report_train.jsonl" for kind in ("whole", "resumed")]
        hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        result = {
            "studies": studies,
            "workers": workers,
            "seconds": round(seconds, 1),
            "rows_per_second": round(studies / seconds),
            "rows_per_second_of_prepare": round(studies / prepare_seconds),
            "processor_microseconds_per_row": round(processor_seconds / studies * 1e6, 1),
            "load": round(load, 1),
            "peak_mib": memory,
            "killed_after_seconds": round(killed_after, 1),
            "same_bytes_after_kill": hashes[0] == hashes[1],
        }
        print(json.dumps(result))


if __name__ == "__main__":
    main()
