"""Writes a segmentation bundle as the Model Zoo has them: configs only, no hooks."""

import json
from pathlib import Path
from typing import Any

METADATA = {
    "version": "0.1.0",
    "task": "Bone segmentation",
    "description": "Labels what is denser than 100 HU.",
    "eval_metrics": {"mean_dice": 0.9},
    "network_data_format": {
        "inputs": {"image": {"modality": "CT", "num_channels": 1}},
        "outputs": {"pred": {"num_channels": 2, "channel_def": {"0": "background", "1": "bone"}}},
    },
}

INFERENCE = {
    "imports": ["$import torch"],
    "bundle_root": ".",
    "device": "$torch.device('cpu')",
    "network_def": {"_target_": "torch.nn.Identity"},
    "dataset": {
        "_target_": "Dataset",
        "data": [],
        "transform": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
            ],
        },
    },
    "dataloader": {"_target_": "DataLoader", "dataset": "@dataset", "batch_size": 1, "num_workers": 0},
    "inferer": {"_target_": "SimpleInferer"},
    "postprocessing": {
        "_target_": "Compose",
        "transforms": [{"_target_": "AsDiscreted", "keys": "pred", "threshold": 100}],
    },
    "evaluator": {
        "_target_": "SupervisedEvaluator",
        "device": "@device",
        "val_data_loader": "@dataloader",
        "network": "@network_def",
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
    },
    "run": ["$@evaluator.run()"],
}

HOOKS = {
    "model_card": {
        "_target_": "vila_m3_common.expert.ModelCard",
        "name": "TOY",
        "modality": "CT",
        "task": "segmentation",
        "overview": "bone",
        "accuracy": "none",
    },
    "expert_request": "$lambda request: {'image': request.image_paths[0]}",
    "expert_feedback": "$lambda output: output['pred'].sum()",
}


def write_bundle(folder: Path, metadata: dict[str, Any] | None = None, inference: dict[str, Any] | None = None) -> Path:
    """Write the toy bundle with entries added to its metadata and its inference config."""
    (folder / "configs").mkdir(parents=True)
    (folder / "configs/metadata.json").write_text(json.dumps({**METADATA, **(metadata or {})}))
    (folder / "configs/inference.json").write_text(json.dumps({**INFERENCE, **(inference or {})}))
    return folder
