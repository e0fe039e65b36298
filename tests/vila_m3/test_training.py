from pathlib import Path
from typing import Any

import pytest
import torch

from vila_m3.answer import Answerer
from vila_m3.configuration import IGNORED_LABEL
from vila_m3.model import VilaM3ForConditionalGeneration
from vila_m3.phantom_conversations import ConversationMaker
from vila_m3.processor import VilaM3Processor
from vila_m3.training import (
    ConversationDataset,
    LengthGroupedBatches,
    ReplyAccuracy,
    collate,
    next_token_loss,
    prepare_batch,
    supervised_runs,
)


def test_loss_equals_the_recorded_one(shared: Path) -> None:
    """Batch of three conversations of checkpoint A, right-padded (shared/golden/vila)."""
    import numpy as np

    recorded = np.load(shared / "golden/vila/A_siglip_llama3.npz")
    logits = torch.from_numpy(recorded["batch_right.logits"])
    labels = torch.from_numpy(recorded["batch_right.labels"])
    assert float(next_token_loss(logits, labels)) == pytest.approx(float(recorded["batch_right.loss"]), abs=1e-5)


def test_padding_does_not_change_a_row(
    model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, maker: ConversationMaker
) -> None:
    items = [processor.encode(maker(seed).conversation) for seed in (1, 2, 3)]
    inputs, _, _, keywords = prepare_batch(collate(items), "cpu")
    with torch.no_grad():
        together = model(inputs, **keywords).logits
        for row, item in enumerate(items):
            alone_inputs, _, _, alone = prepare_batch(collate([item]), "cpu")
            length = len(item.input_ids)
            alone_logits = model(alone_inputs, **alone).logits[0]
            torch.testing.assert_close(together[row, :length], alone_logits, atol=1e-5, rtol=1e-4)


def test_reply_accuracy_counts_whole_turns() -> None:
    labels = torch.tensor([[IGNORED_LABEL, 3, 4, IGNORED_LABEL, 5, 6]])
    logits = torch.nn.functional.one_hot(torch.tensor([[3, 4, 0, 5, 1, 0]]), 8).float()
    metric = ReplyAccuracy()
    metric.update((logits, labels))
    assert metric.compute() == 0.5
    assert supervised_runs(labels[0, 1:]) == [(0, 2), (3, 5)]


def test_batches_hold_every_item_once_and_little_padding(processor: VilaM3Processor, maker: ConversationMaker) -> None:
    dataset = ConversationDataset(maker, processor, count=64)
    batches = list(LengthGroupedBatches(dataset, batch_size=8))
    assert sorted(index for batch in batches for index in batch) == list(range(64))
    lengths = [[dataset.length(index) for index in batch] for batch in batches]
    plain = [[dataset.length(8 * row + column) for column in range(8)] for row in range(8)]
    assert padding(lengths) < 0.5 * padding(plain)
    assert dataset.length(3) == len(dataset[3].input_ids)


def padding(lengths: list[list[int]]) -> int:
    return sum(max(batch) * len(batch) - sum(batch) for batch in lengths)


def test_generation_reproduces_what_was_learnt_by_heart(
    model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, maker: ConversationMaker
) -> None:
    """Overfit one conversation; greedy decoding with the cache must then give its replies word for word."""
    conversation = maker(4).conversation
    inputs, labels, _, keywords = prepare_batch(collate([processor.encode(conversation)]), "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(400):
        loss = next_token_loss(model(inputs, **keywords).logits, labels)
        if loss < 0.02:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    first = next(index for index, turn in enumerate(conversation.turns) if turn.role == "assistant")
    expected = conversation.turns[first].text
    del conversation.turns[first:]
    assert "".join(Answerer(model.eval(), processor)(conversation)) == expected


def run_training(repository: Path, folder: Path, **overrides: Any) -> None:
    from monai.bundle import run

    small = {
        "epochs": 1,
        "epoch_length": 2,
        "batch_size": 2,
        "phantom_count": 1,
        "val_phantom_count": 1,
        "val_count": 2,
        "device": "cpu",
        "logging_file": False,
    }
    run(
        config_file=str(repository / "vila_m3_bundle/configs/train.json"),
        ckpt_dir=str(folder / "ckpt"),
        checkpoint_out=str(folder / "model"),
        **{**small, **overrides},
    )


def test_training_writes_a_checkpoint_and_resumes(repository: Path, tmp_path: Path) -> None:
    run_training(repository, tmp_path)
    first = torch.load(tmp_path / "ckpt/training.pt", weights_only=True)
    assert first["trainer"]["iteration"] == 2
    run_training(repository, tmp_path, epochs=2)
    second = torch.load(tmp_path / "ckpt/training.pt", weights_only=True)
    assert second["trainer"]["iteration"] == 4
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "config.json",
        "llm",
        "mm_projector",
        "vision_tower",
    ]
