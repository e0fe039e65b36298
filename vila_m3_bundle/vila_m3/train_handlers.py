"""Handlers of a training: progress, generated validation, the best weights as a checkpoint with its model card."""

from __future__ import annotations

import copy
import json
import logging
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from ignite.engine import Events
from ignite.engine.events import EventEnum
from ignite.handlers import ProgressBar
from torch.distributed.fsdp import FSDPModule

from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError
from vila_m3_common.training import is_main_process, process_rank
from vila_m3_common.trigger import parse_triggers

from .adapters import merge_adapter
from .answer import Answerer
from .batches import MixtureDataset, pack_items
from .data.mixture import Mixture
from .export import save_one_folder, save_released
from .model import VilaM3ForConditionalGeneration
from .processor import VilaM3Processor, build_processor
from .resumable_files import recover_folder, replace_folder, write_atomically
from .run_state import sha256_of, together
from .trainer import StageTrainer, SupervisedLoss, generating, supervised_count, whole_model, world_size

logger = logging.getLogger(__name__)


class Schedule:
    """Moves the learning rate on after every step.

    Args:
        scheduler: any of torch's.
    """

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def attach(self, engine: StageTrainer) -> None:
        """Attach before the handler that saves the training's state."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.scheduler.step())


class StepProgress:
    """A progress bar (with the time left) of loss, learning rate, tokens and images a second, and memory.

    The same figures of this process stand in ``engine.state.metrics``, where tracking handlers find them; ``waiting``
    is the share of a step's time that was spent on getting its data. Validation and checkpoints are not counted.
    """

    def __init__(self) -> None:
        self._start = 0.0
        self._got = 0.0

    def attach(self, engine: StageTrainer) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.GET_BATCH_STARTED, self._begin)
        engine.add_event_handler(Events.GET_BATCH_COMPLETED, self._get)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end)
        if is_main_process():
            bar = ProgressBar(persist=True)
            bar.attach(engine, metric_names=["loss", "lr", "tokens/s", "images/s", "GiB"])

    def _begin(self) -> None:
        self._start = time.perf_counter()

    def _get(self) -> None:
        self._got = time.perf_counter()

    def _end(self, engine: StageTrainer) -> None:
        seconds = time.perf_counter() - self._start
        (output,) = cast(list[dict[str, Any]], engine.state.output)
        engine.state.metrics |= {
            "loss": output["loss"],
            "lr": engine.optimizer.param_groups[0]["lr"],
            "tokens/s": output["tokens"] / seconds,
            "images/s": output["images"] / seconds,
            "waiting": (self._got - self._start) / seconds,
            "GiB": memory_in_use() / 2**30,
        }


def memory_in_use() -> int:
    """Return the most bytes that this process has held: on the accelerator, or else in main memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak


class ValidationEvents(EventEnum):
    """When the metrics of a validation are known."""

    VALIDATED = "validated"


