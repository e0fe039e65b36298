"""The model as a transformers model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from vila_m3.checkpoint import load_checkpoint
from vila_m3.configuration import IMAGE_TOKEN_ID, VilaM3Config
from vila_m3.conv_stem import ConvStemConfig
from vila_m3.export import save_one_folder, save_released
from vila_m3.model import VilaM3ForConditionalGeneration, build_model
from vila_m3.processor import VilaM3Processor
from vila_m3.training import make_processor
from vila_m3_common.errors import UserError


def inputs(model: VilaM3ForConditionalGeneration) -> dict[str, torch.Tensor]:
    size, count = model.config.image_size, model.tokens_per_image
    ids = torch.tensor([[5, *[IMAGE_TOKEN_ID] * count, 6, 7, *[IMAGE_TOKEN_ID] * count, 8]])
    torch.manual_seed(3)
    return {"input_ids": ids, "pixel_values": torch.randn(2, 3, size, size)}


def test_images_and_places_must_agree(model: VilaM3ForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="4 image places in input_ids for 8 image tokens"):
        model(torch.tensor([[1, *[IMAGE_TOKEN_ID] * 4]]), torch.zeros(2, 3, 42, 42))
    with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
        model()


def test_a_saved_model_is_read_by_the_auto_classes(
    model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, tmp_path: Path
) -> None:
    save_one_folder(model, processor, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert isinstance(AutoModel.from_pretrained(tmp_path), VilaM3ForConditionalGeneration)
    for key in ("projector_type", "vision_feature_layer", "chat_template", "context_length", "drops_chunk_starts"):
        assert getattr(loaded.config, key) == getattr(model.config, key)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, VilaM3Processor)
    prompt = "<image>any text"
    assert again.encode_prompt(prompt) == processor.encode_prompt(prompt)
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()


def test_generate_equals_a_loop_without_cache(model: VilaM3ForConditionalGeneration) -> None:
    given = inputs(model)
    generated = model.generate(**given, max_new_tokens=6, do_sample=False, eos_token_id=None)[0].tolist()
    embeddings = model.embed(given["input_ids"], model.encode_images(given["pixel_values"]))
    expected = []
    with torch.no_grad():
        for _ in range(6):
            expected.append(int(model(inputs_embeds=embeddings).logits[0, -1].argmax()))
            token = model.get_input_embeddings()(torch.tensor([[expected[-1]]]))
            embeddings = torch.cat([embeddings, token], dim=1)
    assert generated == expected


def test_sdpa_equals_eager(model: VilaM3ForConditionalGeneration) -> None:
    with torch.no_grad():
        model.set_attn_implementation("eager")
        eager = model(**inputs(model)).logits
        model.set_attn_implementation("sdpa")
        assert model.llm.config._attn_implementation == "sdpa"
        torch.testing.assert_close(model(**inputs(model)).logits, eager, rtol=0, atol=2e-5)


@pytest.mark.parametrize("tower", ["siglip_vision_model", "clip_vision_model", "intern_vit_6b", "conv_stem_siglip"])
def test_gradient_checkpointing_changes_no_gradient(tower: str) -> None:
    torch.manual_seed(0)
    model = build_model(small_config(tower)).train()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": False})
    assert twin.is_gradient_checkpointing
    for each in (model, twin):
        given = inputs(each)
        each(**given, labels=given["input_ids"].clamp(min=0)).loss.backward()
    for (name, first), second in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert (first.grad is None) == (second.grad is None), name
        if first.grad is not None:
            torch.testing.assert_close(first.grad, second.grad, rtol=0, atol=1e-6)


def test_a_new_model_starts_as_the_original_does_and_its_stem_as_nothing() -> None:
    """The projector by torch's rule, without which trainings from nothing stayed blind; residual blocks at zero."""
    config = small_config("conv_stem_siglip")
    model = build_model({**config, "text_config": {**config["text_config"], "hidden_size": 64}})
    linears = [layer for layer in model.mm_projector.layers if isinstance(layer, torch.nn.Linear)]
    for layer in linears:
        assert layer.weight.std().item() == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.1)
    assert model.llm.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    residual = model.vision_tower.embeddings.patch_embedding.layers[-1]
    assert not residual.layers[-1].weight.any()
    assert residual.layers[2].weight.any()


def small_config(tower: str) -> dict[str, Any]:
    select = "cls_patch" if tower in ("siglip_vision_model", "conv_stem_siglip") else "patch"
    size = {"image_size": 24, "patch_size": 4, "stem_channels": [8, 16]} if tower == "conv_stem_siglip" else {}
    return {
        "vision_feature_select": select,
        "text_config": {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
        "vision_config": {
            "model_type": tower,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 42,
            "patch_size": 14,
            **size,
        },
    }


@pytest.mark.parametrize("tower", ["siglip_vision_model", "clip_vision_model", "intern_vit_6b", "conv_stem_siglip"])
def test_the_tower_stops_at_the_layer_that_is_read(tower: str) -> None:
    model = build_model(small_config(tower)).eval()
    with torch.no_grad():
        states = model.vision_states(inputs(model)["pixel_values"])
        assert len(states) == 4
        for layer in (-2, -1, 1):
            model.config.vision_feature_layer = layer
            expected = model.mm_projector(model.select_features(states[layer]))
            torch.testing.assert_close(model.encode_images(inputs(model)["pixel_values"]), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_feature_select": "cls"}, "unknown vision feature selection 'cls'; .*valid: cls_patch, patch"),
        ({"image_aspect_ratio": "anyres"}, "unknown image aspect ratio 'anyres'; .*valid: resize, pad, none"),
        (
            {"vision_config": {"model_type": "radio"}},
            "unknown vision tower 'radio'; .*valid: siglip_vision_model, clip",
        ),
        ({"text_config": {"model_type": "qwen2"}}, "the LLM has model_type 'qwen2'; VILA-M3 checkpoints hold a llama"),
        ({"projector_type": "qformer"}, "unknown projector type 'qformer'; valid: linear, mlp2x_gelu"),
    ],
)
def test_unknown_parts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model({**small_config("siglip_vision_model"), **changes})


def test_the_config_survives_its_file(tmp_path: Path) -> None:
    config = VilaM3Config(**small_config("clip_vision_model"), chat_template="hermes-2", drops_chunk_starts=False)
    config.save_pretrained(tmp_path)
    assert VilaM3Config.from_pretrained(tmp_path).to_dict() == config.to_dict()


def test_a_stem_of_convolutions_is_written_and_read_in_both_layouts(tmp_path: Path, processor: VilaM3Processor) -> None:
    config = small_config("conv_stem_siglip")
    config["text_config"]["vocab_size"] = 1024
    model = build_model(config).eval()
    assert model.tokens_per_image == 9
    own = make_processor(processor.tokenizer, model)
    save_released(model, own, tmp_path / "released")
    save_one_folder(model, own, tmp_path / "one")
    with torch.no_grad():
        expected = model(**inputs(model)).logits
        for folder in ("released", "one"):
            loaded = load_checkpoint(tmp_path / folder, dtype="float32")
            torch.testing.assert_close(loaded(**inputs(model)).logits, expected, rtol=0, atol=1e-6)


def test_a_stem_whose_halvings_do_not_make_the_patch_is_refused() -> None:
    with pytest.raises(UserError, match=r"stem_channels \[8, 16\] with patch_size 14 make no tower; .* patch_size 4"):
        ConvStemConfig(stem_channels=[8, 16], patch_size=14)
