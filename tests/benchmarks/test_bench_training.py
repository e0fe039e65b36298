"""The training step against a plain transformers ``Trainer`` on the same model and conversations, in one run.

A model of about 7 million random weights, 196 tokens an image, float32. The lengths are those of the kinds of the
mixture: SLAKE questions, Open-i reports, conversations with experts about phantoms, and text. All sides read the same
files through the same data set. Of three rounds the fastest counts, which other programs disturb least. Run with
``make bench``.
"""

from __future__ import annotations

import json
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments

from vila_m3.batches import MixtureDataset, StepBatches, StepCollator, make_loader, open_mixture
from vila_m3.checkpoint import load_processor
from vila_m3.configuration import VilaM3Config
from vila_m3.data.record import Message, Record, format_row
from vila_m3.model import VilaM3ForConditionalGeneration
from vila_m3.phantom_conversations import ConversationMaker, build_pool
from vila_m3.processor import build_processor
from vila_m3.train_handlers import StepProgress
from vila_m3.trainer import StageTrainer, cosine_schedule, learner, train_parts, trained_parameters

pytestmark = pytest.mark.bench
THREADS = 1  # of preparing; the comparison is made with each number of threads in turn

CONFIG = {
    "drops_chunk_starts": False,
    "text_config": {
        "vocab_size": 2048,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "max_position_embeddings": 4096,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "vision_use_head": False,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 384,
        "patch_size": 14,
    },
}
STEP, MICRO, COUNT, ROUNDS = 16, 4, 64, 3


