"""InternViT-6B, the vision tower of the 40B model, under the parameter names of its released files.

A plain vision transformer with a class token, RMS norms, learnt scales of the residual branches, and
queries and keys normalised over all heads together (https://arxiv.org/abs/2312.14238, section 3.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput


class InternVitConfig(PretrainedConfig):
    """Shape of an InternViT; the defaults are those of InternViT-6B-448px.

    Args:
        hidden_size: channels of a token.
        intermediate_size: width of the MLP.
        num_hidden_layers: transformer layers.
        num_attention_heads: heads.
        num_channels: channels of an image.
        image_size: side of the square image in pixels.
        patch_size: side of a patch in pixels.
        hidden_act: activation of the MLP.
        layer_norm_eps: epsilon of every norm.
        qkv_bias: whether queries, keys and values have a bias.
        qk_normalization: whether queries and keys are normalised.
        initializer_factor: start value of the residual scales.
        initializer_range: standard deviation of new weights.
        kwargs: what :class:`transformers.PretrainedConfig` takes.
    """

    model_type = "intern_vit_6b"

    def __init__(
        self,
        hidden_size: int = 3200,
        intermediate_size: int = 12800,
        num_hidden_layers: int = 45,
        num_attention_heads: int = 25,
        num_channels: int = 3,
        image_size: int = 448,
        patch_size: int = 14,
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        qkv_bias: bool = False,
        qk_normalization: bool = True,
        initializer_factor: float = 0.1,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.image_size = image_size
        self.patch_size = patch_size
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.qkv_bias = qkv_bias
        self.qk_normalization = qk_normalization
        self.initializer_factor = initializer_factor
        self.initializer_range = initializer_range


class _Embeddings(nn.Module):
    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch)
        token_count = (config.image_size // patch) ** 2 + 1
        self.position_embedding = nn.Parameter(torch.zeros(1, token_count, width))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        tokens = patches.flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(tokens), -1, -1)
        return torch.cat([first, tokens], dim=1) + self.position_embedding


class _Attention(nn.Module):
    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.head_count = config.num_attention_heads
        self.is_eager = config._attn_implementation == "eager"
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.proj = nn.Linear(width, width)
        if config.qk_normalization:
            self.q_norm: nn.Module = nn.RMSNorm(width, eps=config.layer_norm_eps)
            self.k_norm: nn.Module = nn.RMSNorm(width, eps=config.layer_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(tokens).chunk(3, dim=-1)
        query, key, value = self._heads(self.q_norm(query)), self._heads(self.k_norm(key)), self._heads(value)
        if self.is_eager:
            scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
            mixed = scores.softmax(dim=-1) @ value
        else:
            mixed = scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))

    def _heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """``(N, T, C)`` -> ``(N, heads, T, C / heads)``."""
        return tokens.unflatten(-1, (self.head_count, -1)).transpose(1, 2)


class _Mlp(nn.Module):
    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(tokens)))


class _Layer(GradientCheckpointingLayer):
    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attn = _Attention(config)
        self.mlp = _Mlp(config)
        self.norm1 = nn.RMSNorm(width, eps=config.layer_norm_eps)
        self.norm2 = nn.RMSNorm(width, eps=config.layer_norm_eps)
        self.ls1 = nn.Parameter(torch.full((width,), config.initializer_factor))
        self.ls2 = nn.Parameter(torch.full((width,), config.initializer_factor))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.attn(self.norm1(tokens)) * self.ls1
        return tokens + self.mlp(self.norm2(tokens)) * self.ls2


class _Encoder(nn.Module):
    def __init__(self, config: InternVitConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))


class InternVitModel(PreTrainedModel):
    """The vision tower.

    Args:
        config: its shape.
    """

    config_class = InternVitConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["_Layer"]

    def __init__(self, config: InternVitConfig) -> None:
        super().__init__(config)
        self.embeddings = _Embeddings(config)
        self.encoder = _Encoder(config)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: bool = False, **kwargs: Any) -> BaseModelOutput:
        """Encode images ``(N, 3, S, S)``.

        Returns:
            ``last_hidden_state`` ``(N, 1 + patches, C)``, the class token first; with
            ``output_hidden_states`` the embeddings and the output of every layer.
        """
        tokens = self.embeddings(pixel_values)
        states = [tokens]
        for layer in self.encoder.layers:
            tokens = layer(tokens)
            states.append(tokens)
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=tuple(states) if output_hidden_states else None)
