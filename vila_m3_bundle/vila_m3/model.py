"""VILA-1.5: vision tower -> projector -> Llama, in the three-folder layout of the released checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel
from transformers.cache_utils import Cache

from vila_m3_common.errors import UserError
from vila_m3_common.weights import read_state_dict

from .projector import MultimodalProjector

# Stands in input_ids where image features go; every visual token of an image has its own place.
IMAGE_TOKEN_ID = -200
IGNORED_LABEL = -100


class VilaM3(nn.Module):
    """The VLM.

    Args:
        llm: the language model.
        vision_tower: a SigLIP vision model.
        projector: vision tokens -> LLM embeddings.
        select_layer: index into the tower's hidden states (no post-layernorm).
        chat_template: name of the template the LLM was trained with.
    """

    def __init__(
        self,
        llm: LlamaForCausalLM,
        vision_tower: SiglipVisionModel,
        projector: MultimodalProjector,
        select_layer: int = -2,
        chat_template: str = "llama_3",
    ) -> None:
        super().__init__()
        self.llm = llm
        self.vision_tower = vision_tower
        self.mm_projector = projector
        self.select_layer = select_layer
        self.chat_template = chat_template

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.llm.device

    @property
    def image_size(self) -> int:
        """Side of the square picture that the vision tower reads, in pixels."""
        return int(self.vision_tower.config.image_size)  # type: ignore[arg-type]

    @property
    def tokens_per_image(self) -> int:
        """How many places one image takes in ``input_ids``."""
        grid = self.image_size // int(self.vision_tower.config.patch_size)  # type: ignore[arg-type]
        return self.mm_projector.token_count(grid * grid)

    @property
    def max_length(self) -> int:
        """Longest sequence in tokens, images included."""
        return int(self.llm.config.max_position_embeddings)

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """``(N, 3, S, S)`` in -1..1 -> ``(N, tokens_per_image, hidden)``."""
        outputs = self.vision_tower(pixel_values, output_hidden_states=True)
        return self.mm_projector(outputs.hidden_states[self.select_layer])

    def embed(self, input_ids: torch.Tensor, image_features: torch.Tensor | None) -> torch.Tensor:
        """Replace the image places by features, images in order.

        Args:
            input_ids: ``(B, L)`` with ``IMAGE_TOKEN_ID`` at every visual token.
            image_features: ``(N, tokens_per_image, hidden)`` of all images of the batch, row by row.

        Returns:
            ``(B, L, hidden)``.
        """
        is_image = input_ids == IMAGE_TOKEN_ID
        embeddings = self.llm.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        place_count = int(is_image.sum())
        feature_count = 0 if image_features is None else image_features.shape[0] * image_features.shape[1]
        if place_count != feature_count:
            raise ValueError(f"{place_count} image places in input_ids for {feature_count} image tokens")
        if image_features is None or place_count == 0:
            return embeddings
        flat = image_features.reshape(-1, image_features.shape[-1]).to(embeddings.dtype)
        return embeddings.masked_scatter(is_image[..., None], flat)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute logits ``(B, L, vocabulary)``.

        Args:
            input_ids: ``(B, L)`` with ``IMAGE_TOKEN_ID`` at every visual token.
            pixel_values: ``(N, 3, S, S)``, all images of the batch row by row; None without images.
            attention_mask: ``(B, L)``, 0 at padding.
        """
        features = None if pixel_values is None else self.encode_images(pixel_values)
        embeddings = self.embed(input_ids, features)
        return self.llm(inputs_embeds=embeddings, attention_mask=attention_mask, use_cache=False).logits

    def step(self, embeddings: torch.Tensor, cache: Cache) -> torch.Tensor:
        """Feed ``(1, L, hidden)`` after what ``cache`` holds; return the last logits ``(vocabulary,)``."""
        outputs = self.llm(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return outputs.logits[0, -1]


def build_model(config: dict[str, Any]) -> VilaM3:
    """Build a model with random weights.

    Args:
        config: ``llm`` and ``vision_tower`` (keyword arguments of LlamaConfig and SiglipVisionConfig),
            ``mm_projector_type``, ``select_layer`` and ``chat_template``.
    """
    llm_config = LlamaConfig(**config["llm"])
    vision_config = SiglipVisionConfig(**{**config["vision_tower"], "vision_use_head": False})
    projector = MultimodalProjector(
        config.get("mm_projector_type", "mlp_downsample"), vision_config.hidden_size, llm_config.hidden_size
    )
    return VilaM3(
        LlamaForCausalLM(llm_config),
        SiglipVisionModel(vision_config),
        projector,
        int(config.get("select_layer", -2)),
        str(config.get("chat_template", "llama_3")),
    )


def load_model(folder: str | Path, device: str | torch.device = "cpu") -> VilaM3:
    """Load a checkpoint: ``config.json`` above ``llm/``, ``vision_tower/`` and ``mm_projector/``.

    Raises:
        UserError: naming the file or tensors that are missing or do not fit.
    """
    folder = Path(folder)
    top = _read_json(folder / "config.json")
    if top.get("model_type") != "llava_llama":
        raise UserError(f"{folder / 'config.json'} has model_type {top.get('model_type')!r}; llava_llama is read")
    projector_config = _read_json(folder / "mm_projector" / "config.json")
    model = build_model(
        {
            "llm": _sub_config(folder / "llm"),
            "vision_tower": _sub_config(folder / "vision_tower"),
            "mm_projector_type": projector_config["mm_projector_type"],
            "select_layer": top.get("mm_vision_select_layer", -2),
            "chat_template": top.get("chat_template", "llama_3"),
        }
    )
    parts: tuple[tuple[str, nn.Module], ...] = (
        ("llm", model.llm),
        ("vision_tower", model.vision_tower),
        ("mm_projector", model.mm_projector),
    )
    for name, part in parts:
        _load_part(part, folder / name)
    return model.to(device).eval()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path} is missing; a checkpoint is a folder with config.json, llm/, vision_tower/ and mm_projector/"
        )
    return json.loads(path.read_text())


