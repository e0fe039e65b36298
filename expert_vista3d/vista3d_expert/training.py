"""Training of VISTA3D's class branch: prompts per crop, the crop's forward pass, the best weights, resuming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.engines import Trainer
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.inferers import Inferer
from monai.networks.nets.vista3d import VISTA3D

from vila_m3_common.errors import exits_with_message
from vila_m3_common.weights import save_weights

from .labels import label_table


def label_ratios(tumor_ratio: float) -> list[float]:
    """Return how often crops are centred on each label, for MONAI's ``RandCropByLabelClasses``.

    Args:
        tumor_ratio: a tumour is chosen this many times as often as an organ or the background; small
            and rare, it is hardly ever in a crop chosen blindly.

    Returns:
        one number per label, from 0 (background) to the last class id with a prompt.
    """
    table = label_table()
    return [tumor_ratio if label in table.tumors else 1.0 for label in range(max(table.promptable()) + 1)]


class PromptSampler:
    """Chooses class prompts for a crop and makes their masks; a ``prepare_batch`` of MONAI's trainers.

    Prompted are classes of the crop, its tumours always, and absent classes, one of them a tumour, so
    that a prompt for something that is not there learns to stay empty. More absent tumours would drown
    the rare present ones.

    Args:
        present_count: at most this many classes of the crop beside the tumours.
        absent_count: this many classes that are not in the crop.
        annotated: ids that the label maps would show if they were there; None means all classes with
            a class prompt. Absent prompts are drawn from these only.
        seed: of the choice.
    """

    def __init__(
        self, present_count: int = 16, absent_count: int = 4, annotated: Sequence[int] | None = None, seed: int = 0
    ) -> None:
        table = label_table()
        self.annotated = np.array(table.promptable() if annotated is None else annotated)
        self.tumors = np.intersect1d(table.tumors, self.annotated)
        self.present_count = present_count
        self.absent_count = absent_count
        self.rng = np.random.default_rng(seed)

    def choose(self, present: np.ndarray) -> np.ndarray:
        """Return the ids to prompt for a crop that holds the ids ``present``."""
        present = np.intersect1d(present, self.annotated)
        absent = np.setdiff1d(self.annotated, present)
        chosen = [
            np.intersect1d(present, self.tumors),
            self.rng.permutation(present)[: self.present_count],
            self.rng.permutation(np.intersect1d(absent, self.tumors))[:1],
            self.rng.permutation(absent)[: self.absent_count],
        ]
        return np.unique(np.concatenate(chosen))

    def __call__(
        self, batch: Mapping[str, Any], device: torch.device, non_blocking: bool = False, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor, tuple, dict[str, torch.Tensor]]:
        """Return image ``(1, 1, X, Y, Z)``, masks ``(K, 1, X, Y, Z)``, and ``class_vector`` ``(K, 1)``."""
        image = batch["image"].as_tensor().to(device, non_blocking=non_blocking)
        labels = batch["label"].as_tensor().to(device, non_blocking=non_blocking)
        chosen = torch.as_tensor(self.choose(labels.unique().cpu().numpy().astype(int)), device=device)
        masks = (labels[0] == chosen.view(-1, 1, 1, 1)).float()[:, None]
        return image, masks, (), {"class_vector": chosen[:, None]}


class CropInferer(Inferer):
    """One crop through the network, in bfloat16 when ``amp``; MONAI's own ``amp`` is for CUDA alone."""

    def __init__(self, amp: bool = False) -> None:
        self.amp = amp

    def __call__(
        self, inputs: torch.Tensor, network: VISTA3D, class_vector: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Return float32 logits ``(K, 1, X, Y, Z)``."""
        with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=self.amp):
            return network(inputs, class_vector=class_vector).float()


class MeanLabelDice(Metric):
    """Mean Dice over the classes of all cases, each class averaged over the cases that hold it.

    Fed with (prediction, truth), both lists of label maps ``(1, X, Y, Z)``.
    """

    def reset(self) -> None:
        """Forget all cases."""
        self._dice: dict[int, list[float]] = {}

    def update(self, output: tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        """Add cases."""
        for prediction, truth in zip(*output, strict=True):
            for label in torch.unique(truth).int().tolist():
                if label:
                    self._dice.setdefault(label, []).append(dice(prediction == label, truth == label))

    def compute(self) -> float:
        """Return the mean, 0 without cases."""
        per_class = [float(np.mean(values)) for values in self._dice.values()]
        return float(np.mean(per_class)) if per_class else 0.0


def dice(prediction: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the Dice overlap of two masks of which at least one is not empty."""
    shared = torch.logical_and(prediction, truth).sum()
    return float(2 * shared / (prediction.sum() + truth.sum()))


class BestWeights:
    """Handler of the validation evaluator: writes the weights whenever the metric is the best so far.

    Args:
        network: whose weights.
        path: ``.safetensors`` file.
        metric: name among the evaluator's metrics; larger is better.
    """

    def __init__(self, network: torch.nn.Module, path: str, metric: str) -> None:
        self.network = network
        self.path = path
        self.metric = metric
        self.best = float("-inf")

    def attach(self, engine: Engine) -> None:
        """Look at the metric after every validation."""
        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Save when better."""
        value = float(engine.state.metrics[self.metric])
        if value > self.best:
            self.best = value
            save_weights(self.network, self.path)

    def state_dict(self) -> dict[str, float]:
        """Return the best value, so that a resumed training does not overwrite better weights."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up the best value of an interrupted training."""
        self.best = float(state["best"])


@exits_with_message
def run_training(trainer: Trainer, ckpt_dir: str, resumed: dict[str, Any], checkpoint_out: str) -> None:
    """Train, going on from the newest checkpoint of ``ckpt_dir`` when there is one.

    Args:
        trainer: MONAI trainer; its state is saved after every epoch, with that of ``resumed``.
        ckpt_dir: folder of the checkpoints; the newest one is kept.
        resumed: name -> object with a state: network, optimizer ...
        checkpoint_out: the file that :class:`BestWeights` writes, for the closing message.
    """
    objects = {**resumed, "trainer": trainer}
    newest = newest_checkpoint(ckpt_dir)
    if newest is not None:
        epoch = _epoch_of(newest)
        if epoch >= trainer.state.max_epochs:
            print(f"training is complete ({epoch} epochs); to train anew remove {ckpt_dir}")
            return
        print(f"going on after epoch {epoch}, from {newest}")
        CheckpointLoader(load_path=str(newest), load_dict=objects, map_location="cpu").attach(trainer)
    CheckpointSaver(ckpt_dir, objects, file_prefix="training", save_interval=1, n_saved=1).attach(trainer)
    trainer.run()
    print(f"best weights are in {checkpoint_out}")


def newest_checkpoint(ckpt_dir: str) -> Path | None:
    """Return the checkpoint of the latest epoch (``..._epoch=12.pt``), None when there is none."""
    return max(Path(ckpt_dir).glob("*_epoch=*.pt"), key=_epoch_of, default=None)


def _epoch_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.rpartition("=")[2])
