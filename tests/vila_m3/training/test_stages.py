"""The stage configs, run as a user runs them, on a tiny checkpoint and conversations about phantoms."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_training import open_records, write_phantoms, write_records

from vila_m3.batches import StepCollator
from vila_m3.checkpoint import load_checkpoint, load_processor
from vila_m3.data.record import parse_row
from vila_m3.export import save_released
from vila_m3.phantom_conversations import ConversationMaker, build_pool
from vila_m3.run_state import sha256_of
from vila_m3.train_handlers import GeneratedValidation
from vila_m3.trainer import SupervisedLoss, supervised_count
from vila_m3.training import start_tokenizer
from vila_m3_common.errors import UserError

STAGES = ("train_stage1_align", "train_stage2_pretrain", "train_stage3_instruct", "train_stage4_expert")
SMALL = {
    "epochs": 2,
    "batch_size": 8,
    "pack_length": 1024,
    "val_count": 2,
    "val_new_tokens": 4,
    "device": "cpu",
    "amp_dtype": "float32",
    "logging_file": False,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, maker: ConversationMaker, cards: str) -> Path:
    """Twenty-four conversations to train on; twelve others, about other phantoms, held out."""
    folder = tmp_path_factory.mktemp("data")
    write_phantoms(folder / "train.jsonl", maker, range(24))
    others = ConversationMaker(build_pool(1, first_seed=9900, show_progress=False), cards)
    write_phantoms(folder / "held_out.jsonl", others, range(50_000, 50_012))
    return folder


@pytest.fixture
def run_stage(repository: Path, tmp_path: Path, model: Any, processor: Any, data: Path) -> Any:
    """Return a function that runs a stage from a folder and returns its output folder."""
    from monai.bundle import run

    save_released(model, processor, tmp_path / "start", torch.float32)

    def run_one(name: str, start: Path, more: tuple[str, ...] = (), **overrides: Any) -> Path:
        given = {
            "train_files": [str(data / "train.jsonl")],
            "val_files": [str(data / "held_out.jsonl")],
            "image_root": str(data),
            "start_checkpoint": str(start),
            "ckpt_dir": str(tmp_path / name / "ckpt"),
            "checkpoint_out": str(tmp_path / name / "model"),
        }
        configs = [str(repository / "vila_m3_bundle/configs" / f"{file}.json") for file in ("train", name, *more)]
        run(config_file=configs, **{**SMALL, **given, **overrides})
        return tmp_path / name / "model"

    return run_one


def held_out_loss(checkpoint: Path, data: Path) -> float:
    dataset = open_records(data / "held_out.jsonl", load_processor(checkpoint))
    micros = StepCollator(4)([dataset[index] for index in range(len(dataset))])
    model = SupervisedLoss(load_checkpoint(checkpoint, dtype="float32"))
    with torch.no_grad():
        return sum(float(model(**micro)) for micro in micros) / sum(map(supervised_count, micros))


def test_the_held_out_conversations_are_not_trained_on(data: Path) -> None:
    rows = {
        name: [parse_row(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "held_out")
    }
    texts = {name: {tuple(message.text for message in row.messages) for row in found} for name, found in rows.items()}
    images = {name: {sha256_of(data / image) for row in found for image in row.images} for name, found in rows.items()}
    assert not texts["train"] & texts["held_out"]
    assert not images["train"] & images["held_out"]


def test_the_stages_follow_each_other_and_each_lowers_the_held_out_loss(
    run_stage: Any, tmp_path: Path, data: Path
) -> None:
    """A stage starts from the folder of the one before; the loss is of conversations that no stage has seen."""
    folder = tmp_path / "start"
    losses = [held_out_loss(folder, data)]
    for name in STAGES:
        folder = run_stage(name, folder, learning_rate=2e-3)
        losses.append(held_out_loss(folder, data))
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
    assert load_processor(tmp_path / "train_stage1_align/model/one_folder").template_name == "llama_3"


def test_the_model_card_records_data_configuration_revision_and_metrics(
    run_stage: Any, tmp_path: Path, data: Path
) -> None:
    folder = run_stage("train_stage3_instruct", tmp_path / "start", epochs=1)
    card = json.loads((folder / "model_card.json").read_text())
    described = card["data"]["train"]["data_sets"]["conversations"]
    assert described["rows"] == 24
    assert described["sha256"] == {"train.jsonl": sha256_of(data / "train.jsonl")}
    assert card["data"]["held_out"]["data_sets"]["conversations"]["rows"] == 12
    assert card["config"]["learning_rate"] == 1e-4
    assert card["config"]["start_checkpoint"] == str(tmp_path / "start")
    assert card["step"] == 3
    assert {"exact_match", "trigger_accuracy", "held_out_loss", "loss", "lr", "tokens/s"} <= set(card["metrics"])
    assert card["revision"] is None or len(card["revision"]) == 40


@pytest.mark.parametrize("layout", [".", "one_folder"])
def test_inference_takes_what_comes_out(
    run_stage: Any, tmp_path: Path, repository: Path, cxr_file: Path, layout: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from monai.bundle import run

    folder = run_stage("train_stage3_instruct", tmp_path / "start", epochs=1, amp_dtype="bfloat16")
    config = str(repository / "vila_m3_bundle/configs/inference.json")
    asked = {"image": str(cxr_file), "question": "Any effusion?", "device": "cpu", "max_new_tokens": 3}
    run(config_file=config, checkpoint=str(folder / layout), logging_file=False, **asked)
    assert "user: Any effusion?\nassistant: " in capsys.readouterr().out


def test_stage_four_takes_its_conversations_from_a_mixture(run_stage: Any, tmp_path: Path, data: Path) -> None:
    """Eleven of the rows twice and all others once: 4 + 3 steps of 4 (what does not fill a step is left out)."""
    root = shutil.copytree(data, tmp_path / "mixed")
    lines = (root / "train.jsonl").read_text().splitlines(keepends=True)
    (root / "few.jsonl").write_text("".join(lines[:11]))
    (root / "many.jsonl").write_text("".join(lines[11:24]))
    sets = {"few": {"files": ["few.jsonl"], "repeats": 2}, "many": {"files": ["many.jsonl"]}}
    config = {
        "data_root": "nowhere",
        "balance": "balanced",
        "mixture": {"_target_": "vila_m3.data.mixture.Mixture", "data_sets": sets, "root": "@data_root"},
    }
    config["mixture"]["balance"] = "@balance"
    (tmp_path / "mixture.json").write_text(json.dumps(config))
    folder = run_stage(
        "train_stage4_expert",
        tmp_path / "start",
        train_files=[],
        mixture_config=str(tmp_path / "mixture.json"),
        data_root=str(root),
        batch_size=4,
        epochs=1,
    )
    card = json.loads((folder / "model_card.json").read_text())
    assert card["step"] == 2 * (11 // 4) + 13 // 4
    assert {name: found["repeats"] for name, found in card["data"]["train"]["data_sets"].items()} == {
        "few": 2,
        "many": 1,
    }


def test_stage_four_names_the_papers_mixture(repository: Path) -> None:
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    names = ("train", "train_stage4_expert")
    parser.read_config([str(repository / f"vila_m3_bundle/configs/{name}.json") for name in names])
    assert Path(parser.get_parsed_content("mixture_config")).name == "mixture_m3.json"


def test_an_adapter_comes_out_merged(run_stage: Any, tmp_path: Path, data: Path) -> None:
    folder = run_stage("train_lora", tmp_path / "start", learning_rate=5e-3, use_dora=True)
    assert held_out_loss(folder, data) < held_out_loss(tmp_path / "start", data)
    one = held_out_loss(folder / "one_folder", data)
    assert one == pytest.approx(held_out_loss(folder, data), abs=0.05)


def test_the_average_of_the_weights_is_what_comes_out(run_stage: Any, tmp_path: Path, data: Path) -> None:
    """A slow average stays near the start, and is resumed: a cut training gives the uncut one's."""
    far = run_stage("train_stage3_instruct", tmp_path / "start", learning_rate=2e-3)
    outs = {"far": held_out_loss(far, data)}
    for name, parts in {"whole": [{}], "cut": [{"on_nan": "skip", "stops": 4}, {}]}.items():
        for part in parts:
            folders = {"ckpt_dir": str(tmp_path / name / "ckpt"), "checkpoint_out": str(tmp_path / name / "model")}
            stops = part.pop("stops", None)
            extra = {"train#handlers": [{"_target_": "small_training.Stop", "last": stops}]} if stops else {}
            keywords = {"learning_rate": 2e-3, "ema_decay": 0.9, "save_interval": 1, **folders, **part, **extra}
            if stops:
                with pytest.raises(RuntimeError):
                    run_stage("train_stage3_instruct", tmp_path / "start", **keywords)
            else:
                run_stage("train_stage3_instruct", tmp_path / "start", **keywords)
        outs[name] = held_out_loss(tmp_path / name / "model", data)
    assert outs["cut"] == outs["whole"]
    assert outs["far"] < outs["whole"] < held_out_loss(tmp_path / "start", data)


