"""What a training needs before it is started: memory of each accelerator by part, tokens a second."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights

from vila_m3_common.errors import UserError, near_match_hint

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
        activations: see :func:`activation_bytes`.
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
    images: int = 4,
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
        images: of a micro-batch.
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
    row_flops = _row_flops(model, sizes, row_tokens, images)
    return Estimate(
        weights=_FULL * count // share,
        gradients=_FULL * learns // share,
        optimizer=2 * _FULL * learns // share,
        gathered=2 * _HALF * _largest_layer(sizes) if is_sharded else 0,
        activations=activation_bytes(model, row_tokens, images, supervised_share),
        tokens_per_second=devices * peak_flops * utilisation * row_tokens / row_flops,
    )


def _largest_layer(sizes: Mapping[str, tuple[int, bool]]) -> int:
    layers: dict[str, int] = {}
    for name, (size, _) in sizes.items():
        head, is_layer, tail = name.partition(".layers.")
        key = f"{head}.{tail.split('.')[0]}" if is_layer else "root"
        layers[key] = layers.get(key, 0) + size
    return max(layers.values())


def _row_flops(
    model: VilaM3ForConditionalGeneration, sizes: Mapping[str, tuple[int, bool]], row_tokens: int, images: int
) -> float:
    """Two operations a parameter and place forward, two forward again, two for the inputs, two for what learns."""
    total = 0.0
    for name, (size, is_trained) in sizes.items():
        places = images * _patches(model) if name.startswith("vision_tower.") else row_tokens
        total += size * places * (8 if is_trained else 6)
    return total


def _patches(model: VilaM3ForConditionalGeneration) -> int:
    vision = model.config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2)


def activation_bytes(
    model: VilaM3ForConditionalGeneration, row_tokens: int, images: int, supervised_share: float
) -> int:
    """Return the most that activations and their gradients take in a step in bfloat16, each layer computed again.

    Kept are the inputs of all layers and the pixels. The most is added to them either by the loss (logits three times
    in float32: shifted, their logarithms, their gradients) or by the layer that is computed again. What one layer
    holds by place, ``32 h + 11 i`` and ``12 h + 6 i`` bytes with ``h`` channels and ``i`` in the middle of the MLP,
    was read off measurements of small models (torch 2.13), with which the tests compare this function.

    Args:
        model: of which only the shape is read.
        row_tokens: tokens of a micro-batch.
        images: of a micro-batch.
        supervised_share: of the tokens, which get logits.
    """
    text, vision = model.config.text_config, model.config.vision_config
    hidden, middle = text.hidden_size, text.intermediate_size
    places, channels = images * _patches(model), vision.hidden_size
    sees = any(value.requires_grad for value in model.vision_tower.parameters())
    seen_layers = vision.num_hidden_layers if sees else 0
    kept_vision = _HALF * places * channels * (seen_layers + 2)
    kept_vision += images * 3 * vision.image_size**2 * _HALF if sees else 0
    kept_text = _HALF * row_tokens * hidden * (text.num_hidden_layers + 1)
    loss = 3 * _FULL * int(row_tokens * supervised_share) * text.vocab_size
    layer = row_tokens * (32 * hidden + 11 * middle)
    vision_layer = places * (12 * channels + 6 * vision.intermediate_size) if sees else 0
    return kept_vision + max(kept_text + max(loss, layer), vision_layer)


def plan_table(configs: str | Path, runs: Mapping[str, int], parts: Sequence[str], **options: Any) -> list[str]:
    """Return the estimates of several sizes as lines of a Markdown table, GiB of each accelerator.

    Args:
        configs: folder of the ``size_<name>.json`` files.
        runs: name of the size -> number of accelerators.
        parts: what learns.
        options: of :func:`estimate`.

    Raises:
        UserError: if there is no such size.
    """
    lines = [
        "| model | GPUs | weights | gradients | optimizer | gathered | activations | total | tokens/s of all |",
        f"|{' --- |' * 9}",
    ]
    for name, devices in runs.items():
        found = estimate(_shape(Path(configs), name), parts, devices, **options)
        memory = (found.weights, found.gradients, found.optimizer, found.gathered, found.activations)
        cells = [f"{value / 2**30:.2f}" for value in memory]
        cells += [f"{found.total / 2**30:.1f}", f"{found.tokens_per_second:,.0f}"]
        lines.append(f"| {name} | {devices} | {' | '.join(cells)} |")
    return lines


def _shape(configs: Path, name: str) -> Mapping[str, Any]:
    shapes = {path.stem.removeprefix("size_"): json.loads(path.read_text()) for path in configs.glob("size_*.json")}
    valid = sorted(size.upper() for size, config in shapes.items() if "model_config" in config)
    if name.upper() not in valid:
        raise UserError(f"no size {name!r}; {near_match_hint(name, valid)}valid: {', '.join(valid)}")
    shape: Mapping[str, Any] = shapes[name.lower()]["model_config"]
    return shape


def print_plan(configs: str | Path, runs: Mapping[str, int], parts: Sequence[str], **options: Any) -> None:
    """Print the table of :func:`plan_table`."""
    print("\n".join(plan_table(configs, runs, parts, **options)))
