import json
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser
from safetensors.torch import load_file
from torchrun import run_processes

from cxr_expert.network import CxrEnsemble, CxrMember
from cxr_expert.training import KnownLabelLoss, run_training
from vila_m3_common.training import BestWeights
from vila_m3_common.weights import load_weights, save_weights

NAN = float("nan")


def test_loss_ignores_unknown_labels():
    logits = torch.tensor([[0.0, 9.0]])
    assert float(KnownLabelLoss()(logits, torch.tensor([[1.0, NAN]]))) == pytest.approx(0.6931, abs=1e-4)


def test_unknown_labels_have_no_gradient():
    logits = torch.tensor([[0.0, 9.0]], requires_grad=True)
    KnownLabelLoss()(logits, torch.tensor([[1.0, NAN]])).backward()
    assert logits.grad[0].tolist() == [-0.5, 0.0]


def test_loss_without_known_labels_is_zero():
    assert float(KnownLabelLoss()(torch.ones(1, 2), torch.full((1, 2), NAN))) == 0


def count_trained_epochs(bundle, folder, max_epochs):
    """Run train.json on 16 phantoms; return how many epochs this run itself trained."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs" / "train.json"))
    parser.update(
        {
            "output_dir": str(folder),
            "checkpoint_out": str(folder / "model.safetensors"),
            "max_epochs": max_epochs,
            "val_interval": 1,
            "min_positives": 1,
            "batch_size": 8,
            "input_size": 32,
            "phantom_counts": {"training": 16, "validation": 12},
            "device": "cpu",
        }
    )
    epochs = []
    trainer = parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: epochs.append(engine.state.epoch))
    parser.get_parsed_content("run")
    return len(epochs)


def test_training_resumes_and_exports_weights_that_inference_loads(bundle, tmp_path):
    assert count_trained_epochs(bundle, tmp_path, max_epochs=1) == 1
    assert count_trained_epochs(bundle, tmp_path, max_epochs=3) == 2
    assert (tmp_path / "checkpoints" / "training.pt").is_file()
    inference = ConfigParser()
    inference.read_config(str(bundle / "configs" / "inference.json"))
    network = load_weights(inference.get_parsed_content("network_def"), tmp_path / "model.safetensors")
    assert "Lung Opacity" in network.classifiers["nano"].targets
    assert "Atelectasis" in network.untrained_findings


@pytest.mark.parametrize(("exports", "weight"), [("best", 1.0), ("last", 2.0)])
def test_the_best_or_the_last_weights_are_exported(tmp_path, exports, weight):
    member = CxrMember(torch.nn.Linear(1, 18), 8)
    torch.nn.init.constant_(member.network.weight, 1.0)
    best = BestWeights(member, tmp_path / "best.safetensors")
    best.best = 0.9
    save_weights(member, best.path)
    trainer = SimpleNamespace(run=lambda: torch.nn.init.constant_(member.network.weight, 2.0))
    run_training(trainer, member, CxrEnsemble({"nano": member}), best, tmp_path / "out.safetensors", exports)
    assert load_file(tmp_path / "out.safetensors")["members.nano.network.weight"].unique().tolist() == [weight]


def test_mistakes_of_the_export_end_the_command(tmp_path):
    member = CxrMember(torch.nn.Linear(1, 18), 8)
    best = BestWeights(member, tmp_path / "best.safetensors")
    arguments = (SimpleNamespace(run=lambda: None), member, CxrEnsemble({"nano": member}), best, tmp_path / "x")
    with pytest.raises(SystemExit, match="unknown exports 'first'; valid: best, last"):
        run_training(*arguments, "first")
    with pytest.raises(SystemExit, match="no validation had a finding with both a yes and a no"):
        run_training(*arguments)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(bundle, shared, tmp_path):
    """Patients with several films, an odd number of them, so that order and uneven shares would show."""
    films = shared / "data/cxr/nih_256"
    rows = (films / "labels.csv").read_text().splitlines()
    (tmp_path / "labels.csv").write_text("\n".join(rows[:52]) + "\n")
    options = {"data_root": films, "labels_csv": tmp_path / "labels.csv", "min_positives": 2, "resample_count": 50}
    for count in (1, 2):
        printed = run_processes(
            count,
            bundle,
            ("evaluate.json", "multi_gpu_evaluate.json"),
            {**options, "output_dir": tmp_path / str(count)},
            tmp_path,
        )
        assert printed.count("written to") == 1
    alone, together = ((tmp_path / str(count) / "metrics.json").read_text() for count in (1, 2))
    assert json.loads(alone)["image_count"] == 51
    assert together == alone


@pytest.mark.slow
def test_two_processes_train_together_and_the_first_writes(bundle, tmp_path):
    """On the CPU the overlay takes gloo in place of NCCL."""
    options = {
        "output_dir": "out",
        "checkpoint_out": "model.safetensors",
        "max_epochs": 2,
        "val_interval": 1,
        "min_positives": 1,
        "batch_size": 4,
        "input_size": 32,
        "phantom_counts": "{'training': 18, 'validation': 15}",
    }
    printed = run_processes(2, bundle, ("train.json", "multi_gpu_train.json"), options, tmp_path)
    assert printed.count("best weights written to model.safetensors") == 1
    assert (tmp_path / "out" / "checkpoints" / "training.pt").is_file()
    state = load_file(tmp_path / "model.safetensors")
    assert not [name for name in state if ".module." in name]
    assert state["members.nano.trained_heads"].sum() >= 8
