from typing import Any

import pytest

from vila_m3.estimate import describe, estimate
from vila_m3.model import VilaM3ForConditionalGeneration

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


def test_shares_become_smaller_with_more_devices(model: VilaM3ForConditionalGeneration) -> None:
    one, four = (estimate(shape_of(model), PARTS, devices=devices) for devices in (1, 4))
    assert four.weights == one.weights // 4
    assert four.activations == one.activations
    assert "total" in describe(four)