def vqa(shared: Path, folder: Path, count: int) -> list[Record]:
    source = shared / "data/vqa/slake"
    rows = [row for row in json.loads(next(source.rglob("train.json")).read_text()) if row["q_lang"] == "en"]
    records = []
    for row in rows[:: len(rows) // count][:count]:
        name = f"{row['qid']}.png"
        Image.open(next(source.rglob(row["img_name"]))).convert("RGB").save(folder / name)
        messages = (Message("user", f"<image>\n{row['question']}"), Message("assistant", row["answer"]))
        records.append(Record(str(row["qid"]), messages, (name,)))
    return records


def reports(shared: Path, folder: Path, images: list[str], count: int) -> list[Record]:
    records = []
    with tarfile.open(shared / "data/reports/openi_reports.tgz") as archive:
        for member in archive:
            opened = archive.extractfile(member) if member.name.endswith(".xml") else None
            text = opened.read().decode("utf-8", "replace") if opened else ""
            found = re.findall(r'<AbstractText Label="(?:FINDINGS|IMPRESSION)">([^<]+)<', text)
            if found:
                shown = images[len(records) % len(images)]
                question = Message("user", "<image>\nDescribe the image in detail.")
                records.append(Record(member.name, (question, Message("assistant", " ".join(found))), (shown,)))
            if len(records) == count:
                break
    return records


def experts(folder: Path, cards: str, count: int) -> list[Record]:
    maker, records = ConversationMaker(build_pool(2, 5000, show_progress=False), cards), []
    for seed in range(count):
        conversation = maker(seed).conversation
        names = [f"expert_{seed}_{index}.png" for index in range(len(conversation.images))]
        for name, image in zip(names, conversation.images, strict=True):
            Image.fromarray(image).save(folder / name)
        messages = tuple(Message(turn.role, turn.text, turn.in_context) for turn in conversation.turns)
        records.append(Record(f"expert {seed}", messages, tuple(names)))
    return records


@pytest.fixture(scope="module")
def dataset(shared: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> MixtureDataset:
    """Of 64 conversations 24 are short questions, 12 reports, 16 with experts, 12 text alone."""
    folder = tmp_path_factory.mktemp("conversations")
    cards = (repository / "vila_m3_bundle/configs/model_cards.txt").read_text()
    records = vqa(shared, folder, 24)
    written = reports(shared, folder, [record.images[0] for record in records], 24)
    text = [
        Record(f"text {row.id}", (Message("user", "Continue the report."), row.messages[1])) for row in written[12:]
    ]
    records += written[:12] + experts(folder, cards, 16) + text
    (folder / "mix.jsonl").write_text("".join(f"{format_row(record)}\n" for record in records))
    processor = build_processor(
        load_processor(repository / "vila_m3_bundle/models/nano").tokenizer, VilaM3Config(**CONFIG)
    )
    return MixtureDataset(open_mixture([folder / "mix.jsonl"], folder), processor)


def new_model() -> VilaM3ForConditionalGeneration:
    torch.manual_seed(0)
    model = VilaM3ForConditionalGeneration(VilaM3Config(**CONFIG))
    return train_parts(model, ("llm", "vision_tower", "mm_projector")).train()


class Clock(TrainerCallback):
    """Times the steps of a transformers training, with the getting of their data."""

    def __init__(self) -> None:
        self.edges: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.edges.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.edges.append(time.perf_counter())


def plain_seconds(dataset: MixtureDataset, folder: Path) -> float:
    """Train one epoch with transformers' ``Trainer``, padded to the longest of each micro-batch."""
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=STEP // MICRO,
        num_train_epochs=1,
        learning_rate=1e-4,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    Trainer(new_model(), arguments, data_collator=PlainCollator(), train_dataset=dataset, callbacks=[clock]).train()
    return clock.edges[-1] - clock.edges[0]


class PlainCollator:
    """The batch that transformers' models take: rows padded to the longest."""

    def __call__(self, items: list[Any]) -> dict[str, torch.Tensor]:
        padded = StepCollator(len(items))(items)[0]
        padded.pop("position_ids")
        if not len(padded["pixel_values"]):
            padded.pop("pixel_values")
        return padded


def our_seconds(dataset: MixtureDataset, pack_length: int | None) -> tuple[float, float]:
    """Train one epoch as the stages do; return its seconds, and those spent waiting for data."""
    network = learner(new_model())
    sampler = StepBatches(dataset.mixture, STEP)
    optimizer = torch.optim.AdamW(trained_parameters(network), lr=1e-4, fused=True)
    scheduler = cosine_schedule(optimizer, len(sampler))
    loader = make_loader(dataset, sampler, StepCollator(MICRO, pack_length))
    trainer = StageTrainer(
        "cpu", 1, loader, network, optimizer, sampler.steps_per_pass, train_handlers=[StepProgress()]
    )
    trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
    edges: list[float] = []
    for event in (Events.GET_BATCH_STARTED, Events.GET_BATCH_COMPLETED, Events.ITERATION_COMPLETED):
        trainer.add_event_handler(event, lambda: edges.append(time.perf_counter()))
    trainer.run()
    waits = [got - begun for begun, got in zip(edges[0::3], edges[1::3], strict=False)]
    return edges[-1] - edges[0], sum(waits)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_against_transformers_trainer(dataset: MixtureDataset, tmp_path: Path, threads: int) -> None:
    """At least as many tokens a second unpacked, half as many again packed; loading at least 5 times as fast."""
    torch.set_num_threads(threads)
    lengths = sorted(len(dataset[index].input_ids) for index in range(len(dataset)))
    tokens = sum(lengths)
    spread = f"{lengths[0]} to {lengths[-1]} tokens, median {lengths[COUNT // 2]}, sum {tokens}"
    print(f"\n{threads} threads, {COUNT} conversations of {spread}")
    found: dict[str, list[float]] = {"plain": [], "unpacked": [], "packed": [], "loading": []}
    for _ in range(ROUNDS):
        found["plain"].append(plain_seconds(dataset, tmp_path))
        found["unpacked"].append(our_seconds(dataset, None)[0])
        seconds, waiting = our_seconds(dataset, 1024)
        found["packed"].append(seconds)
        found["loading"].append(waiting)
    speeds = {name: tokens / min(seconds) for name, seconds in found.items()}
    for name, speed in speeds.items():
        print(f"{name:10} {speed:8.0f} tokens/s {speed / speeds['plain']:6.2f} of transformers' Trainer")
    assert len(dataset) == COUNT
    assert speeds["unpacked"] >= speeds["plain"]
    assert speeds["packed"] >= 1.5 * speeds["plain"]
    assert speeds["loading"] >= 5 * speeds["packed"]
