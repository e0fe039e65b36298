"""Handlers that every training config of the collection uses: progress bar and resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.handlers import CheckpointLoader


class ResumableCheckpoint:
    """Saves a training's state after every epoch and continues from it when the run starts again.

    The file is replaced in one step, so a kill while writing leaves the previous epoch's state.

    Args:
        path: file of the state, such as ``<ckpt_dir>/training.pt``.
        save_dict: what to save: network, optimizer, scheduler, ...; the trainer is added.
    """

    def __init__(self, path: str, save_dict: dict[str, Any]) -> None:
        self.path = Path(path)
        self.save_dict = save_dict

    def attach(self, engine: Engine) -> None:
        """Attach the saver and, when there is something to continue, the loader."""
        state = {**self.save_dict, "trainer": engine}
        if self.path.is_file():
            CheckpointLoader(load_path=str(self.path), load_dict=state).attach(engine)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save, state)

    def _save(self, engine: Engine, state: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({name: part.state_dict() for name, part in state.items()}, partial)
        partial.replace(self.path)


class LossProgressBar:
    """A progress bar over the iterations of each epoch, with the loss."""

    def attach(self, engine: Engine) -> None:
        """Attach the bar to a MONAI trainer."""
        ProgressBar(persist=True).attach(engine, output_transform=_loss)


def _loss(output: Any) -> dict[str, float]:
    first = output[0] if isinstance(output, list) else output
    return {"loss": float(first["loss"])}
