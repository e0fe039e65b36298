"""BraTS at full size on a real case against MONAI's parts wired as the Model Zoo's bundle wires them.

Both run in a process of their own, on the same random weights, one after the other. Run with ``make bench``.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

pytestmark = pytest.mark.bench

SEQUENCES = ("t1c", "t1n", "t2w", "t2f")

# Reading, normalisation over non-zero voxels, one window of 240 x 240 x 160, sigmoid, threshold, labels 1, 2, 4.
ZOO_PATH = """
import sys
import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.inferers import SlidingWindowInferer
from monai.networks.nets import SegResNet
from monai.transforms import (Activationsd, AsDiscreted, Compose, EnsureChannelFirstd, Invertd, Lambdad, LoadImaged,
                              NormalizeIntensityd, SaveImaged)

weights, output, *images = sys.argv[1:]
network = SegResNet(spatial_dims=3, blocks_down=[1, 2, 2, 4], blocks_up=[1, 1, 1], init_filters=16, in_channels=4,
                    out_channels=3, dropout_prob=0.2)
network.load_state_dict(torch.load(weights, weights_only=True))
before = Compose([LoadImaged("image"), EnsureChannelFirstd("image"),
                  NormalizeIntensityd("image", nonzero=True, channel_wise=True)])
after = Compose([
    Activationsd("pred", sigmoid=True),
    Invertd("pred", transform=before, orig_keys="image", nearest_interp=False),
    AsDiscreted("pred", threshold=0.5),
    Lambdad("pred", lambda x: torch.where(x[[2]] > 0, 4, torch.where(x[[0]] > 0, 1, torch.where(x[[1]] > 0, 2, 0)))),
    SaveImaged("pred", output_dir=output, output_dtype="uint8", separate_folder=False, print_log=False),
])
SupervisedEvaluator(
    device=torch.device("cpu"),
    val_data_loader=DataLoader(Dataset([{"image": images}], before), batch_size=1),
    network=network,
    inferer=SlidingWindowInferer(roi_size=[240, 240, 160], sw_batch_size=1, overlap=0.5),
    postprocessing=after,
).run()
"""


@dataclass(frozen=True)
class Cost:
    """What a process took, as the operating system counts it; processor seconds do not depend on other load."""

    wall_s: float
    cpu_s: float
    peak_gib: float

    def __str__(self) -> str:
        return f"{self.wall_s:.1f} s, {self.cpu_s:.1f} processor seconds, peak {self.peak_gib:.2f} GiB"


def cost_of(*command: str) -> Cost:
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    return Cost(time.perf_counter() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


@pytest.fixture(scope="module")
def weights(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the released one's layout with random values that give every label."""
    full = json.loads((repository / "expert_brats/configs/size_full.json").read_text())["network_def"]
    torch.manual_seed(0)
    network = ConfigParser(full).get_parsed_content("")
    path = tmp_path_factory.mktemp("models") / "model_brats_mri_segmentation.pt"
    torch.save(network.state_dict(), path)
    return path


def test_a_real_case_at_full_size_takes_half_the_memory(
    repository: Path, shared: Path, weights: Path, tmp_path: Path
) -> None:
    case = shared / "data/mri/brats_gli_00001"
    configs = [str(repository / "expert_brats/configs" / f"{name}.json") for name in ("inference", "size_full")]
    ours = cost_of(
        *("-m", "monai.bundle", "run", "--config_file", str(configs), "--image", str(case)),
        *("--checkpoint", str(weights), "--device", "cpu", "--output_dir", str(tmp_path / "ours")),
    )
    images = [str(case / f"{name}.nii.gz") for name in SEQUENCES]
    zoo = cost_of("-c", ZOO_PATH, str(weights), str(tmp_path / "zoo"), *images)
    found = np.asarray(nib.load(tmp_path / "ours/brats_labels.nii.gz").dataobj)
    (zoo_file,) = (tmp_path / "zoo").glob("*.nii.gz")
    expected = np.asarray(nib.load(zoo_file).dataobj)
    differing = int((found != expected).sum())
    print(f"\nours {ours}\nzoo  {zoo}")
    print(f"memory ratio {ours.peak_gib / zoo.peak_gib:.2f}, processor time ratio {ours.cpu_s / zoo.cpu_s:.2f}")
    print(f"{differing} of {found.size} voxels differ; labels {np.unique(expected, return_counts=True)}")
    assert differing <= 1e-5 * found.size  # logits within rounding of the threshold
    assert ours.peak_gib < 0.6 * zoo.peak_gib
    assert ours.cpu_s < 1.6 * zoo.cpu_s  # the first level is convolved twice, and ours also measures and draws