def test_validation_runs_every_few_steps_and_writes_what_was_generated(run_stage: Any, tmp_path: Path) -> None:
    """Six steps in two epochs, every second step and at the end of each epoch (step 6 once)."""
    run_stage("train_stage3_instruct", tmp_path / "start", val_step_interval=2)
    files = sorted((tmp_path / "train_stage3_instruct/ckpt/samples").iterdir())
    assert [path.name for path in files] == [
        "samples_0001_00000002.jsonl",
        "samples_0001_00000003.jsonl",
        "samples_0002_00000004.jsonl",
        "samples_0002_00000006.jsonl",
    ]
    rows = [json.loads(line) for line in files[-1].read_text().splitlines()]
    assert {row["id"] for row in rows} == {"held_out 50000", "held_out 50001"}
    assert set(rows[0]) == {"id", "turn", "generated", "expected", "is_exact", "is_trigger_right"}


def test_a_rerun_of_the_same_command_goes_on(
    run_stage: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = {"train#handlers": [{"_target_": "small_training.Stop", "last": 4}]}
    with pytest.raises(RuntimeError):
        run_stage("train_stage3_instruct", tmp_path / "start", save_interval=3, **stop)
    run_stage("train_stage3_instruct", tmp_path / "start")
    assert "going on after step 3" in capsys.readouterr().out
    run_stage("train_stage3_instruct", tmp_path / "start")
    assert "training is complete; to train anew remove" in capsys.readouterr().out


def test_a_stage_without_a_model_to_start_from_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no model to start from; give --start_checkpoint the folder"):
        start_tokenizer(None, None, 1024, "llama_3", str(tmp_path))


@pytest.mark.parametrize("tracking", ["mlflow", "tensorboard"])
def test_the_known_trackings_add_their_handler_to_every_stage(repository: Path, tracking: str) -> None:
    from monai.bundle import ConfigWorkflow

    configs = repository / "vila_m3_bundle/configs"
    given = tracking if tracking == "mlflow" else str(configs / "tracking_tensorboard.json")
    for stage in (*STAGES, "train_lora"):
        workflow = ConfigWorkflow(
            [str(configs / "train.json"), str(configs / f"{stage}.json")],
            workflow_type="train",
            logging_file=False,
            tracking=given,
            save_execute_config=False,
        )
        handlers = workflow.parser["train#handlers"]
        assert [handler["_target_"].lower()[:6] for handler in handlers] == [tracking[:6]]
        assert workflow.parser["train#trainer"] == "@records#trainer"
        assert workflow.parser["records#trainer#train_handlers"] == "$@records#handlers + @train#handlers"


def test_tensorboard_has_every_steps_loss_and_every_epochs_metrics(
    run_stage: Any, tmp_path: Path, repository: Path
) -> None:
    """Two epochs of three steps, read back by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracking = str(repository / "vila_m3_bundle/configs/tracking_tensorboard.json")
    run_stage("train_stage3_instruct", tmp_path / "start", tracking=tracking)
    found = EventAccumulator(str(tmp_path / "train_stage3_instruct/ckpt/tensorboard")).Reload()
    assert [event.step for event in found.Scalars("train_loss")] == [1, 2, 3, 4, 5, 6]
    for name in ("lr", "tokens/s", "exact_match"):
        assert [event.step for event in found.Scalars(name)] == [1, 2]
    card = json.loads((tmp_path / "train_stage3_instruct/model/model_card.json").read_text())
    losses = {event.step: event.value for event in found.Scalars("held_out_loss")}
    assert losses[card["epoch"]] == pytest.approx(card["metrics"]["held_out_loss"])


@pytest.mark.slow
def test_mlflow_has_every_steps_loss_and_every_epochs_metrics(run_stage: Any, tmp_path: Path) -> None:
    """MONAI's own settings: a SQLite file in ``output_dir``, and one finished run."""
    mlflow = pytest.importorskip("mlflow", reason="mlflow, an optional package, is not installed (pip install mlflow)")
    run_stage("train_stage3_instruct", tmp_path / "start", tracking="mlflow", output_dir=str(tmp_path / "tracked"))
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/tracked/mlruns.db")
    (run,) = client.search_runs([client.get_experiment_by_name("monai_experiment").experiment_id])
    assert run.info.status == "FINISHED"

    def steps(name: str) -> list[int]:
        return [metric.step for metric in client.get_metric_history(run.info.run_id, name)]

    assert steps("train_loss") == [1, 2, 3, 4, 5, 6]
    assert steps("held_out_loss") == steps("exact_match") == [1, 2]


@pytest.mark.slow
def test_thirty_two_mixed_conversations_are_learnt_by_heart(start: Any, tmp_path: Path, processor: Any) -> None:
    """CT, MRI, CXR, VQA and text; greedy generation gives every turn to the letter."""
    data = open_records(write_records(tmp_path / "more", range(32)), processor, cache_gib=1.0)
    options = {"epochs": 150, "step_size": 16, "pack_length": 2048, "learning_rate": 6e-3, "ema_decay": None}
    trainer = start(data=data, **options)
    trainer.run()
    validation = GeneratedValidation(trainer.network.model, processor, data, tmp_path / "samples")
    validation.attach(trainer)
    validation(trainer)
    assert trainer.state.metrics["exact_match"] == 1.0
    assert trainer.state.metrics["trigger_accuracy"] == 1.0
