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
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Events
from ignite.handlers import ProgressBar

from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError
from vila_m3_common.training import is_main_process
from vila_m3_common.trigger import parse_triggers

from .adapters import merge_adapter
from .answer import Answerer
from .batches import RecordDataset
from .data.record import to_conversation
from .export import save_one_folder, save_released
from .model import VilaM3ForConditionalGeneration
from .processor import VilaM3Processor, build_processor
from .run_state import sha256_of
from .trainer import StageTrainer, whole_model, world_size

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

    The same figures of this process stand in ``engine.state.metrics``, where tracking handlers find them.
    """

    def __init__(self) -> None:
        self._start = 0.0

    def attach(self, engine: StageTrainer) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._end)
        if is_main_process():
            bar = ProgressBar(persist=True)
            bar.attach(engine, metric_names=["loss", "lr", "tokens/s", "images/s", "GiB"])

    def _begin(self, engine: StageTrainer) -> None:
        self._start = time.perf_counter()

    def _end(self, engine: StageTrainer) -> None:
        seconds = time.perf_counter() - self._start
        output: Any = engine.state.output
        engine.state.metrics |= {
            "loss": output["loss"],
            "lr": engine.optimizer.param_groups[0]["lr"],
            "tokens/s": output["tokens"] / seconds,
            "images/s": output["images"] / seconds,
            "GiB": memory_in_use() / 2**30,
        }


def memory_in_use() -> int:
    """Return the most bytes that this process has held: on the accelerator, or else in main memory."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak


class GeneratedValidation:
    """Generates the assistant's turns of held-out conversations after epochs and compares them with the true ones.

    Each turn is generated greedily after the true turns before it. ``engine.state.metrics`` then has ``exact_match``
    (share of turns that are reproduced to the letter) and ``trigger_accuracy`` (share of turns that call the experts
    that they should, none included).

    Args:
        model: the trained model.
        processor: its processor.
        dataset: held-out records.
        folder: gets ``samples_<epoch>.jsonl`` with the generated turns.
        interval: epochs between validations.
        count: conversations at most.
        max_new_tokens: of a turn.
    """

    def __init__(
        self,
        model: VilaM3ForConditionalGeneration,
        processor: VilaM3Processor,
        dataset: RecordDataset,
        folder: str | Path,
        interval: int = 1,
        count: int = 64,
        max_new_tokens: int = 256,
    ) -> None:
        self.model = model
        self.processor = processor
        self.dataset = dataset
        self.folder = Path(folder)
        self.interval = interval
        self.count = count
        self.max_new_tokens = max_new_tokens

    def attach(self, engine: StageTrainer) -> None:
        """Attach before :class:`BestCheckpoint` and the handler that saves the training's state."""
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self)

    def __call__(self, engine: StageTrainer) -> None:
        """Validate, write the samples, set the metrics."""
        model = whole_model(self.model, engine.network)
        found = self._metrics(model, engine.state.epoch) if is_main_process() and model is not None else None
        if world_size() > 1:
            shared = [found]
            dist.broadcast_object_list(shared, src=0)
            found = shared[0]
        if not found:
            raise UserError("the held-out conversations have no assistant turn to generate; give others")
        engine.state.metrics |= found

    def _metrics(self, model: VilaM3ForConditionalGeneration, epoch: int) -> dict[str, float]:
        """Generate, write the samples, and return the metrics; none without a turn."""
        answer = Answerer(model.eval(), self.processor, max_new_tokens=self.max_new_tokens)
        rows = [row for index in range(min(self.count, len(self.dataset))) for row in self._turns(index, answer)]
        model.train()
        self.folder.mkdir(parents=True, exist_ok=True)
        lines = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        (self.folder / f"samples_{epoch:04d}.jsonl").write_text(lines)
        if not rows:
            return {}
        return {
            "exact_match": sum(row["is_exact"] for row in rows) / len(rows),
            "trigger_accuracy": sum(row["is_trigger_right"] for row in rows) / len(rows),
        }

    def _turns(self, index: int, answer: Answerer) -> list[dict[str, Any]]:
        record = self.dataset.records[index]
        whole = to_conversation(record, self.dataset.image_root)
        rows = []
        for number, turn in enumerate(whole.turns):
            if turn.role == "assistant":
                generated = "".join(answer(Conversation(list(whole.turns[:number]))))
                rows.append({"id": record.id, "turn": number, **compare_turns(generated, turn.text)})
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
        folder: the released layout; ``one_folder`` below it has the other, which ``transformers`` reads too.
        metric: key of ``engine.state.metrics``; larger is better, unless it is a loss.
        dtype: of the written tensors.
        facts: what the card tells of the training: configuration, mixture, ...
        files: data files whose hashes the card records.
    """

    def __init__(
        self,
        model: VilaM3ForConditionalGeneration,
        processor: VilaM3Processor,
        folder: str | Path,
        metric: str = "exact_match",
        dtype: str = "bfloat16",
        facts: Mapping[str, Any] | None = None,
        files: Sequence[str | Path] = (),
    ) -> None:
        self.model = model
        self.processor = processor
        self.folder = Path(folder)
        self.metric = metric
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.facts = dict(facts or {})
        self.files = [Path(file) for file in files]
        self.best = float("-inf")

    def attach(self, engine: StageTrainer) -> None:
        """Attach behind the validation and before the handler that saves the training's state."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: StageTrainer) -> None:
        """Write when better.

        Raises:
            UserError: if there is no such metric.
        """
        metrics = engine.state.metrics
        if self.metric not in metrics:
            raise UserError(f"no metric {self.metric!r} to choose the best by; there are {', '.join(metrics)}")
        value = float(metrics[self.metric]) * (-1 if self.metric.endswith("loss") else 1)
        if value > self.best:
            self.best = value
            model = whole_model(self.model, engine.network)
            if is_main_process() and model is not None:
                self._write(engine, model)

    def _write(self, engine: StageTrainer, model: VilaM3ForConditionalGeneration) -> None:
        """Write into a folder beside it first, so that a kill or a full disk leaves the last one whole."""
        adapter = getattr(model, "adapter", None)
        if adapter is not None:
            model = merge_adapter(copy.deepcopy(adapter))
        # In use the model has its own template and length, whatever this stage trained with.
        processor = build_processor(self.processor.tokenizer, model.config)
        partial = self.folder.with_name(f"{self.folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        save_released(model, processor, partial, self.dtype)
        save_one_folder(model, processor, partial / "one_folder")
        (partial / "model_card.json").write_text(json.dumps(self._card(engine), indent=2, default=str) + "\n")
        shutil.rmtree(self.folder, ignore_errors=True)
        partial.replace(self.folder)

    def _card(self, engine: StageTrainer) -> dict[str, Any]:
        return {
            **self.facts,
            "data": {file.name: sha256_of(file) for file in self.files},
            "revision": git_revision(),
            "epoch": engine.state.epoch,
            "step": engine.state.iteration,
            "metrics": {name: float(value) for name, value in engine.state.metrics.items()},
        }

    def state_dict(self) -> dict[str, float]:
        """Return the best value."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take up the best value of an interrupted training."""
        self.best = float(state["best"])


def git_revision() -> str | None:
    """Return the commit of the checkout that this file belongs to; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