def _sub_config(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "config.json")
    return {key: value for key, value in config.items() if key not in _FOREIGN_KEYS}


# Keys of stored configs that describe the writer, not the network.
_FOREIGN_KEYS = {"_name_or_path", "architectures", "model_type", "transformers_version", "torch_dtype", "dtype"}


def _load_part(part: nn.Module, folder: Path) -> None:
    """Load one folder; half-precision files are widened to the module's own precision."""
    path = folder / "model.safetensors"
    state = read_state_dict(path)
    if any(key.startswith("vision_model.") for key in state) and not hasattr(part, "vision_model"):
        state = {key.removeprefix("vision_model."): value for key, value in state.items()}
    expected = part.state_dict()
    tied = {"lm_head.weight"} if getattr(getattr(part, "config", None), "tie_word_embeddings", False) else set()
    unused = {
        key
        for key in state
        if key.startswith(("post_layernorm", "vision_model.post_layernorm", "head.", "vision_model.head."))
    }
    missing = [key for key in expected if key not in state and key not in tied]
    unexpected = [key for key in state if key not in expected and key not in unused]
    if missing or unexpected:
        raise UserError(f"{path} does not fit its config: missing {missing[:5]}, unexpected {unexpected[:5]}")
    wrong = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if wrong:
        shapes = ", ".join(f"{key} {tuple(state[key].shape)} != {tuple(expected[key].shape)}" for key in wrong[:5])
        raise UserError(f"{path} does not fit its config: {shapes}")
    part.load_state_dict({key: state[key] for key in expected if key in state}, strict=False)


def save_model(model: VilaM3, folder: str | Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint in the three-folder layout, without the tokenizer (see the processor).

    Args:
        model: the model.
        folder: target, created when missing.
        dtype: precision of the stored tensors.
    """
    folder = Path(folder)
    llm_config, vision_config = model.llm.config.to_dict(), model.vision_tower.config.to_dict()
    parts = {
        "llm": (model.llm, llm_config),
        "vision_tower": (model.vision_tower, vision_config),
        "mm_projector": (
            model.mm_projector,
            {"model_type": "v2l_projector", "mm_projector_type": model.mm_projector.kind},
        ),
    }
    for name, (part, config) in parts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
        save_file(_tensors(part, dtype), str(folder / name / "model.safetensors"), metadata={"format": "pt"})
    top = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaModel"],
        "chat_template": model.chat_template,
        "hidden_size": llm_config["hidden_size"],
        "image_aspect_ratio": "resize",
        "mm_hidden_size": vision_config["hidden_size"],
        "mm_vision_select_feature": "cls_patch",
        "mm_vision_select_layer": model.select_layer,
    }
    (folder / "config.json").write_text(json.dumps(top, indent=2, sort_keys=True))
    return folder


def _tensors(part: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tied = getattr(getattr(part, "config", None), "tie_word_embeddings", False)
    return {
        key: value.detach().to("cpu", dtype).contiguous()
        for key, value in part.state_dict().items()
        if not (tied and key == "lm_head.weight")
    }


__all__ = ["IGNORED_LABEL", "IMAGE_TOKEN_ID", "VilaM3", "build_model", "load_model", "save_model"]
