"""What an evaluation says: per argument of the card and per class, Dice, sensitivity and specificity."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from ignite.engine import Engine, Events
from monai.engines import Evaluator

from vila_m3_common.errors import exits_with_message
from vila_m3_common.standalone import make_output_dir
from vila_m3_common.training import gather_rows, is_main_process

from .labels import NewClasses, label_table, read_new_classes
from .training import dice


@dataclass(frozen=True)
class ClassResult:
    """One class of one case.

    Args:
        argument: what the case was asked for.
        label: the class's id.
        dice: None where the case does not hold the class.
        is_predicted: whether any voxel was predicted.
    """

    argument: str
    label: int
    dice: float | None
    is_predicted: bool


@dataclass
class ClassTally:
    """One class over all cases of one argument.

    Args:
        dice: one value per case that holds the class.
        found_count: those of them where prediction and truth overlap.
        absent_count: cases without the class.
        false_positive_count: those of them where the class was predicted.
    """

    dice: list[float] = field(default_factory=list)
    found_count: int = 0
    absent_count: int = 0
    false_positive_count: int = 0

    def add(self, result: ClassResult) -> None:
        """Count one case."""
        if result.dice is None:
            self.absent_count += 1
            self.false_positive_count += result.is_predicted
        else:
            self.dice.append(result.dice)
            self.found_count += result.dice > 0

    def summary(self) -> dict[str, Any]:
        """Return the figures; None where no case tells."""
        present_count, absent_count = len(self.dice), self.absent_count
        return {
            "dice": round(float(np.mean(self.dice)), 4) if present_count else None,
            "present_count": present_count,
            "sensitivity": round(self.found_count / present_count, 4) if present_count else None,
            "absent_count": absent_count,
            "specificity": round(1 - self.false_positive_count / absent_count, 4) if absent_count else None,
        }


class SegmentationReport:
    """Handler of an evaluator: writes ``metrics.json`` and prints the means.

    Its items carry ``argument`` and ``label_prompt``, see :func:`.data.evaluation_items`. A class counts
    as found in a case when prediction and truth overlap at all. Of several processes each counts its own items,
    and rank 0 writes what all of them say.

    Args:
        output_dir: folder for ``metrics.json``; created when missing.
        new_classes: see :func:`.labels.read_new_classes`.
    """

    def __init__(self, output_dir: str, new_classes: NewClasses = None) -> None:
        self.output_dir = output_dir
        self.names = {**label_table().names, **read_new_classes(new_classes)}
        self._results: list[ClassResult] = []

    def attach(self, engine: Engine) -> None:
        """Count after every item, write after the last."""
        engine.add_event_handler(Events.STARTED, self.reset)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.add_items)
        engine.add_event_handler(Events.COMPLETED, self.write)

    def reset(self, engine: Engine | None = None) -> None:
        """Forget all cases."""
        self._results = []

    def add_items(self, engine: Engine) -> None:
        """Count the items of one iteration."""
        for item, output in zip(engine.state.batch, engine.state.output, strict=True):
            self.add(item["argument"], json.loads(item["label_prompt"]), output["pred"], output["label"])

    def add(self, argument: str, labels: Sequence[int], prediction: torch.Tensor, truth: torch.Tensor) -> None:
        """Count one case; ``prediction`` and ``truth`` are label maps of one shape."""
        for label in labels:
            found, present = prediction == label, truth == label
            score = dice(found, present) if present.any() else None
            self._results.append(ClassResult(argument, label, score, bool(found.any())))

    def summary(self) -> dict[str, Any]:
        """Return argument -> mean Dice over the classes that occur, and the figures of every class.

        Of several processes each has to call it.
        """
        tallies: dict[str, dict[int, ClassTally]] = defaultdict(lambda: defaultdict(ClassTally))
        for result in gather_rows(self._results):
            tallies[result.argument][result.label].add(result)
        return {
            argument: _summarize({self.names[label]: tally.summary() for label, tally in sorted(of_argument.items())})
            for argument, of_argument in tallies.items()
        }

    def write(self, engine: Engine | None = None) -> None:
        """Write ``metrics.json`` and print one line per argument and per tumour."""
        summary = self.summary()
        if not is_main_process():
            return
        path = make_output_dir(self.output_dir) / "metrics.json"
        path.write_text(json.dumps(summary, indent=2) + "\n")
        for argument, figures in summary.items():
            print(f"{argument}: mean Dice {figures['mean_dice']} over {figures['class_count']} classes")
            for name, row in figures["classes"].items():
                if name == argument:
                    print(f"  {name}: Dice {row['dice']}, {_rates(row)}")
        print(f"written to {path}")


def _rates(row: Mapping[str, Any]) -> str:
    return (
        f"sensitivity {row['sensitivity']} ({row['present_count']} cases), "
        f"specificity {row['specificity']} ({row['absent_count']} cases)"
    )


def _summarize(classes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    values = [row["dice"] for row in classes.values() if row["dice"] is not None]
    mean = round(float(np.mean(values)), 4) if values else None
    return {"mean_dice": mean, "class_count": len(values), "classes": classes}


@exits_with_message
def run_evaluation(evaluator: Evaluator) -> None:
    """Run the evaluator; what a user can mend ends the process with a message."""
    evaluator.run()
