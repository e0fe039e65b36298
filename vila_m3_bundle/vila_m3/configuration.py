"""The shape of a VILA-1.5 model: sub-configs of its parts, and how images and text go together."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from vila_m3_common.errors import UserError, check_choice

from .conv_stem import ConvStemConfig
from .intern_vit import InternVitConfig
from .projector import token_count

VISION_TYPES = ("siglip_vision_model", "clip_vision_model", InternVitConfig.model_type, ConvStemConfig.model_type)
# Towers without a class token.
PATCH_ONLY = ("siglip_vision_model", ConvStemConfig.model_type)
FEATURE_SELECTIONS = ("cls_patch", "patch")
ASPECT_RATIOS = ("resize", "pad", "none")

# Stands in input_ids where image features go; every visual token of an image has its own place.
IMAGE_TOKEN_ID = -200
IGNORED_LABEL = -100

AutoConfig.register(InternVitConfig.model_type, InternVitConfig, exist_ok=True)
AutoConfig.register(ConvStemConfig.model_type, ConvStemConfig, exist_ok=True)


class VilaM3Config(PretrainedConfig):
    """Shape of a VILA-1.5 model.

    Args:
        text_config: of the Llama, as config or dict.
        vision_config: of the vision tower (SigLIP, CLIP, InternViT, or SigLIP with a convolutional stem), as config or
            dict with ``model_type``.
        projector_type: ``mlp_downsample``, ``linear``, ``mlp2x_gelu`` or ``mlp3x_gelu``.
        vision_feature_layer: index into the tower's hidden states (0 is the embeddings; no post-layernorm).
        vision_feature_select: ``cls_patch`` keeps all tokens, ``patch`` drops token 0, the class token.
        image_aspect_ratio: how pictures become square: ``resize``, ``pad`` or ``none`` (the tower's own default).
        chat_template: name of the template the LLM was trained with.
        context_length: longest sequence in tokens, images included; None takes the LLM's positions.
        drops_chunk_starts: whether the first token of every chunk after an image is dropped when the text
            begins with the start token, as the code that trained the released weights did.
        released_configs: ``config.json`` of the released layout and of its three folders, kept word for word so
            that they can be written back.
        kwargs: what :class:`transformers.PretrainedConfig` takes.

    Raises:
        UserError: for a vision tower, a feature selection or an aspect ratio that does not exist.
    """

    model_type = "vila_m3"
    sub_configs = {"text_config": LlamaConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        text_config: LlamaConfig | dict[str, Any] | None = None,
        vision_config: PretrainedConfig | dict[str, Any] | None = None,
        projector_type: str = "mlp_downsample",
        vision_feature_layer: int = -2,
        vision_feature_select: str = "cls_patch",
        image_aspect_ratio: str = "resize",
        chat_template: str = "llama_3",
        context_length: int | None = None,
        drops_chunk_starts: bool = True,
        released_configs: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        check_choice(vision_feature_select, FEATURE_SELECTIONS, "vision feature selection")
        check_aspect_ratio(image_aspect_ratio)
        self.text_config = _text_config(text_config)
        self.vision_config = _vision_config(vision_config)
        self.projector_type = projector_type
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select = vision_feature_select
        self.image_aspect_ratio = image_aspect_ratio
        self.chat_template = chat_template
        self.context_length = context_length or self.text_config.max_position_embeddings
        self.drops_chunk_starts = drops_chunk_starts
        self.released_configs = released_configs or {}
        kwargs.setdefault("tie_word_embeddings", self.text_config.tie_word_embeddings)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, getattr(self.text_config, name))
        super().__init__(**kwargs)

    @property
    def vision_token_count(self) -> int:
        """Tokens of one image that leave the vision tower, after the feature selection."""
        side = int(self.vision_config.image_size) // int(self.vision_config.patch_size)
        has_class_token = self.vision_config.model_type not in PATCH_ONLY
        count = side * side + has_class_token
        return count - 1 if self.vision_feature_select == "patch" else count

    @property
    def tokens_per_image(self) -> int:
        """How many places one image takes in ``input_ids``."""
        return token_count(self.projector_type, self.vision_token_count)

    @property
    def image_size(self) -> int:
        """Side of the square picture that the vision tower reads, in pixels."""
        return int(self.vision_config.image_size)


def check_aspect_ratio(given: str) -> None:
    """Raise a UserError unless ``given`` is a way of making pictures square that exists."""
    check_choice(given, ASPECT_RATIOS, "image aspect ratio")


def _text_config(given: LlamaConfig | dict[str, Any] | None) -> LlamaConfig:
    if isinstance(given, LlamaConfig):
        return given
    values = dict(given or {})
    kind = values.pop("model_type", "llama")
    if kind != "llama":
        raise UserError(f"the LLM has model_type {kind!r}; VILA-M3 checkpoints hold a llama")
    return LlamaConfig(**values)


def _vision_config(given: PretrainedConfig | dict[str, Any] | None) -> PretrainedConfig:
    if isinstance(given, PretrainedConfig):
        return given
    values = dict(given or {})
    kind = values.pop("model_type", "siglip_vision_model")
    check_choice(kind, VISION_TYPES, "vision tower")
    return AutoConfig.for_model(kind, **values)


AutoConfig.register(VilaM3Config.model_type, VilaM3Config, exist_ok=True)
