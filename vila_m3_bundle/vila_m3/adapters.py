"""LoRA and DoRA adapters through peft: attach, save, load, merge."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model

from vila_m3_common.errors import UserError

from .model import VilaM3ForConditionalGeneration

_LLM_LAYERS = r"llm\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# SigLIP and CLIP name the parts of their attention, InternViT keeps queries, keys and values in one layer.
_TOWER_LAYERS = r"vision_tower\.encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|attn\.(qkv|proj)|mlp\.fc[12])"


def attach_adapter(
    model: VilaM3ForConditionalGeneration,
    rank: int = 64,
    alpha: int = 16,
    dropout: float = 0.05,
    use_dora: bool = False,
    includes_tower: bool = False,
    trains_projector: bool = False,
) -> PeftModel:
    """Freeze a model and add trainable low-rank weights to its linear layers (https://arxiv.org/abs/2106.09685).

    Args:
        model: changed in place; it computes with the adapter from now on.
        rank: of the added weights.
        alpha: the added weights count ``alpha / rank``.
        dropout: before the added weights, in training.
        use_dora: whether magnitudes are learnt apart (DoRA, https://arxiv.org/abs/2402.09353).
        includes_tower: whether the vision tower gets an adapter too, beside the LLM.
        trains_projector: whether the projector is trained whole and saved with the adapter.

    Returns:
        The model in peft's wrapper, which trains and saves the adapter alone.
    """
    if rank < 1:
        raise UserError(f"rank {rank} is no size of an adapter; give at least 1, such as 64")
    layers = f"({_LLM_LAYERS}|{_TOWER_LAYERS})" if includes_tower else _LLM_LAYERS
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=use_dora,
        target_modules=layers,
        modules_to_save=["mm_projector"] if trains_projector else None,
    )
    return get_peft_model(model, config)


def load_adapter(model: VilaM3ForConditionalGeneration, folder: str | Path, is_trainable: bool = False) -> PeftModel:
    """Add a saved adapter to a model, which computes with it from now on.

    Args:
        model: changed in place.
        folder: what ``save_pretrained`` of an adapter wrote.
        is_trainable: whether to go on training it.

    Raises:
        UserError: if the folder holds no adapter, or one for a model of another shape.
    """
    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds no adapter (adapter_config.json); give the folder that a LoRA training wrote")
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"adapter {folder} does not fit the model ({reason}); load the model it was trained on"
        ) from error


def merge_adapter(adapted: PeftModel) -> VilaM3ForConditionalGeneration:
    """Add the adapter's weights to the model's own, so that nothing of it is left at run time."""
    return adapted.merge_and_unload()
