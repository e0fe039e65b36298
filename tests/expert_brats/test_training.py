"""Checkpoints that survive a kill, and the best weights of a training."""

import os

import pytest
import torch
from ignite.engine import Engine

from brats_expert.training import ExportBestWeights, MixedPrecisionInferer, newest_checkpoint


def write_checkpoint(path, age_s):
    torch.save({"network": {"weight": torch.zeros(500)}}, path)
    os.utime(path, (1_000_000_000 - age_s,) * 2)


def test_newest_checkpoint_is_found_by_age_not_by_name(tmp_path):
    write_checkpoint(tmp_path / "checkpoint_epoch=9.pt", age_s=60)
    write_checkpoint(tmp_path / "checkpoint_epoch=10.pt", age_s=0)
    assert newest_checkpoint(tmp_path).name == "checkpoint_epoch=10.pt"


def test_incomplete_checkpoint_is_passed_over(tmp_path):
    write_checkpoint(tmp_path / "old.pt", age_s=60)
    content = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.pt").touch()
    assert newest_checkpoint(tmp_path).name == "old.pt"


def test_folder_without_checkpoints_starts_afresh(tmp_path):
    assert newest_checkpoint(tmp_path / "missing") is None


@pytest.mark.parametrize(("size", "dtype"), [(24, torch.bfloat16), (23, torch.float32)])
def test_bfloat16_is_used_where_its_gradient_is_sound(size, dtype):
    seen = []

    def network(image):
        output = torch.nn.functional.conv3d(image, torch.ones(3, 4, 1, 1, 1))
        seen.append(output.dtype)
        return output

    output = MixedPrecisionInferer()(torch.ones(1, 4, size, 32, 32), network)
    assert seen == [dtype]
    assert output.dtype == torch.float32


def test_bfloat16_can_be_switched_off():
    weight = torch.rand(3, 4, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    image = torch.rand(1, 4, 24, 24, 24, generator=torch.Generator().manual_seed(1))
    output = MixedPrecisionInferer(amp=False)(image, lambda inputs: torch.nn.functional.conv3d(inputs, weight))
    assert torch.equal(output, torch.nn.functional.conv3d(image, weight))


def test_worse_validation_does_not_overwrite_better_weights(tmp_path):
    network = torch.nn.Linear(1, 1)
    exporter = ExportBestWeights(network, tmp_path / "best.safetensors")
    engine = Engine(lambda *_: None)
    engine.state.key_metric_name = "dice"
    written = []
    for value in (0.4, 0.6, 0.5):
        engine.state.metrics = {"dice": value}
        (tmp_path / "best.safetensors").unlink(missing_ok=True)
        exporter(engine)
        written.append((tmp_path / "best.safetensors").exists())
    assert written == [True, True, False]
    resumed = ExportBestWeights(network, tmp_path / "best.safetensors")
    resumed.load_state_dict(exporter.state_dict())
    assert resumed.best == 0.6
