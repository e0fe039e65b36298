"""What a training needs before it is started: memory of each accelerator by part, tokens a second."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from accelerate import init_empty_weights

from .model import VilaM3ForConditionalGeneration, build_model
from .trainer import train_parts

_FULL, _HALF = 4, 2


@dataclass(frozen=True)
class Estimate:
    """Bytes of one accelerator by part, and speed of all together.

    Args:
        weights: parameters in float32.
        gradients: of what learns, in float32.
        optimizer: two moments of AdamW.
        gathered: two layers' parameters in bfloat16, which sharded training holds whole for a while.
        activations: inputs of all layers, one layer computed again, and logits at supervised places.
        tokens_per_second: of all accelerators.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    tokens_per_second: float

    @property
    def total(self) -> int:
        """Bytes of one accelerator."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations


def estimate(
    config: Mapping[str, Any],
    parts: Sequence[str],
    devices: int = 1,
    is_sharded: bool = True,
    row_tokens: int = 4096,
    supervised_share: float = 0.25,
    peak_flops: float = 989e12,
    utilisation: float = 0.35,
) -> Estimate:
    """Estimate a training in bfloat16 with AdamW whose activations are computed again.

    Args:
        config: keyword arguments of :class:`vila_m3.configuration.VilaM3Config`.
        parts: what learns (see :func:`vila_m3.trainer.train_parts`).
        devices: number of accelerators.
        is_sharded: FSDP, or DDP when False.
        row_tokens: tokens of a micro-batch.
        supervised_share: of the tokens, which get logits.
        peak_flops: of one accelerator; 989e12 is an H100's in bfloat16 (NVIDIA's data sheet, without sparsity).
        utilisation: share of it that is used; an assumption to be replaced by a measurement.
    """
    with init_empty_weights():
        model = build_model(dict(config))
    model.tie_weights()
    train_parts(model, parts)
    sizes = {name: (value.numel(), value.requires_grad) for name, value in model.named_parameters()}
    count = sum(size for size, _ in sizes.values())
    learns = sum(size for size, is_trained in sizes.values() if is_trained)
    share = devices if is_sharded else 1
    layer = _largest_layer(sizes)
    return Estimate(
        weights=_FULL * count // share,
        gradients=_FULL * learns // share,
        optimizer=2 * _FULL * learns // share,
        gathered=2 * _HALF * layer if is_sharded else 0,
        activations=_activations(model, row_tokens, supervised_share),
        # Two operations a parameter and token forward, two for the inputs' gradients, two for what learns.
        tokens_per_second=devices * peak_flops * utilisation / (4 * count + 2 * learns),
    )


def _largest_layer(sizes: Mapping[str, tuple[int, bool]]) -> int:
    layers: dict[str, int] = {}
    for name, (size, _) in sizes.items():
        head, is_layer, tail = name.partition(".layers.")
        key = f"{head}.{tail.split('.')[0]}" if is_layer else "root"
        layers[key] = layers.get(key, 0) + size
    return max(layers.values())


def _activations(model: VilaM3ForConditionalGeneration, row_tokens: int, supervised_share: float) -> int:
    text = model.config.text_config
    kept = text.num_hidden_layers * row_tokens * text.hidden_size * _HALF
    recomputed = row_tokens * (8 * text.hidden_size + 4 * text.intermediate_size) * _HALF
    logits = int(row_tokens * supervised_share) * text.vocab_size * (_HALF + 2 * _FULL)
    return kept + recomputed + logits


def describe(found: Estimate) -> str:
    """Return the estimate as lines of text, in GiB."""
    parts = {name: value for name, value in asdict(found).items() if name != "tokens_per_second"}
    lines = [f"{name:12} {value / 2**30:8.2f} GiB" for name, value in {**parts, "total": found.total}.items()]
    return "\n".join([*lines, f"{'speed':12} {found.tokens_per_second:8.0f} tokens/s of all accelerators"])
