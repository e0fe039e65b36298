"""The stage configs, run as a user runs them, on a tiny checkpoint and small data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import Losses, write_records

from vila_m3.batches import RecordDataset, pad_items
from vila_m3.checkpoint import load_checkpoint, load_processor
from vila_m3.export import save_released
from vila_m3.train_handlers import GeneratedValidation
from vila_m3.trainer import SupervisedLoss, supervised_count

STAGES = ("train_stage1_align", "train_stage2_pretrain", "train_stage3_instruct", "train_stage4_expert")


@pytest.fixture
def run_stage(repository: Path, tmp_path: Path, model: Any, processor: Any) -> Any:
    """Return a function that runs a stage from a folder and returns its output folder."""
    from monai.bundle import run

    save_released(model, processor, tmp_path / "start", torch.float32)
    train = write_records(tmp_path / "data", range(16))
    held_out = tmp_path / "data/held_out.jsonl"
    held_out.write_text("".join(train.read_text().splitlines(keepends=True)[:5]))

    def run_one(name: str, start: Path, **overrides: Any) -> Path:
        small = {
            "epochs": 2,
            "batch_size": 4,
            "pack_length": 1024,
            "max_length": 1024,
            "val_count": 2,
            "device": "cpu",
            "amp_dtype": "float32",
            "logging_file": False,
        }
        configs = [str(repository / "vila_m3_bundle/configs" / f"{file}.json") for file in ("train", name)]
        run(
            config_file=configs,
            start_checkpoint=str(start),
            ckpt_dir=str(tmp_path / name / "ckpt"),
            checkpoint_out=str(tmp_path / name / "model"),
            train_files=[str(train)],
            val_files=[str(held_out)],
            image_root=str(tmp_path / "data"),
            **{**small, **overrides},
        )
        return tmp_path / name / "model"

    return run_one


def held_out_loss(checkpoint: Path, data: Path) -> float:
    dataset = RecordDataset([data / "held_out.jsonl"], data, load_processor(checkpoint))
    micro = pad_items([dataset[index] for index in range(len(dataset))])
    with torch.no_grad():
        loss = SupervisedLoss(load_checkpoint(checkpoint, dtype="float32"))(**micro)
    return float(loss) / supervised_count(micro)


def test_the_stages_follow_each_other_and_each_lowers_the_loss(run_stage: Any, tmp_path: Path) -> None:
    folder = tmp_path / "start"
    losses = [held_out_loss(folder, tmp_path / "data")]
    for name in STAGES:
        folder = run_stage(name, folder, best_metric="loss", learning_rate=2e-3)
        losses.append(held_out_loss(folder, tmp_path / "data"))
        assert sorted(path.name for path in folder.iterdir()) == [
            "config.json",
            "llm",
            "mm_projector",
            "model_card.json",
            "one_folder",
            "vision_tower",
        ]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == 5
    card = json.loads((folder / "model_card.json").read_text())
    assert set(card["data"]) == {"records.jsonl", "held_out.jsonl"}
    assert card["step"] > 0
    assert {"exact_match", "trigger_accuracy", "loss", "lr", "tokens/s"} <= set(card["metrics"])
    assert load_processor(tmp_path / "train_stage1_align/model/one_folder").template_name == "llama_3"


def test_an_adapter_comes_out_merged(run_stage: Any, tmp_path: Path) -> None:
    folder = run_stage("train_lora", tmp_path / "start", best_metric="loss", use_dora=True)
    assert held_out_loss(folder, tmp_path / "data") < held_out_loss(tmp_path / "start", tmp_path / "data")
    one = held_out_loss(folder / "one_folder", tmp_path / "data")
    assert one == pytest.approx(held_out_loss(folder, tmp_path / "data"), abs=0.05)


@pytest.mark.slow
def test_thirty_two_mixed_conversations_are_learnt_by_heart(
    start: Any, dataset: RecordDataset, tmp_path: Path, processor: Any
) -> None:
    """CT, MRI, CXR, VQA and text; greedy generation gives every turn to the letter."""
    dataset.records = RecordDataset([write_records(tmp_path / "more", range(32))], tmp_path / "more", processor).records
    dataset.image_root = tmp_path / "more"
    losses = Losses()
    trainer = start(
        epochs=150, step_size=16, micro_batch_size=16, pack_length=2048, learning_rate=6e-3, handlers=[losses]
    )
    trainer.run()
    model = trainer.network.model
    validation = GeneratedValidation(model, processor, dataset, tmp_path / "samples")
    validation(trainer)
    assert trainer.state.metrics["exact_match"] == 1.0
    assert trainer.state.metrics["trigger_accuracy"] == 1.0
