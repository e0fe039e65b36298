"""LoRA and DoRA: attach, train, save, load, merge."""

import json
from pathlib import Path

import pytest
import torch

from vila_m3.adapters import attach_adapter, load_adapter, merge_adapter
from vila_m3.checkpoint import load_checkpoint
from vila_m3.inference import load_network
from vila_m3.model import VilaM3ForConditionalGeneration
from vila_m3_common.errors import UserError


@pytest.fixture
def base(golden: Path) -> VilaM3ForConditionalGeneration:
    return load_checkpoint(golden / "A_siglip_llama3")


def batch(model: VilaM3ForConditionalGeneration) -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, *[-200] * model.tokens_per_image, 6, 7, 8]])
    torch.manual_seed(1)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 72, 72)}


def logits(model: VilaM3ForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch(model)).logits


def train(adapted: torch.nn.Module, model: VilaM3ForConditionalGeneration) -> None:
    """Three steps, so that the adapter says something."""
    optimizer = torch.optim.SGD([value for value in adapted.parameters() if value.requires_grad], lr=0.5)
    given = batch(model)
    for _ in range(3):
        optimizer.zero_grad()
        adapted.train()(**given, labels=given["input_ids"].clamp(min=0)).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("includes_tower", [False, True])
def test_a_saved_adapter_loads_and_merges(
    golden: Path, base: VilaM3ForConditionalGeneration, tmp_path: Path, use_dora: bool, includes_tower: bool
) -> None:
    before = logits(base)
    adapted = attach_adapter(base, rank=4, use_dora=use_dora, includes_tower=includes_tower, trains_projector=True)
    torch.testing.assert_close(logits(base), before, rtol=0, atol=1e-5)
    train(adapted, base)
    trained = logits(base)
    assert float((trained - before).abs().max()) > 1e-2
    adapted.save_pretrained(tmp_path)
    loaded = load_checkpoint(golden / "A_siglip_llama3")
    load_adapter(loaded, tmp_path)
    torch.testing.assert_close(logits(loaded), trained, rtol=0, atol=1e-5)
    merged = merge_adapter(adapted)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), trained, rtol=0, atol=2e-5)


def test_only_the_adapter_is_trained(base: VilaM3ForConditionalGeneration) -> None:
    adapted = attach_adapter(base, rank=4)
    trainable = [name for name, value in adapted.named_parameters() if value.requires_grad]
    assert trainable
    assert all("lora" in name and ".llm." in name for name in trainable)


def test_the_settings_are_the_recipes(base: VilaM3ForConditionalGeneration, tmp_path: Path) -> None:
    attach_adapter(base).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (stored["r"], stored["lora_alpha"], stored["lora_dropout"]) == (64, 16, 0.05)


def test_the_bundle_loads_a_checkpoint_with_its_adapter(
    golden: Path, base: VilaM3ForConditionalGeneration, tmp_path: Path
) -> None:
    adapted = attach_adapter(base, rank=4)
    train(adapted, base)
    trained = logits(base)
    adapted.save_pretrained(tmp_path)
    network = load_network(str(golden / "A_siglip_llama3"), adapter=str(tmp_path))
    torch.testing.assert_close(logits(network), trained, rtol=0, atol=2e-5)
    assert not any("lora" in name for name, _ in network.named_parameters())


def test_an_adapter_stays_beside_quantised_weights(
    golden: Path, base: VilaM3ForConditionalGeneration, tmp_path: Path
) -> None:
    adapted = attach_adapter(base, rank=4)
    train(adapted, base)
    adapted.save_pretrained(tmp_path)
    plain = load_network(str(golden / "A_siglip_llama3"), quantization="int8")
    network = load_network(str(golden / "A_siglip_llama3"), quantization="int8", adapter=str(tmp_path))
    assert any("lora" in name for name, _ in network.named_parameters())
    assert float((logits(network) - logits(plain)).abs().max()) > 1e-2


def test_a_folder_without_adapter_is_refused(base: VilaM3ForConditionalGeneration, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no adapter \(adapter_config.json\); give the folder that a LoRA"):
        load_adapter(base, tmp_path)


def test_an_adapter_of_another_model_is_refused(
    golden: Path, base: VilaM3ForConditionalGeneration, model: VilaM3ForConditionalGeneration, tmp_path: Path
) -> None:
    attach_adapter(base, rank=4).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not fit the model .*; load the model it was trained on"):
        load_adapter(model, tmp_path)


def test_a_rank_of_nothing_is_refused(base: VilaM3ForConditionalGeneration) -> None:
    with pytest.raises(UserError, match="rank 0 is no size of an adapter; give at least 1"):
        attach_adapter(base, rank=0)
