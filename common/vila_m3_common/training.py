"""What the trainings of the collection share: bfloat16 on any device, going on after a kill, the best weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines import Trainer
from monai.handlers import CheckpointLoader
from monai.inferers import SimpleInferer

from .errors import exits_with_message
from .weights import save_weights

# Below this the deepest of four levels is 2 voxels wide, where the CPU's bfloat16 gradient of a 3 x 3 x 3 kernel
# holds memory that was never written, NaN included (torch 2.13).
SMALLEST_BFLOAT16_SIZE = 24


def process_rank() -> int:
    """Return the rank among the processes of a training; 0 for the only one."""
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def is_main_process() -> bool:
    """Return whether this process writes files: the only one, or rank 0 of several."""
    return process_rank() == 0


def gather_rows(rows: list[Any]) -> list[Any]:
    """Return the rows of all processes, rank by rank; those of this one where there is no other."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts: list[list[Any]] = [[] for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, rows)
    return [row for part in parts for row in part]


def bfloat16(device: torch.device, enabled: bool = True) -> AbstractContextManager:
    """Return a context in which ``device``, the CPU too, computes in bfloat16 where that is sound."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


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
        """Return the network's output as float32; further arguments go to the network."""
        with bfloat16(inputs.device, self.amp and min(inputs.shape[2:]) >= SMALLEST_BFLOAT16_SIZE):
            output = super().__call__(inputs, network, *args, **kwargs)
        return output.float()


class ResumableCheckpoint:
    """Saves a training's state after every epoch and continues from it when the run starts again.

    The file is replaced in one step, so a kill while writing leaves the previous epoch's state. Of several
    processes only rank 0 writes, and all of them read.

    Args:
        path: file of the state, such as ``<ckpt_dir>/training.pt``.
        save_dict: what to save: network, optimizer, scheduler, ...; the trainer is added.
    """

    def __init__(self, path: str | Path, save_dict: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.save_dict = dict(save_dict)

    def attach(self, engine: Engine) -> None:
        """Attach the saver and, when there is something to continue, the loader.

        Attach it after validation and :class:`BestWeights`, so that what they changed is saved with the epoch.
        """
        state = {**self.save_dict, "trainer": engine}
        if self.path.is_file():
            CheckpointLoader(load_path=str(self.path), load_dict=state, map_location="cpu").attach(engine)
            engine.add_event_handler(Events.STARTED, self._tell)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save, state)

    def _tell(self, engine: Engine) -> None:
        epoch = engine.state.epoch
        if not is_main_process():
            return
        if epoch >= (engine.state.max_epochs or epoch + 1):
            print(f"training is complete ({epoch} epochs); to train anew remove {self.path}")
        else:
            print(f"going on after epoch {epoch}, from {self.path}")

    def _save(self, engine: Engine, state: Mapping[str, Any]) -> None:
        if not is_main_process():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({name: part.state_dict() for name, part in state.items()}, partial)
        partial.replace(self.path)


class BestWeights:
    """Handler of the validation evaluator: writes the weights whenever a metric is the best so far.

    The best value is part of a :class:`ResumableCheckpoint` that holds this object, so that a resumed training does
    not overwrite better weights.

    Args:
        network: whose weights.
        path: ``.safetensors`` file.
        metric: name among the evaluator's metrics, larger is better; None takes its key metric.
    """

    def __init__(self, network: torch.nn.Module, path: str | Path, metric: str | None = None) -> None:
        self.network = network
        self.path = Path(path)
        self.metric = metric
        self.best = float("-inf")

    def attach(self, engine: Engine) -> None:
        """Look at the metric after every validation."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save when better."""
        value = float(engine.state.metrics[self.metric or engine.state.key_metric_name])
        if value > self.best:
            self.best = value
            if is_main_process():
                save_weights(self.network, self.path)

    def state_dict(self) -> dict[str, float]:
        """Return the best value."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up the best value of an interrupted training."""
        self.best = float(state["best"])


class LossProgressBar:
    """A progress bar over the iterations of each epoch, with the loss."""

    def attach(self, engine: Engine) -> None:
        """Attach the bar to a MONAI trainer."""
        ProgressBar(persist=True).attach(engine, output_transform=_loss)


def _loss(output: Any) -> dict[str, float]:
    first = output[0] if isinstance(output, list) else output
    return {"loss": float(first["loss"])}


@exits_with_message
def run_training(trainer: Trainer, checkpoint_out: str | Path) -> None:
    """Train; what a user can mend ends the process with a message.

    Args:
        trainer: MONAI trainer with its handlers.
        checkpoint_out: the file that :class:`BestWeights` writes, for the closing message.
    """
    trainer.run()
    if is_main_process():
        print(f"best weights are in {checkpoint_out}")
