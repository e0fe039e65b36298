"""Small conversations on disk and trainings on them."""

import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from PIL import Image

from vila_m3.batches import MixtureDataset, PictureGroups, StepBatches, StepCollator, make_loader, open_mixture
from vila_m3.data.record import Message, Record, format_row
from vila_m3.model import VilaM3ForConditionalGeneration
from vila_m3.phantom_conversations import ConversationMaker
from vila_m3.processor import VilaM3Processor
from vila_m3.run_state import RunState
from vila_m3.trainer import StageTrainer, WeightAverage, cosine_schedule, learner, train_parts, trained_parameters
from vila_m3_common.training import process_rank

QUESTIONS = {
    "CT": "<image>This is a CT image.\nSegment the liver.",
    "MRI": "T1: <image>, T2: <image> These are different MRI modalities.\nIs there a tumor?",
    "CXR": "<image> This is a CXR image.\nIs there a pneumothorax in picture {number}?",
    "VQA": "<image>Which organ is shown in picture {number}?",
    "text": "Name finding number {number}.",
}
ANSWERS = {
    "CT": "I segmented the liver using <VISTA3D(hepatic tumor)>.",
    "MRI": "This looks like an MRI image sequence. Let me first trigger <BRATS()>.",
    "CXR": "This looks like an chest x-ray. Let me first trigger <CXR()>.",
    "VQA": "It is the {organ}.",
    "text": "The finding is {organ}.",
}
ORGANS = ("liver", "kidney", "lung", "heart")


def make_record(number: int, folder: Path) -> Record:
    kind = list(QUESTIONS)[number % len(QUESTIONS)]
    question = QUESTIONS[kind].format(number=number)
    images = []
    for index in range(question.count("<image>")):
        name = f"{number}_{index}.png"
        pixels = np.random.default_rng(10 * number + index).integers(0, 255, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
        images.append(name)
    messages = [Message("user", question), Message("assistant", ANSWERS[kind].format(organ=ORGANS[number // 5 % 4]))]
    return Record(f"r{number}", tuple(messages), tuple(images))


def write_records(folder: Path, numbers: Sequence[int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "records.jsonl"
    file.write_text("".join(f"{format_row(make_record(number, folder))}\n" for number in numbers))
    return file


def write_phantoms(file: Path, maker: ConversationMaker, seeds: Sequence[int]) -> Path:
    """Write conversations about phantoms, with their pictures beside the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in seeds:
        conversation = maker(seed).conversation
        names = [f"{file.stem}_{seed}_{index}.png" for index in range(len(conversation.images))]
        for name, image in zip(names, conversation.images, strict=True):
            Image.fromarray(image).save(file.parent / name)
        messages = [Message(turn.role, turn.text, turn.in_context) for turn in conversation.turns]
        rows.append(format_row(Record(f"{file.stem} {seed}", tuple(messages), tuple(names))))
    file.write_text("".join(f"{row}\n" for row in rows))
    return file


def open_records(file: Path, processor: VilaM3Processor, **keywords: Any) -> MixtureDataset:
    return MixtureDataset(open_mixture([file], file.parent), processor, **keywords)


@pytest.fixture
def dataset(tmp_path: Path, processor: VilaM3Processor) -> MixtureDataset:
    """Ten conversations, two of each kind."""
    return open_records(write_records(tmp_path / "data", range(10)), processor)


Start = Callable[..., StageTrainer]


@pytest.fixture
def start(model: VilaM3ForConditionalGeneration, dataset: MixtureDataset, tmp_path: Path) -> Start:
    """Return a function that makes a trainer on ``dataset``, from the same weights each time."""
    first = {name: value.clone() for name, value in model.state_dict().items()}

    def make(
        parts: Sequence[str] = ("llm", "vision_tower", "mm_projector"),
        step_size: int = 4,
        micro_batch_size: int = 4,
        pack_length: int | None = None,
        epochs: int = 2,
        folder: str | None = None,
        handlers: Sequence[Any] = (),
        state: dict[str, Any] | None = None,
        learning_rate: float = 1e-3,
        data: MixtureDataset | None = None,
        group_size: int | None = None,
        ema_decay: float | None = 0.999,
        **keywords: Any,
    ) -> StageTrainer:
        torch.manual_seed(0)
        model.load_state_dict(first)
        network = learner(train_parts(model, parts))
        items = data or dataset
        groups = PictureGroups(items, group_size or 1)
        sampler = StepBatches(groups, step_size, epochs)
        optimizer = torch.optim.AdamW(trained_parameters(network), lr=learning_rate, weight_decay=0.0)
        scheduler = cosine_schedule(optimizer, len(sampler))
        average = WeightAverage(network, ema_decay)
        state_handlers = []
        if folder is not None:
            state_handlers.append(
                RunState(tmp_path / folder, network, optimizer, scheduler, sampler, **{"interval": 1, **(state or {})})
            )
        return StageTrainer(
            "cpu",
            epochs,
            make_loader(groups, sampler, StepCollator(micro_batch_size, pack_length, group_size is not None)),
            network,
            optimizer,
            epoch_length=sampler.steps_per_pass,
            average=average,
            train_handlers=[Stepper(scheduler), *handlers, *state_handlers],
            **keywords,
        )

    return make


class Stepper:
    """Steps the learning rate after every optimizer step."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.scheduler.step())


class Losses:
    """Keeps the loss of every step; stops the process's training after ``last`` as an exception would."""

    def __init__(self, last: int | None = None) -> None:
        self.values: dict[int, float] = {}
        self.last = last

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        self.values[engine.state.iteration] = engine.state.output[0]["loss"]
        if engine.state.iteration == self.last:
            raise KeyboardInterrupt


class Stop:
    """Ends a training after a step as a fault of the program would."""

    def __init__(self, last: int) -> None:
        self.last = last

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        if engine.state.iteration == self.last:
            raise RuntimeError("stopped by the test")


class FullDisk:
    """From a step on the kernel refuses files above a limit to this process, as a quota would."""

    def __init__(self, after: int, limit: int, rank: int = 0) -> None:
        self.after = after
        self.limit = limit
        self.rank = rank

    def attach(self, engine: Any) -> None:
        engine.add_event_handler(Events.ITERATION_STARTED, self)

    def __call__(self, engine: Any) -> None:
        if engine.state.iteration == self.after + 1 and process_rank() == self.rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
