"""VILA-1.5: vision tower -> projector -> Llama, as a transformers model.

https://arxiv.org/abs/2312.07533. The parameter names are those of the released layout with the folder as prefix:
``llm.model.layers.0...``, ``vision_tower.encoder.layers.0...``, ``mm_projector.layers.1...``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    CLIPVisionModel,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipVisionModel,
)
from transformers import initialization as start
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration import IMAGE_TOKEN_ID, VilaM3Config
from .conv_stem import ConvStemModel
from .intern_vit import InternVitModel
from .projector import MultimodalProjector
from .tensor_files import Stored

VISION_TOWERS = {
    "siglip_vision_model": SiglipVisionModel,
    "clip_vision_model": CLIPVisionModel,
    "intern_vit_6b": InternVitModel,
    "conv_stem_siglip": ConvStemModel,
}


class VilaM3ForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The vision-language model.

    Args:
        config: its shape.
    """

    config: VilaM3Config
    config_class = VilaM3Config
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules = ["LlamaDecoderLayer", "SiglipEncoderLayer", "CLIPEncoderLayer", "_Layer", "MultimodalProjector"]
    _skip_keys_device_placement = ["past_key_values"]

    def __init__(self, config: VilaM3Config) -> None:
        super().__init__(config)
        self.llm = LlamaForCausalLM(config.text_config)
        self.vision_tower = VISION_TOWERS[config.vision_config.model_type](config.vision_config)
        self.mm_projector = MultimodalProjector(
            config.projector_type, config.vision_config.hidden_size, config.text_config.hidden_size
        )
        self.stored = Stored()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start the projector as torch does, like the original; tower and LLM start by their own rules.

        With the smaller weights that transformers gives a layer, a model that starts from nothing may stay blind.
        """
        if isinstance(module, nn.Linear):
            start.kaiming_uniform_(module.weight, a=5**0.5)
            bound = module.in_features**-0.5
            start.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)

    @property
    def tokens_per_image(self) -> int:
        """How many places one image takes in ``input_ids``."""
        return int(self.config.tokens_per_image)

    @property
    def context_length(self) -> int:
        """Longest sequence in tokens, images included."""
        return int(self.config.context_length)

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings of the LLM."""
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings of the LLM."""
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the head of the LLM."""
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head of the LLM."""
        self.llm.set_output_embeddings(new_embeddings)

    def vision_states(self, pixel_values: torch.Tensor, count: int | None = None) -> list[torch.Tensor]:
        """Run the vision tower layer by layer.

        Args:
            pixel_values: ``(N, 3, S, S)``.
            count: how many hidden states are wanted; None takes all. The layers behind them, the last
                norm and the pooling head are not run.

        Returns:
            The embeddings and the output of each layer, each ``(N, tokens, channels)``.
        """
        tower = self.vision_tower
        weight = tower.embeddings.patch_embedding.weight
        state = tower.embeddings(pixel_values.to(weight.device, weight.dtype))
        if hasattr(tower, "pre_layrnorm"):  # CLIP; the spelling is that of its released weights
            state = tower.pre_layrnorm(state)
        states = [state]
        for layer in tower.encoder.layers[: None if count is None else count - 1]:
            state = layer(state) if isinstance(tower, InternVitModel) else layer(state, attention_mask=None)
            states.append(state)
        return states

    def select_features(self, state: torch.Tensor) -> torch.Tensor:
        """Drop the class token of a hidden state ``(N, tokens, channels)`` where the config says so."""
        return state[:, 1:] if self.config.vision_feature_select == "patch" else state

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(N, 3, S, S)`` as the image processor makes them -> ``(N, tokens_per_image, hidden)``."""
        layer = self.config.vision_feature_layer
        count = layer + 1 if layer >= 0 else len(self.vision_tower.encoder.layers) + 2 + layer
        return self.mm_projector(self.select_features(self.vision_states(pixel_values, count)[-1]))

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """Replace the image places by features, images in order.

        Args:
            input_ids: ``(B, L)`` with ``IMAGE_TOKEN_ID`` at every visual token.
            image_features: ``(N, tokens_per_image, hidden)`` of all images of the batch, row by row.

        Returns:
            ``(B, L, hidden)``.

        Raises:
            ValueError: if places and features differ in number.
        """
        is_image = input_ids == IMAGE_TOKEN_ID
        embeddings = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        place_count = int(is_image.sum())
        feature_count = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if place_count != feature_count:
            raise ValueError(f"{place_count} image places in input_ids for {feature_count} image tokens")
        if image_features is None or place_count == 0:
            return embeddings
        flat = image_features.reshape(-1, image_features.shape[-1]).to(embeddings.device, embeddings.dtype)
        return embeddings.masked_scatter(is_image[..., None], flat)

    def _embed_all(self, input_ids: torch.Tensor | None, pixel_values: torch.Tensor | None) -> torch.Tensor:
        if input_ids is None:
            raise ValueError("give either input_ids or inputs_embeds")
        if pixel_values is None or not len(pixel_values):
            return self.embed(input_ids)
        return self.embed(input_ids, self.encode_images(pixel_values))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute logits, and with ``labels`` the mean cross-entropy of the supervised tokens.

        Args:
            input_ids: ``(B, L)`` with ``IMAGE_TOKEN_ID`` at every visual token.
            pixel_values: ``(N, 3, S, S)``, all images of the batch row by row; None without images.
            attention_mask: ``(B, L)``, 0 at padding.
            position_ids: ``(B, L)``; None counts from the start of the row.
            past_key_values: cache of the tokens before.
            inputs_embeds: ``(B, L, hidden)`` in place of ``input_ids`` and ``pixel_values``.
            labels: ``(B, L)``, ``IGNORED_LABEL`` where nothing is supervised.
            use_cache: whether a cache is returned.
            logits_to_keep: how many positions, from the end, get logits; 0 for all.
            kwargs: what :class:`transformers.LlamaForCausalLM` takes.

        Returns:
            ``logits`` ``(B, L, vocabulary)``, ``loss`` with labels, ``past_key_values`` with ``use_cache``.
        """
        if inputs_embeds is None:
            inputs_embeds = self._embed_all(input_ids, pixel_values)
        return self.llm(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate with transformers' own loop; see :meth:`transformers.GenerationMixin.generate`.

        The images are encoded once and the loop runs on embeddings, so that only **new** tokens are returned.

        Args:
            input_ids: ``(B, L)`` with ``IMAGE_TOKEN_ID`` at every visual token, padded on the left.
            pixel_values: ``(N, 3, S, S)``, all images of the batch row by row.
            inputs_embeds: ``(B, L, hidden)`` in place of both.
            kwargs: ``attention_mask``, ``generation_config``, ``max_new_tokens``, ``streamer``, ...

        Returns:
            Token ids ``(B, new)``, or what ``return_dict_in_generate`` asks for.
        """
        if inputs_embeds is None:
            inputs_embeds = self._embed_all(input_ids, pixel_values)
        return super().generate(  # type: ignore[misc]
            inputs_embeds=inputs_embeds, **kwargs
        )


def build_model(config: dict[str, Any]) -> VilaM3ForConditionalGeneration:
    """Build a model with random weights.

    Args:
        config: keyword arguments of :class:`VilaM3Config`.
    """
    return VilaM3ForConditionalGeneration(VilaM3Config(**config))


AutoModel.register(VilaM3Config, VilaM3ForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(VilaM3Config, VilaM3ForConditionalGeneration, exist_ok=True)
