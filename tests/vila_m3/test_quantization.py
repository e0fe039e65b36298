"""Weight-only quantisation of the LLM."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vila_m3.answer import Answerer
from vila_m3.checkpoint import load_checkpoint, load_processor
from vila_m3.export import save_released
from vila_m3.model import VilaM3ForConditionalGeneration, build_model
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError

TINY_TOWER = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}


def logits(model: VilaM3ForConditionalGeneration, golden: Path) -> torch.Tensor:
    recorded = np.load(golden / "A_siglip_llama3.npz")
    with torch.no_grad():
        return model(inputs_embeds=torch.from_numpy(recorded["single.inputs_embeds"])).logits


@pytest.mark.parametrize(("quantization", "bound"), [("int8", 0.03), ("int4", 0.35)])
def test_quantised_logits_stay_near(golden: Path, quantization: str, bound: float) -> None:
    """The bound is the root mean square error relative to that of the logits; random weights suffer most."""
    full = logits(load_checkpoint(golden / "A_siglip_llama3"), golden)
    model = load_checkpoint(golden / "A_siglip_llama3", quantization=quantization)
    error = (logits(model, golden) - full).square().mean().sqrt() / full.square().mean().sqrt()
    assert 0 < float(error) < bound


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_the_linear_layers_of_the_llm_are_quantised_and_no_others(golden: Path, quantization: str) -> None:
    model = load_checkpoint(golden / "A_siglip_llama3", quantization=quantization)
    plain = {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and type(module.weight) is torch.nn.Parameter
    }
    assert all(not name.startswith("llm.model.") for name in plain)
    assert "llm.lm_head" in plain
    assert any(name.startswith("mm_projector.") for name in plain)
    assert any(name.startswith("vision_tower.") for name in plain)


@pytest.mark.parametrize(("quantization", "share"), [("int8", 0.27), ("int4", 0.19)])
def test_quantised_layers_take_less_memory(tmp_path: Path, quantization: str, share: float) -> None:
    """Bytes of a layer's weight with its scales, as a share of float32."""
    wide = build_model(
        {
            "text_config": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 64},
            "vision_config": TINY_TOWER,
        }
    )
    save_released(wide, None, tmp_path)
    weight = load_checkpoint(tmp_path, quantization=quantization).llm.model.layers[0].mlp.up_proj.weight
    inner = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    size = sum(part.numel() * part.element_size() for part in inner)
    assert size / (256 * 512 * 4) < share


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_quantised_model_answers(golden: Path, quantization: str) -> None:
    model = load_checkpoint(golden / "A_siglip_llama3", quantization=quantization)
    talk = Conversation()
    talk.add("user", "<image>what?", [np.zeros((5, 5, 3), np.uint8)])
    answers = Answerer(model, load_processor(golden / "A_siglip_llama3"), 4).answer_batch([talk])
    assert 0 < answers[0].new_token_count <= 4


def test_a_width_that_int4_cannot_group_is_refused(repository: Path, tmp_path: Path) -> None:
    odd = build_model(
        {
            "text_config": {
                "hidden_size": 40,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
            },
            "vision_config": TINY_TOWER,
        }
    )
    save_released(odd, None, tmp_path)
    with pytest.raises(
        UserError, match="int4 needs layers whose width is a multiple of 32, one here has (40|48); take int8"
    ):
        load_checkpoint(tmp_path, quantization="int4")
