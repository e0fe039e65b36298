"""The eight released chest X-ray networks on 32 radiographs, against two other ways of using them.

All ways have the same random weights, in files of the released names, and give the same scores. Each runs in a
process of its own, one after the other, so that its peak memory is its own; the figures are ratios of one run on two
threads. Run with ``make bench``; they go to the docs with date and machine.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.bench

IMAGE_COUNT = 32
# Building eight networks for every image takes so long that this way gets the first images only.
REBUILT_COUNT = 4

# Reads options as JSON; prints seconds an image, peak memory above the imports in MB, and the scores.
PROGRAM = """
import json, resource, sys, time
import torch
from monai.bundle import ConfigParser
from cxr_expert.network import average_votes

way, paths, configs, models_dir = json.loads(sys.argv[1])
torch.set_num_threads(2)

def open_bundle():
    parser = ConfigParser()
    parser.read_config(configs)
    parser.update({"models_dir": models_dir, "device": "cpu"})
    return parser

def member_by_member(network, image):
    scores = torch.stack([member.scores(image) for member in network.classifiers.values()])
    return average_votes(scores, network.votes())

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

parser = open_bundle()
preprocessing = parser.get_parsed_content("preprocessing")
before = peak()
if way != "rebuilt":
    network = parser.get_parsed_content("network")
start, found = time.perf_counter(), []
with torch.no_grad():
    for path in paths:
        if way == "rebuilt":
            network = open_bundle().get_parsed_content("network")
        image = preprocessing({"image": path})["image"][None]
        found.append(network(image) if way == "ours" else member_by_member(network, image))
seconds = (time.perf_counter() - start) / len(paths)
print(json.dumps([seconds, peak() - before, torch.cat(found).tolist()]))
"""


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight files of the released names, as state dicts with random weights that keep the scores apart."""
    from cxr_expert.released import build_ensemble
    from cxr_expert.released_table import RELEASED_MODELS

    folder = tmp_path_factory.mktemp("released")
    torch.manual_seed(0)
    for name, member in build_ensemble().classifiers.items():
        state = {
            key.replace(".layers.", ".").replace("class_layers.out", "classifier"): value
            for key, value in member.network.state_dict().items()
        }
        torch.save(state, folder / RELEASED_MODELS[name].file)
    return folder


def run_way(way: str, paths: list[str], bundle: Path, models_dir: Path) -> tuple[float, float, np.ndarray]:
    configs = [str(bundle / "configs" / name) for name in ("inference.json", "size_full.json")]
    options = json.dumps([way, paths, configs, str(models_dir)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, options], capture_output=True, text=True, check=True
    )
    seconds, megabytes, scores = json.loads(done.stdout.splitlines()[-1])
    return seconds, megabytes, np.array(scores)


def test_the_ensemble_of_eight_on_32_radiographs(repository: Path, shared: Path, models_dir: Path) -> None:
    paths = [str(path) for path in sorted((shared / "data/cxr/nih_256").glob("*.png"))[:IMAGE_COUNT]]
    bundle = repository / "expert_cxr"
    rebuilt = run_way("rebuilt", paths[:REBUILT_COUNT], bundle, models_dir)
    kept = run_way("kept", paths, bundle, models_dir)
    ours = run_way("ours", paths, bundle, models_dir)
    for name, (seconds, megabytes, _) in {"rebuilt per image": rebuilt, "kept": kept, "ours": ours}.items():
        print(f"\n{name:18} {seconds:6.2f} s an image, {megabytes:5.0f} MB", end="")
    print(f"\ntime: rebuilt / ours {rebuilt[0] / ours[0]:.2f}, kept / ours {kept[0] / ours[0]:.2f}")
    np.testing.assert_allclose(ours[2], kept[2], atol=1e-6)
    np.testing.assert_allclose(ours[2][:REBUILT_COUNT], rebuilt[2], atol=1e-6)
    assert rebuilt[0] / ours[0] > 1.5
