"""Weight-only quantisation of the LLM's linear layers through torchao, on CPU and GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vila_m3_common.errors import UserError

QUANTIZATIONS = ("int8", "int4")
INT4_GROUP_SIZE = 32


def quantizer(name: str | None) -> Callable[[nn.Linear], None] | None:
    """Return a function that quantises one linear layer in place; None for no quantisation.

    Args:
        name: ``int8`` (one scale per output channel) or ``int4`` (scale and zero point per 32 weights).

    Raises:
        UserError: for another name.
    """
    if name is None:
        return None
    if name not in QUANTIZATIONS:
        raise UserError(f"unknown quantization {name!r}; valid: {', '.join(QUANTIZATIONS)}")

    def quantize(linear: nn.Linear) -> None:
        # transformers has imported torchao already where it is installed; the experts do without it.
        from torchao.quantization import quantize_

        if name == "int4" and linear.in_features % INT4_GROUP_SIZE:
            raise UserError(
                f"int4 needs layers whose width is a multiple of {INT4_GROUP_SIZE}, one here has {linear.in_features}; "
                "take int8"
            )
        quantize_(linear, _config(name, linear.weight.device))

    return quantize


def _config(name: str, device: torch.device) -> Any:
    """Return torchao's config; int4 weights are packed in another way for each kind of device."""
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if name == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    if device.type != "cpu":
        return Int4WeightOnlyConfig(
            group_size=INT4_GROUP_SIZE, set_inductor_config=False, int4_packing_format="tile_packed_to_4d"
        )
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=INT4_GROUP_SIZE, set_inductor_config=False)
