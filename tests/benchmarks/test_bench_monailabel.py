"""MONAI Label with the app: time of a request against the bundle itself, and memory. Run with ``make bench``."""

import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vila_m3_common import phantoms
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import BundleExpert

sys.path.insert(0, str(Path(__file__).parents[1] / "vila_m3_with_experts" / "viewer"))

from monailabel_server import MonaiLabel, environment, start

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]
THREADS = 2
REQUESTS = 10
LIVER_AND_TUMOR = [1, 26]


@pytest.fixture(scope="module")
def server(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MonaiLabel]:
    work = tmp_path_factory.mktemp("bench")
    phantom = phantoms.ct_phantom(400_001, ["hepatic tumor"])
    phantoms.save_volume(phantom.image, phantom.affine, work / "studies" / "ct.nii.gz")
    begin = time.perf_counter()
    started = start(repository, environment(repository), work, work / "studies", OMP_NUM_THREADS=str(THREADS))
    print(f"\nstart to first answer: {time.perf_counter() - begin:.1f} s; {os.cpu_count()} cores")
    yield started
    started.end()


def resident_mib(server: MonaiLabel) -> float:
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def test_a_request_takes_little_longer_than_the_bundle(server: MonaiLabel, tmp_path: Path) -> None:
    print(f"\nidle server: {resident_mib(server):.0f} MiB")
    image = server.log.parent / "studies" / "ct.nii.gz"
    expert = BundleExpert("expert_vista3d", {"device": "cpu"})
    prompts = {"label_prompt": LIVER_AND_TUMOR}
    request = ExpertRequest((str(image),), output_dir=str(tmp_path), prompts=prompts)

    def direct() -> float:
        begin = time.perf_counter()
        expert.run(request)
        return time.perf_counter() - begin

    def over_http() -> float:
        begin = time.perf_counter()
        file, _ = server.infer("expert_vista3d", "ct", **prompts)
        seconds = time.perf_counter() - begin
        assert file is not None
        file.unlink()
        return seconds

    first = direct(), over_http()
    memory, seconds = [resident_mib(server)], ([], [])
    for _ in range(REQUESTS):
        seconds[0].append(direct())
        seconds[1].append(over_http())
        memory.append(resident_mib(server))
    expert.close()
    medians = [statistics.median(values) for values in seconds]
    print(
        f"first: bundle {first[0]:.2f} s, request {first[1]:.2f} s"
        f"\nmedian of {REQUESTS}: bundle {medians[0]:.2f} s, request {medians[1]:.2f} s, "
        f"overhead {medians[1] - medians[0]:.2f} s"
        f"\nmemory after the first request {memory[0]:.0f} MiB, after {REQUESTS} more {memory[-1]:.0f} MiB"
    )
    assert medians[1] - medians[0] < 1.0
    assert memory[-1] < 1.05 * memory[0], "memory grows"
