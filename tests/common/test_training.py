"""Going on after a stop, the best weights, bfloat16 on the CPU."""

from pathlib import Path

import pytest
import torch
from ignite.engine import Engine, Events

from vila_m3_common.training import BestWeights, MixedPrecisionInferer, ResumableCheckpoint
from vila_m3_common.weights import read_state_dict


def trainer_of(network: torch.nn.Linear, epochs: int) -> Engine:
    """Every iteration adds 1 to the weight."""
    engine = Engine(lambda *_: network.weight.data.add_(1))
    engine.state.max_epochs = epochs
    return engine


def network_at_zero() -> torch.nn.Linear:
    network = torch.nn.Linear(1, 1, bias=False)
    network.weight.data.zero_()
    return network


def train(path: Path, epochs: int, stop_after: int | None = None) -> tuple[torch.nn.Linear, list[int]]:
    network, seen = network_at_zero(), []
    trainer = trainer_of(network, epochs)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: seen.append(engine.state.epoch))
    ResumableCheckpoint(path, {"network": network}).attach(trainer)
    if stop_after:
        trainer.add_event_handler(Events.EPOCH_COMPLETED(once=stop_after), trainer.terminate)
    trainer.run([0], max_epochs=epochs)
    return network, seen


def test_a_stopped_training_goes_on_with_the_next_epoch(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "ckpt/training.pt"
    assert train(path, 4, stop_after=1)[1] == [1]
    network, seen = train(path, 4)
    assert seen == [2, 3, 4]
    assert network.weight.item() == 4
    assert f"going on after epoch 1, from {path}" in capsys.readouterr().out


def test_a_complete_training_is_not_repeated(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "training.pt"
    train(path, 2)
    network, seen = train(path, 2)
    assert seen == []
    assert network.weight.item() == 2
    assert f"training is complete (2 epochs); to train anew remove {path}" in capsys.readouterr().out


def test_a_kill_while_writing_leaves_the_state_of_the_epoch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "training.pt"
    train(path, 4, stop_after=1)

    def killed(_: object, file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        train(path, 4)
    monkeypatch.undo()
    assert train(path, 4)[1] == [2, 3, 4]


@pytest.mark.parametrize("metric", ["dice", None])
def test_only_better_weights_are_written(tmp_path: Path, metric: str | None) -> None:
    network, path = network_at_zero(), tmp_path / "model.safetensors"
    evaluator = Engine(lambda *_: None)
    evaluator.state.key_metric_name = "dice"
    best = BestWeights(network, path, metric)
    best.attach(evaluator)
    for weight, value in [(1.0, 0.3), (2.0, 0.5), (3.0, 0.4)]:
        network.weight.data.fill_(weight)
        evaluator.state.metrics = {"dice": value}
        evaluator.run([0])
    assert read_state_dict(path)["weight"].item() == 2.0
    resumed = BestWeights(network, path, metric)
    resumed.load_state_dict(best.state_dict())
    resumed(evaluator)
    assert read_state_dict(path)["weight"].item() == 2.0


@pytest.mark.parametrize(
    ("size", "amp", "dtype"), [(24, True, torch.bfloat16), (23, True, torch.float32), (24, False, torch.float32)]
)
def test_bfloat16_is_used_where_its_gradient_is_sound(size: int, amp: bool, dtype: torch.dtype) -> None:
    seen = []

    def network(image: torch.Tensor, class_vector: torch.Tensor) -> torch.Tensor:
        output = torch.nn.functional.conv3d(image, torch.ones(3, 4, 1, 1, 1))
        seen.append(output.dtype)
        return output * class_vector

    prompt = torch.tensor(2.0)
    output = MixedPrecisionInferer(amp)(torch.ones(1, 4, size, 32, 32), network, class_vector=prompt)
    assert seen == [dtype]
    assert output.dtype == torch.float32
    assert (output == 8).all()
