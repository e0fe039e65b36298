"""Measures what one question costs with the nano weights: seconds to open, for the first and the next run, memory.

Run with ``make bench``; nothing is asserted about the figures, because they are the machine's.
"""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vila_m3_common.conversation import Conversation
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import BundleExpert, BundleVlm
from vila_m3_common.package import find_bundles
from vila_m3_common.study import open_study, render_images

BUNDLES = find_bundles(Path(__file__).resolve().parents[2])


def declares(bundle: Path, item: str) -> bool:
    return item in json.loads((bundle / "configs/inference.json").read_text())


EXPERTS = [bundle for bundle in BUNDLES.values() if declares(bundle, "model_card")]
VLMS = [bundle for bundle in BUNDLES.values() if declares(bundle, "answer")]


def seconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def report(name: str, opened: float, action: Callable[[], object]) -> None:
    first, following = seconds(action), seconds(action)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # kB on Linux
    print(f"\n{name:24} open {opened:6.2f} s   first run {first:6.2f} s   next {following:6.2f} s   {peak_mb:6.0f} MB")


@pytest.mark.bench
@pytest.mark.parametrize("bundle", EXPERTS, ids=lambda path: path.name)
def test_an_expert_call(bundle: Path, ct_file: Path, mri_folder: Path, cxr_file: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    expert = BundleExpert(bundle)
    opened = time.perf_counter() - start
    study = open_study({"CT": ct_file, "MRI": mri_folder, "CXR": cxr_file}[expert.card.study_modality])
    _, index = render_images(study)
    request = ExpertRequest(tuple(str(path) for path in study.paths), slice_index=index, output_dir=str(tmp_path))
    report(bundle.name, opened, lambda: expert.run(request))
    expert.close()


@pytest.mark.bench
@pytest.mark.parametrize("bundle", VLMS, ids=lambda path: path.name)
def test_an_answer(bundle: Path, cxr_file: Path) -> None:
    start = time.perf_counter()
    vlm = BundleVlm(bundle)
    opened = time.perf_counter() - start
    images, _ = render_images(open_study(cxr_file))
    conversation = Conversation()
    conversation.add("user", "<image>What is in the image?", images)
    report(bundle.name, opened, lambda: list(vlm(conversation)))
    vlm.close()
