"""Time and memory of the main job. Run with ``make bench``; figures go to the docs with date and machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from monai.transforms import LoadImage, Orientation

from vila_m3_common import phantoms
from vila_m3_common.agent import Session
from vila_m3_common.study import open_study, render_images
from vila_m3_composite.app import Composite

pytestmark = pytest.mark.bench


def test_the_demo_takes_under_a_minute_and_3_gib(tmp_path: Path) -> None:
    """Wall time and the largest resident set of the whole process, as the operating system counts it."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "vila_m3_composite.demo", "--output_dir", str(tmp_path)], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds, gib = time.perf_counter() - start, usage.ru_maxrss / 2**20
    print(f"\ndemo: {seconds:.1f} s, peak {gib:.2f} GiB")
    assert status == 0
    assert seconds < 60
    assert gib < 3


def test_a_second_question_runs_no_expert(repository: Path, tmp_path: Path) -> None:
    phantom = phantoms.ct_phantom(11, ["hepatic tumor"])
    study = open_study(phantoms.save_volume(phantom.image, phantom.affine, tmp_path / "ct.nii.gz"))
    with Composite(str(repository / "bundles/vila_m3_with_experts"), "vila_m3_bundle", ["expert_vista3d"]) as members:
        session = Session(study, tmp_path)
        seconds = []
        for question in ("Are there any liver masses?", "Is there a hepatic tumor?"):
            start = time.perf_counter()
            members.agent.ask(session, question)
            seconds.append(time.perf_counter() - start)
    print(f"\nfirst question {seconds[0]:.2f} s, second {seconds[1]:.2f} s")
    assert [call.is_reused for call in session.calls] == [False, True]
    assert seconds[1] < 5


def test_slicing_reads_the_volume_once(tmp_path: Path) -> None:
    """All 300 slices of 512 x 512 from one load, against 300 times the median of three loads."""
    path = tmp_path / "large.nii.gz"
    noise = np.random.default_rng(0).normal(0, 20, (512, 512, 20)).round()
    volume = np.tile(noise - 900, (1, 1, 15)).astype(np.int16)
    volume[100:400, 100:400] += 900
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)
    start = time.perf_counter()
    study = open_study(path)
    shapes = {render_images(study, index)[0][0].shape for index in range(300)}
    ours = time.perf_counter() - start
    loads = [_seconds_of_one_load(path) for _ in range(3)]
    theirs = 300 * sorted(loads)[1]
    print(f"\n300 slices: one load {ours:.1f} s, a load per slice {theirs:.0f} s, ratio {theirs / ours:.0f}")
    assert shapes == {(512, 512, 3)}
    assert theirs / ours > 20


def _seconds_of_one_load(path: Path) -> float:
    """What the reference does for every slice: load the volume, bring it to RAS, take the slice."""
    start = time.perf_counter()
    image = Orientation("RAS", labels=None)(LoadImage(image_only=True, ensure_channel_first=True)(str(path)))
    assert image[0, :, :, 150].shape == (512, 512)
    return time.perf_counter() - start