@dataclass
class _Held:
    """What one process found about its held-out conversations."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    loss: float = 0.0
    supervised: int = 0


class GeneratedValidation:
    """Generates the assistant's turns of held-out conversations and compares them with the true ones.

    Each turn is generated greedily after the true turns before it. ``engine.state.metrics`` then has ``exact_match``
    (share of turns that are reproduced to the letter), ``trigger_accuracy`` (share of turns that call the experts
    that they should, none included) and ``held_out_loss`` (mean over supervised tokens). With a moving average it is
    the average that is validated. Processes share the conversations among them; those of ``fsdp``, which can only
    compute together, go through all of them together.

    Args:
        model: the trained model.
        processor: its processor.
        dataset: held-out conversations; None validates nothing.
        folder: gets ``samples_<epoch>_<step>.jsonl`` with the generated turns.
        interval: epochs between validations.
        step_interval: steps between validations within an epoch; None for none.
        count: conversations at most.
        max_new_tokens: of a turn.
    """

    def __init__(
        self,
        model: VilaM3ForConditionalGeneration,
        processor: VilaM3Processor,
        dataset: MixtureDataset | None,
        folder: str | Path,
        interval: int = 1,
        step_interval: int | None = None,
        count: int = 64,
        max_new_tokens: int = 256,
    ) -> None:
        self.model = model
        self.processor = processor
        self.dataset = dataset
        self.folder = Path(folder)
        self.interval = interval
        self.step_interval = step_interval
        self.count = count
        self.max_new_tokens = max_new_tokens

    def attach(self, engine: StageTrainer) -> None:
        """Attach before the handler that saves the training's state."""
        engine.register_events(*ValidationEvents)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)
        if self.step_interval is not None:
            engine.add_event_handler(Events.ITERATION_COMPLETED(event_filter=self._is_due), self)

    def _is_due(self, engine: StageTrainer, step: int) -> bool:
        # What falls on the end of an epoch is left to the validation of the epoch.
        return step % (self.step_interval or 1) == 0 and step % (engine.state.epoch_length or step) != 0

    def __call__(self, engine: StageTrainer) -> None:
        """Validate, write the samples, set the metrics.

        Raises:
            UserError: if there is nothing to generate, or the samples cannot be written.
        """
        if self.dataset is not None:
            with engine.average.applied(), generating(engine.network):
                held = self._gather(self._look(engine, self.dataset), engine)
            engine.state.metrics |= self._metrics(held)
            problem = together(lambda: self._write(held.rows, engine) if is_main_process() else None)
            if problem is not None:
                raise UserError(
                    f"{self.folder} could not be written ({problem}); make room and start again, the training goes on "
                    "from its last checkpoint"
                )
        engine.fire_event(ValidationEvents.VALIDATED)

    def _look(self, engine: StageTrainer, dataset: MixtureDataset) -> _Held:
        """Generate the turns, and compute the loss, of this process's conversations."""
        held, (first, every) = _Held(), self._share(engine)
        device = torch.device(engine.state.device)
        self.model.eval()
        answer = Answerer(self.model, self.processor, max_new_tokens=self.max_new_tokens)
        loss = SupervisedLoss(self.model)
        with torch.autocast(device.type, engine.amp_dtype, enabled=engine.amp_dtype != torch.float32):
            for item, conversation, encoded in dataset.shown(self.count, first, every):
                micro = pack_items([encoded], len(encoded.input_ids))
                held.supervised += supervised_count(micro)
                with torch.no_grad():
                    held.loss += float(loss(**{name: value.to(device) for name, value in micro.items()}))
                held.rows += self._turns(item.record.id, conversation, answer)
        engine.network.train()
        return held

    def _share(self, engine: StageTrainer) -> tuple[int, int]:
        return (0, 1) if isinstance(engine.network, FSDPModule) else (process_rank(), world_size())

    def _gather(self, held: _Held, engine: StageTrainer) -> _Held:
        if self._share(engine)[1] == 1:
            return held
        parts: list[Any] = [None] * world_size()
        dist.all_gather_object(parts, held)
        rows = [row for part in parts for row in part.rows]
        return _Held(rows, sum(part.loss for part in parts), sum(part.supervised for part in parts))

    def _metrics(self, held: _Held) -> dict[str, float]:
        if not held.rows:
            raise UserError("the held-out conversations have no assistant turn to generate; give others")
        return {
            "exact_match": sum(row["is_exact"] for row in held.rows) / len(held.rows),
            "trigger_accuracy": sum(row["is_trigger_right"] for row in held.rows) / len(held.rows),
            "held_out_loss": held.loss / max(1, held.supervised),
        }

    def _write(self, rows: Sequence[Mapping[str, Any]], engine: StageTrainer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        write_atomically(self.folder / f"samples_{engine.state.epoch:04d}_{engine.state.iteration:08d}.jsonl", lines)

    def _turns(self, name: str, whole: Conversation, answer: Answerer) -> list[dict[str, Any]]:
        rows = []
        for number, turn in enumerate(whole.turns):
            if turn.role == "assistant":
                generated = "".join(answer(Conversation(list(whole.turns[:number]))))
                rows.append({"id": name, "turn": number, **compare_turns(generated, turn.text)})
        return rows


def compare_turns(generated: str, expected: str) -> dict[str, Any]:
    """Return both texts and whether they, and the experts they call, are the same."""
    return {
        "generated": generated,
        "expected": expected,
        "is_exact": generated.strip() == expected.strip(),
        "is_trigger_right": list(map(str, parse_triggers(generated))) == list(map(str, parse_triggers(expected))),
    }


class BestCheckpoint:
    """Writes the model in both layouts, with a model card, at the best value of a metric so far.

    Args:
        model: the trained model; an adapter in it is merged in the written copy.
        processor: its processor.
        folder: the released layout; ``one_folder`` below it has the other, which ``transformers`` reads too. It is
            replaced in one step, so that a kill or a full disk leaves the one before.
        metric: key of ``engine.state.metrics``; larger is better, unless it is a loss. ``last`` writes at every
            validation, for a training whose schedule makes its end the best.
        dtype: of the written tensors.
        facts: the configuration, for the card.
        data: name -> conversations, which the card describes with the hashes of their files.
    """

    def __init__(
        self,
        model: VilaM3ForConditionalGeneration,
        processor: VilaM3Processor,
        folder: str | Path,
        metric: str = "exact_match",
        dtype: str = "bfloat16",
        facts: Mapping[str, Any] | None = None,
        data: Mapping[str, MixtureDataset | None] | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.folder = Path(folder)
        self.metric = metric
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.facts = dict(facts or {})
        self.data = {name: dataset for name, dataset in (data or {}).items() if dataset is not None}
        self.best = float("-inf")

    def attach(self, engine: StageTrainer) -> None:
        """Attach before the handler that saves the training's state."""
        engine.register_events(*ValidationEvents)
        engine.add_event_handler(Events.STARTED, self._recover)
        engine.add_event_handler(ValidationEvents.VALIDATED, self)

    def _recover(self) -> None:
        if is_main_process():
            recover_folder(self.folder)

    def __call__(self, engine: StageTrainer) -> None:
        """Write when better.

        Raises:
            UserError: if there is no such metric, or the folder cannot be written.
        """
        metrics = {**engine.state.metrics, "last": engine.state.iteration}
        if self.metric not in metrics:
            raise UserError(f"no metric {self.metric!r} to choose the best by; there are {', '.join(metrics)}")
        value = float(metrics[self.metric]) * (-1 if self.metric.endswith("loss") else 1)
        if value <= self.best:
            return
        with engine.average.applied():
            model = whole_model(self.model, engine.network)
            problem = together(lambda: self._write(engine, model) if is_main_process() and model is not None else None)
        if problem is not None:
            raise UserError(
                f"{self.folder} could not be written ({problem}); what stood there still does. Make room and start "
                "again, the training goes on from its last checkpoint"
            )
        self.best = value

    def _write(self, engine: StageTrainer, model: VilaM3ForConditionalGeneration) -> None:
        """Write into a folder beside it first, so that a kill or a full disk leaves the last one whole."""
        adapter = getattr(model, "adapter", None)
        if adapter is not None:
            model = merge_adapter(copy.deepcopy(adapter))
        # In use the model has its own template and length, whatever this stage trained with.
        processor = build_processor(self.processor.tokenizer, model.config)
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            save_released(model, processor, partial, self.dtype)
            save_one_folder(model, processor, partial / "one_folder")
            (partial / "model_card.json").write_text(json.dumps(self._card(engine), indent=2, default=str) + "\n")
            replace_folder(partial, self.folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _card(self, engine: StageTrainer) -> dict[str, Any]:
        return {
            "config": self.facts,
            "data": self._described,
            "revision": git_revision(),
            "epoch": engine.state.epoch,
            "step": engine.state.iteration,
            "metrics": {name: float(value) for name, value in engine.state.metrics.items()},
        }

    @cached_property
    def _described(self) -> dict[str, Any]:
        return {name: describe_mixture(dataset.mixture) for name, dataset in self.data.items()}

    def state_dict(self) -> dict[str, float]:
        """Return the best value."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up the best value of an interrupted training."""
        self.best = float(state["best"])


def describe_mixture(mixture: Mixture) -> dict[str, Any]:
    """Return what a mixture is made of: rows, repeats and the SHA-256 of every file, by data set."""
    data_sets = {
        data_set.name: {
            "rows": len(data_set),
            "repeats": mixture.repeats_of(data_set),
            "sha256": {str(file.path.name): sha256_of(file.path) for file in data_set.files},
        }
        for data_set in mixture.data_sets
    }
    kind = {"balance": mixture.balance, "temperature": mixture.temperature}
    return {**kind, "left_out": mixture.skipped, "data_sets": data_sets}


def git_revision() -> str | None:
    """Return the commit of the checkout that this file belongs to; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
