"""Training an expert on the labels that users have saved; the bundle's own ``train.json`` does it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from filelock import FileLock, Timeout
from ignite.engine import Engine, Events
from monai.bundle import create_workflow

from vila_m3.resumable_files import write_atomically
from vila_m3_common.errors import UserError, find_user_error
from vila_m3_common.expert import ModelCard
from vila_m3_common.hooks import put_on_path, quiet
from vila_m3_common.volumes import load_volume

from .label_maps import load_labels, on_grid
from .models import ViewerModels
from .running import open_for

# Trained further, a network takes a tenth of the steps that a fresh one begins with.
FURTHER_RATE = 0.1


@dataclass(frozen=True)
class LabelledCase:
    """An image with the label that a user saved.

    Args:
        id: of the image in the datastore.
        image: file.
        label: file.
        names: id in the label map -> structure, see :func:`.label_maps.read_names`; empty takes the expert's ids.
    """

    id: str
    image: Path
    label: Path
    names: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainOptions:
    """How long and from where.

    Args:
        epochs: times that every case is seen.
        is_pretrained: whether to begin with the weights that the expert has.
        learning_rate: None takes that of ``train.json``, a tenth of it for pretrained weights.
        val_split: share of the cases that is validated on and not trained on.
        device: None takes the app's.
    """

    epochs: int = 1
    is_pretrained: bool = True
    learning_rate: float | None = None
    val_split: float = 0.2
    device: str | None = None

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise UserError(f"max_epochs is {self.epochs}; give 1 or more")
        if not 0 <= self.val_split < 1:
            raise UserError(f"val_split is {self.val_split}; give a share of the cases, 0 to below 1")


class Stats:
    """What viewers show of a training, as a file that is replaced after every epoch.

    Args:
        path: JSON file.
        epochs: of the training.
    """

    def __init__(self, path: Path, epochs: int) -> None:
        self._path, self._start = path, time.time()
        self.content: dict[str, Any] = {"start_ts": int(self._start), "epoch": 0, "total_epochs": epochs}
        self.write()

    def write(self, **changes: Any) -> None:
        """Write the file with some entries changed."""
        self.content |= changes
        write_atomically(self._path, json.dumps(self.content, indent=2) + "\n")

    def attach(self, trainer: Engine, best: Callable[[], float]) -> None:
        """Write after every epoch of a training; ``best`` tells the best validation so far."""

        def write(engine: Engine) -> None:
            value = best()
            self.write(epoch=engine.state.epoch, **({"best_metric": value} if np.isfinite(value) else {}))

        trainer.add_event_handler(Events.EPOCH_COMPLETED, write)

    def finish(self) -> None:
        """Write how long it took."""
        self.write(total_time=str(timedelta(seconds=int(time.time() - self._start))))


def stats_path(models: ViewerModels, name: str) -> Path:
    """Return the file of :class:`Stats` of an expert."""
    return models.settings.model_dir / f"{name}_stats.json"


def read_stats(models: ViewerModels, name: str) -> dict[str, Any]:
    """Return what was written last about the training of an expert; empty when it was never trained."""
    path = stats_path(models, name)
    return json.loads(path.read_text()) if path.is_file() else {}


def can_be_trained(models: ViewerModels, name: str) -> bool:
    """Return whether an expert segments and has a ``train.json``."""
    return models.expert(name).card.task == "segmentation" and _train_config(models.root(name)).is_file()


def train(
    models: ViewerModels,
    name: str,
    cases: Sequence[LabelledCase],
    ids: Mapping[str, int],
    options: TrainOptions,
) -> dict[str, Any]:
    """Train an expert on labelled cases; the app's next image is segmented with the new weights.

    Cases that cannot be used are left out and listed in the result. The weights that were best in validation are
    published in one step when all epochs are done; until then the old ones stay.

    Args:
        models: of the app.
        name: of the expert.
        cases: at least one of them usable.
        ids: structure -> the expert's id of it.
        options: of the training.

    Returns:
        The content of :class:`Stats`: ``epoch``, ``total_epochs``, ``best_metric``, ``total_time``, ``case_count``,
        ``left_out``.

    Raises:
        UserError: if no case can be used, or a training of this expert is running.
    """
    folder = models.settings.model_dir
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"{name}.lock", timeout=0)
    try:
        with lock:
            return _train(models, name, cases, ids, options, folder / f"{name}_training")
    except Timeout as error:
        raise UserError(f"a training of {name} is running; wait for its end or stop it") from error


def _train(
    models: ViewerModels,
    name: str,
    cases: Sequence[LabelledCase],
    ids: Mapping[str, int],
    options: TrainOptions,
    work: Path,
) -> dict[str, Any]:
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        prepared = prepare_cases(models.expert(name).card, cases, ids, work)
        write_datalist(prepared.entries, options.val_split, work)
        stats = Stats(stats_path(models, name), options.epochs)
        stats.write(case_count=len(prepared.entries), left_out=prepared.left_out, labels=prepared.labels)
        overrides = _overrides(models, name, options, prepared.labels, work)
        _run(models.root(name), overrides, stats)
        (work / "best.safetensors").replace(models.trained_weights(name))
        stats.finish()
        return stats.content
    finally:
        shutil.rmtree(work, ignore_errors=True)


@dataclass(frozen=True)
class Prepared:
    """The usable cases.

    Args:
        entries: ``image`` and ``label`` paths; the label maps hold the expert's ids.
        labels: ids of all structures that are labelled.
        left_out: id of an image -> why it is not used.
    """

    entries: list[dict[str, str]]
    labels: list[int]
    left_out: dict[str, str]


def prepare_cases(card: ModelCard, cases: Sequence[LabelledCase], ids: Mapping[str, int], work: Path) -> Prepared:
    """Write the label maps of usable cases with the expert's ids.

    Raises:
        UserError: if no case is usable.
    """
    entries: list[dict[str, str]] = []
    found: set[int] = set()
    left_out: dict[str, str] = {}
    for number, case in enumerate(cases):
        try:
            labels, affine = _read_case(card, case)
            mapped = map_labels(labels, case.names, ids)
        except Exception as error:
            cause = find_user_error(error)
            if cause is None:
                raise
            left_out[case.id] = str(cause)
            continue
        found |= {int(label) for label in np.unique(mapped) if label}
        path = work / f"label_{number:05d}.nii.gz"
        nib.save(nib.Nifti1Image(mapped, affine), path)
        entries.append({"image": str(case.image), "label": str(path)})
    if not entries:
        listed = "; ".join(f"{case}: {reason}" for case, reason in left_out.items())
        raise UserError(
            "there is no label to train on; save labels of this expert's structures first"
            + (f". Left out: {listed}" if listed else "")
        )
    return Prepared(entries, sorted(found), left_out)


def _read_case(card: ModelCard, case: LabelledCase) -> tuple[np.ndarray, np.ndarray]:
    open_for(card, case.image)
    image = load_volume(case.image)
    return on_grid(*load_labels(case.label), image.array.shape[:3], image.affine), image.affine


def map_labels(labels: np.ndarray, names: Mapping[int, str], ids: Mapping[str, int]) -> np.ndarray:
    """Return a label map with an expert's ids in place of a viewer's.

    Args:
        labels: ``(X, Y, Z)`` uint8.
        names: id in ``labels`` -> structure; empty when the ids are the expert's.
        ids: structure -> the expert's id; names are compared without regard to case.

    Raises:
        UserError: if it holds nothing that the expert knows.
    """
    known = {name.lower(): label for name, label in ids.items()}
    if names:
        pairs = {label: known.get(name.lower(), 0) for label, name in names.items() if 0 < label < 256}
    else:
        pairs = {label: label for label in ids.values()}
    table = np.zeros(256, np.uint8)
    for source, target in pairs.items():
        table[source] = target
    mapped = table[labels]
    if not mapped.any():
        said = ", ".join(names.values()) or ", ".join(str(label) for label in np.unique(labels) if label)
        raise UserError(f"the label holds none of the expert's structures, but {said or 'nothing'}")
    return mapped


def write_datalist(entries: Sequence[dict[str, str]], val_split: float, folder: Path) -> None:
    """Write ``datalist.json``: the last cases are validated on; of a single one, that one."""
    count = min(max(1, round(val_split * len(entries))), max(1, len(entries) - 1))
    training = list(entries[:-count]) or list(entries)
    content = {"training": training, "validation": list(entries[-count:])}
    (folder / "datalist.json").write_text(json.dumps(content, indent=2))


def _train_config(root: Path) -> Path:
    return root / "configs" / "train.json"


def _overrides(models: ViewerModels, name: str, options: TrainOptions, labels: list[int], work: Path) -> dict[str, Any]:
    config = json.loads(_train_config(models.root(name)).read_text())
    current = models.trained_weights(name)
    start = str(current) if current.is_file() else models.expert(name).workflow.parser.get_parsed_content("checkpoint")
    rate = options.learning_rate or config["learning_rate"] * (FURTHER_RATE if options.is_pretrained else 1.0)
    overrides = {
        "dataset_dir": str(work),
        "ckpt_dir": str(work / "checkpoints"),
        "checkpoint_out": str(work / "best.safetensors"),
        "device": options.device or models.device,
        "epochs": options.epochs,
        "val_interval": 1,
        "learning_rate": rate,
        **({"init_checkpoint": start} if options.is_pretrained else {}),
        # Of the promptable network: absent structures are prompted only if users would have labelled them.
        "annotated_labels": labels,
        "validation_prompt": labels,
        "sequence_order": models.overrides.get("sequence_order"),
    }
    return {key: value for key, value in overrides.items() if key in config and value is not None}


def _run(root: Path, overrides: Mapping[str, Any], stats: Stats) -> None:
    put_on_path(root)
    with quiet():
        workflow = create_workflow(
            config_file=str(_train_config(root)),
            meta_file=str(root / "configs" / "metadata.json"),
            workflow_type="train",
            logging_file=False,
            **overrides,
        )
        workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    best = workflow.parser.get_parsed_content("best_weights" if "best_weights" in workflow.parser else "exporter")
    stats.attach(trainer, lambda: best.best)
    workflow.run()
    workflow.finalize()
