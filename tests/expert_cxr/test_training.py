import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser

from cxr_expert.training import KnownLabelLoss, find_checkpoint
from vila_m3_common.weights import load_weights

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


def test_newest_checkpoint_is_found_by_its_number(tmp_path):
    for name in ("latest_checkpoint_epoch=9.pt", "latest_checkpoint_epoch=10.pt", "best_network_key_metric=0.9.pt"):
        (tmp_path / name).touch()
    assert find_checkpoint(tmp_path, "latest").name == "latest_checkpoint_epoch=10.pt"
    assert find_checkpoint(tmp_path, "best").name == "best_network_key_metric=0.9.pt"
    assert find_checkpoint(tmp_path / "none", "best") is None


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
    assert find_checkpoint(tmp_path / "checkpoints", "latest").name.endswith("epoch=3.pt")
    inference = ConfigParser()
    inference.read_config(str(bundle / "configs" / "inference.json"))
    network = load_weights(inference.get_parsed_content("network_def"), tmp_path / "model.safetensors")
    assert "Lung Opacity" in network.classifiers["nano"].targets
    assert "Atelectasis" in network.untrained_findings
