import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from vila_m3.configuration import IGNORED_LABEL, IMAGE_TOKEN_ID
from vila_m3.estimate import activation_bytes, estimate, plan_table
from vila_m3.model import VilaM3ForConditionalGeneration, build_model
from vila_m3.trainer import SupervisedLoss, checkpoint_gradients
from vila_m3_common.errors import UserError

PARTS = ("llm", "vision_tower", "mm_projector")


def shape_of(model: VilaM3ForConditionalGeneration) -> dict[str, Any]:
    config = model.config
    return {"text_config": config.text_config.to_dict(), "vision_config": config.vision_config.to_dict()}


@pytest.mark.parametrize("parts", [PARTS, ("mm_projector",)])
def test_weights_and_optimizer_are_what_a_training_holds(
    start: Any, model: VilaM3ForConditionalGeneration, parts: tuple[str, ...]
) -> None:
    """To 1%: AdamW also keeps a step number per parameter."""
    trainer = start(parts=parts, epochs=1)
    trainer.run()
    found = estimate(shape_of(model), parts, is_sharded=False)
    weights = sum(value.nbytes for value in trainer.network.parameters())
    moments = sum(value.nbytes for state in trainer.optimizer.state.values() for value in state.values() if value.dim())
    assert found.weights == pytest.approx(weights, rel=0.01)
    assert found.optimizer == pytest.approx(moments, rel=0.01)
    assert found.gradients == pytest.approx(found.optimizer / 2, rel=0.01)


SHAPES = {
    "a wide model": ((96, 240, 3, 256), (32, 64, 84), 0.2),
    "a deep model": ((48, 96, 8, 256), (32, 64, 84), 0.2),
    "a large vocabulary": ((32, 64, 2, 2048), (32, 64, 84), 0.5),
    "large images": ((32, 64, 2, 256), (64, 256, 168), 0.1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_activations_are_what_a_step_holds(shape: tuple[tuple[int, ...], tuple[int, ...], float]) -> None:
    """Within 15% of the most bytes of activations and temporary tensors that torch counts in one step."""
    (hidden, middle, layers, vocabulary), (channels, vision_middle, size), share = shape
    text = {"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": middle, "num_hidden_layers": layers}
    vision = {"hidden_size": channels, "intermediate_size": vision_middle, "num_hidden_layers": 2, "image_size": size}
    heads = {"num_attention_heads": 2}
    kind = {"model_type": "siglip_vision_model", "patch_size": 14}
    model = build_model({"text_config": {**text, **heads}, "vision_config": {**vision, **heads, **kind}})
    found = activation_bytes(model, row_tokens=1024, images=4, supervised_share=share)
    assert found == pytest.approx(measured_bytes(model, 1024, 4, share), rel=0.15)


def measured_bytes(model: VilaM3ForConditionalGeneration, tokens: int, images: int, share: float) -> int:
    loss = SupervisedLoss(checkpoint_gradients(model.train().to(torch.bfloat16)))
    ids = torch.ones(1, tokens, dtype=torch.long)
    ids[:, : images * model.tokens_per_image] = IMAGE_TOKEN_ID
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[:, tokens - int(tokens * share) :] = 1
    size = model.config.vision_config.image_size
    tracker = MemTracker()
    tracker.track_external(loss)
    with tracker:
        loss(ids, labels, torch.arange(tokens)[None], torch.rand(images, 3, size, size)).backward()
    peak = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]
    return sum(value for kind, value in peak.items() if getattr(kind, "value", kind) in ("Activation", "Temp"))


def test_shares_become_smaller_with_more_devices(model: VilaM3ForConditionalGeneration) -> None:
    one, four = (estimate(shape_of(model), PARTS, devices=devices) for devices in (1, 4))
    assert four.weights == one.weights // 4
    assert four.activations == one.activations
    assert four.tokens_per_second == pytest.approx(4 * one.tokens_per_second)


def test_the_plan_of_the_papers_runs_in_the_docs_is_the_tools(repository: Path) -> None:
    """Every run fits GPUs of 80 GB."""
    config = json.loads((repository / "vila_m3_bundle/configs/estimate.json").read_text())
    names = ("is_sharded", "row_tokens", "images", "supervised_share", "peak_flops", "utilisation")
    options = {name: config[name] for name in names}
    lines = plan_table(repository / "vila_m3_bundle/configs", config["runs"], config["trained_parts"], **options)
    docs = (repository / "vila_m3_bundle/docs/training.md").read_text()
    assert "\n".join(lines) in docs
    assert all(float(line.split("|")[8]) < 80e9 / 2**30 for line in lines[2:])
    with pytest.raises(UserError, match="no size '8'; .*valid: 13B, 3B, 40B, 8B"):
        plan_table(repository / "vila_m3_bundle/configs", {"8": 1}, PARTS)
