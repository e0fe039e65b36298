"""Training of VISTA3D's class branch: where crops lie, the prompts of a crop, the validation metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from ignite.metrics import Metric

from vila_m3_common.training import process_rank

from .labels import label_table
from .transforms import LabelMapping


def label_ratios(tumor_ratio: float, label_mappings: Mapping[str, LabelMapping] | None = None) -> list[float]:
    """Return how often crops are centred on each label, for MONAI's ``RandCropByLabelClasses``.

    Args:
        tumor_ratio: a tumour is chosen this many times as often as an organ or the background; small
            and rare, it is hardly ever in a crop chosen blindly.
        label_mappings: of the data sets, see :class:`.transforms.MapClassesd`.

    Returns:
        one number per label, from 0 (background) to the last class id with a prompt or that is mapped to.
    """
    table = label_table()
    mapped = [int(target) for pairs in (label_mappings or {}).values() for _, target in pairs]
    last = max([*table.promptable(), *mapped])
    return [tumor_ratio if label in table.tumors else 1.0 for label in range(last + 1)]


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
        label_mappings: of the data sets, see :class:`.transforms.MapClassesd`; a mapped data set shows the ids that
            its mapping names, and no others.
        seed: of the choice; several processes of one training draw differently from it.
    """

    def __init__(
        self,
        present_count: int = 16,
        absent_count: int = 4,
        annotated: Sequence[int] | None = None,
        label_mappings: Mapping[str, LabelMapping] | None = None,
        seed: int = 0,
    ) -> None:
        table = label_table()
        self.annotated = np.array(table.promptable() if annotated is None else annotated)
        self.mapped = {
            name: np.unique([int(target) for _, target in pairs]) for name, pairs in (label_mappings or {}).items()
        }
        self.tumors = table.tumors
        self.present_count = present_count
        self.absent_count = absent_count
        self.rng = np.random.default_rng([seed, process_rank()])

    def annotated_in(self, dataset_name: str) -> np.ndarray:
        """Return the ids that the label maps of a data set show where they are."""
        return self.mapped.get(dataset_name, self.mapped.get("default", self.annotated))

    def choose(self, present: np.ndarray, dataset_name: str = "default") -> np.ndarray:
        """Return the ids to prompt for a crop that holds the ids ``present``."""
        annotated = self.annotated_in(dataset_name)
        present = np.intersect1d(present, annotated)
        absent = np.setdiff1d(annotated, present)
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
        (name,) = batch.get("dataset_name", ["default"])
        chosen = torch.as_tensor(self.choose(labels.unique().cpu().numpy().astype(int), name), device=device)
        masks = (labels[0] == chosen.view(-1, 1, 1, 1)).float()[:, None]
        return image, masks, (), {"class_vector": chosen[:, None]}


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
        per_class = [float(np.mean(values)) for values in gather_lists(self._dice).values()]
        return float(np.mean(per_class)) if per_class else 0.0


def gather_lists(values: dict[int, list[float]]) -> dict[int, list[float]]:
    """Join the lists of the same key from all processes of a training; the only process gets its own back."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    parts: list[dict[int, list[float]]] = [{} for _ in range(distributed.get_world_size())]
    distributed.all_gather_object(parts, values)
    return {key: [value for part in parts for value in part.get(key, [])] for key in set().union(*parts)}


def dice(prediction: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the Dice overlap of two masks of which at least one is not empty."""
    shared = torch.logical_and(prediction, truth).sum()
    return float(2 * shared / (prediction.sum() + truth.sum()))
