"""One segmentation in a process of its own, by this bundle or as the Model Zoo's bundle wires MONAI.

``python vista3d_paths.py SETTINGS.json`` prints seconds of processor time and peak memory as JSON. The Model
Zoo's path (version 0.6.0): its transforms in their order, MONAI's ``SlidingWindowInfererAdapt`` with replicated
borders (its overlap setting does not reach it, so 0.25 is used), ``VistaPostTransformd``, ``Invertd``.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.apps.vista3d.transforms import VistaPostTransformd, VistaPreTransformd
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset, decollate_batch
from monai.inferers import SlidingWindowInfererAdapt
from monai.networks.nets.vista3d import VISTA3D
from monai.transforms import (
    CastToTyped,
    Compose,
    CropForegroundd,
    EnsureChannelFirstd,
    EnsureTyped,
    Invertd,
    LoadImaged,
    Orientationd,
    ScaleIntensityRanged,
    Spacingd,
)

from vila_m3_common.weights import load_weights
from vista3d_expert.labels import label_table

CONFIGS = Path(__file__).resolve().parents[2] / "expert_vista3d/configs"
HU_RANGE = (-963.8247715525971, 1053.678477684517)


def open_config(settings: dict[str, Any]) -> ConfigParser:
    """The bundle's inference config with the settings' network, spacing and window."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / name) for name in settings["configs"]])
    parser.update({"device": "cpu", "overlap": 0.25, "min_tumor_ml": 0.0, **settings["overrides"]})
    parser.config["checkpoint"] = settings["checkpoint"]
    return parser


def segment_here(parser: ConfigParser, network: VISTA3D, settings: dict[str, Any]) -> np.ndarray:
    """Run the parts of the bundle's own config."""
    dataset = Dataset(
        [{"image": settings["image"], "label_prompt": settings["prompt"]}],
        parser.get_parsed_content("preprocessing"),
    )
    (batch,) = DataLoader(dataset, batch_size=1)
    image, _, _, prompts = parser.get_parsed_content("prepare_batch")(batch, torch.device("cpu"))
    batch["pred"] = parser.get_parsed_content("inferer")(image, network, **prompts)
    return parser.get_parsed_content("postprocessing")(decollate_batch(batch)[0])["pred"][0].numpy()


def segment_as_model_zoo(parser: ConfigParser, network: VISTA3D, settings: dict[str, Any]) -> np.ndarray:
    """Run MONAI's parts as the Model Zoo's bundle wires them."""
    spacing, table = parser["spacing"], label_table()
    preprocessing = Compose(
        [
            LoadImaged("image", image_only=True),
            EnsureChannelFirstd("image"),
            EnsureTyped("image", device=torch.device("cpu"), track_meta=True),
            Spacingd("image", pixdim=(spacing, spacing, spacing), mode="bilinear"),
            CropForegroundd("image", allow_smaller=True, margin=10, source_key="image"),
            VistaPreTransformd("image", subclass={str(key): list(parts) for key, parts in table.subclasses.items()}),
            ScaleIntensityRanged("image", *HU_RANGE, b_min=0, b_max=1, clip=True),
            Orientationd("image", axcodes="RAS", labels=None),
            CastToTyped("image", dtype=torch.float32),
        ]
    )
    postprocessing = Compose(
        [VistaPostTransformd("pred"), Invertd("pred", preprocessing, "image", nearest_interp=True, to_tensor=True)]
    )
    dataset = Dataset([{"image": settings["image"], "label_prompt": settings["prompt"]}], preprocessing)
    (batch,) = DataLoader(dataset, batch_size=1)
    prompt = torch.as_tensor([batch["label_prompt"]])[0].reshape(-1, 1)
    inferer = SlidingWindowInfererAdapt(
        roi_size=parser["roi_size"], sw_batch_size=1, with_coord=True, padding_mode="replicate"
    )
    with torch.no_grad():
        batch["pred"] = inferer(
            batch["image"], network, transpose=True, class_vector=prompt, prompt_class=prompt.clone()
        )
    batch["label_prompt"] = prompt[None]
    return postprocessing(decollate_batch(batch)[0])["pred"][0].numpy()


PATHS: dict[str, Callable[[ConfigParser, VISTA3D, dict[str, Any]], np.ndarray]] = {
    "here": segment_here,
    "zoo": segment_as_model_zoo,
}


def resident_mb(peak: bool = False) -> float:
    """Resident memory of this process now, or its largest value since :func:`forget_peak`."""
    field = "VmHWM" if peak else "VmRSS"
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) / 1024


def forget_peak() -> None:
    """Let Linux count the peak anew: imports and loading the weights may have needed more."""
    Path("/proc/self/clear_refs").write_text("5")


def main(settings: dict[str, Any]) -> dict[str, Any]:
    """Segment once; the network is ready before the clock starts."""
    parser = open_config(settings)
    network = load_weights(parser.get_parsed_content("network_def"), settings["checkpoint"])
    if settings["path"] == "zoo":
        network = network.to(memory_format=torch.contiguous_format)
    LoadImaged("image")({"image": settings["image"]})  # imports the readers, which take memory of their own
    forget_peak()
    before = resident_mb()
    start = time.process_time()  # of all threads; other programs on the machine change it little
    labels = PATHS[settings["path"]](parser, network, settings)
    seconds, peak = time.process_time() - start, resident_mb(peak=True)
    np.save(settings["output"], labels.astype(np.uint8))
    return {"seconds": seconds, "peak_mb": peak, "added_mb": peak - before}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
