"""What a training needs beyond MONAI: bfloat16 on any device, going on after a kill, keeping the best weights."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.inferers import SimpleInferer

from vila_m3_common.weights import save_weights

logger = logging.getLogger(__name__)

# Below this the deepest of the network's four levels is 2 voxels wide, where the CPU's bfloat16 gradient of a
# 3 x 3 x 3 kernel holds memory that was never written, NaN included (torch 2.13).
SMALLEST_BFLOAT16_SIZE = 24


class MixedPrecisionInferer(SimpleInferer):
    """Run the network in bfloat16, also on the CPU, where the trainer's own ``amp`` does nothing; weights stay float32.

    Args:
        amp: False computes in float32, as is always done for inputs below ``SMALLEST_BFLOAT16_SIZE``.
    """

    def __init__(self, amp: bool = True) -> None:
        super().__init__()
        self.amp = amp

    def __call__(
        self, inputs: torch.Tensor, network: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return the network's output as float32."""
        enabled = self.amp and min(inputs.shape[2:]) >= SMALLEST_BFLOAT16_SIZE
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=enabled):
            output = super().__call__(inputs, network, *args, **kwargs)
        return output.float()


class ResumableCheckpoint:
    """Save everything that a training needs at the end of each epoch, and go on from there when it is restarted.

    The trainer itself is saved too, so that epochs are not repeated. The last two checkpoints are kept: the
    newest one may be incomplete after a kill.

    Args:
        ckpt_dir: folder of the checkpoints.
        objects: name -> object with a state dict: network, optimizer, scheduler ...
    """

    def __init__(self, ckpt_dir: str | Path, objects: Mapping[str, Any]) -> None:
        self.ckpt_dir = Path(ckpt_dir)
        self.objects = dict(objects)

    def attach(self, engine: Engine) -> None:
        """Register with the trainer."""
        state = {**self.objects, "trainer": engine}
        newest = newest_checkpoint(self.ckpt_dir)
        if newest:
            logger.info("resuming from %s; remove the folder %s to start afresh", newest.name, self.ckpt_dir)
            CheckpointLoader(load_path=str(newest), load_dict=state).attach(engine)
        CheckpointSaver(save_dir=str(self.ckpt_dir), save_dict=state, save_interval=1, n_saved=2).attach(engine)


def newest_checkpoint(ckpt_dir: Path) -> Path | None:
    """Return the newest complete checkpoint of a folder, None if there is none."""
    for path in sorted(ckpt_dir.glob("*.pt"), key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError):
            logger.warning("checkpoint %s is incomplete and is passed over", path)
        else:
            return path
    return None


class ExportBestWeights:
    """After every validation, write the network as safetensors if its key metric is the best so far.

    The best value is part of the checkpoint, so that a resumed training does not overwrite better weights.

    Args:
        network: the network in training.
        path: the safetensors file to write.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path) -> None:
        self.network = network
        self.path = Path(path)
        self.best = float("-inf")

    def attach(self, engine: Engine) -> None:
        """Register with the evaluator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Compare the key metric and write the weights."""
        value = float(engine.state.metrics[engine.state.key_metric_name])
        if value > self.best:
            self.best = value
            save_weights(self.network, self.path)
            logger.info("%s %.4f is the best so far, written to %s", engine.state.key_metric_name, value, self.path)

    def state_dict(self) -> dict[str, float]:
        """Return what a checkpoint keeps."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.best = state["best"]
