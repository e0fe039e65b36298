"""Writes checkpoints: the released three-folder layout, transformers' one-folder layout, and one from the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from vila_m3_common.errors import UserError, exits_with_message

from .checkpoint import PARTS, RELEASED_TYPE, load_checkpoint, load_processor
from .configuration import VilaM3Config
from .intern_vit import InternVitConfig
from .model import VilaM3ForConditionalGeneration
from .processor import VilaM3Processor

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def save_released(
    model: VilaM3ForConditionalGeneration,
    processor: VilaM3Processor | None,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a model in the released layout.

    Args:
        model: as loaded or trained.
        processor: whose tokenizer is written too; None leaves the tokenizer out.
        folder: created when missing.
        dtype: of all tensors; None writes those that were loaded in the dtype they had on disk.
        max_shard_size: larger parts are split.
    """
    folder = Path(folder)
    configs = released_configs(model.config)
    for part in PARTS:
        (folder / part).mkdir(parents=True, exist_ok=True)
        _write_json(configs[part], folder / part / "config.json")
        tensors = _part_tensors(model, part, dtype)
        save_torch_state_dict(tensors, folder / part, max_shard_size=max_shard_size, metadata={"format": "pt"})
    _write_json(configs["config"], folder / "config.json")
    if "preprocessor" in configs:
        _write_json(configs["preprocessor"], folder / "vision_tower" / "preprocessor_config.json")
    if model.generation_config is not None:
        model.generation_config.save_pretrained(str(folder / "llm"))
    if processor is not None:
        save_tokenizer(processor, folder / "llm")
    return folder


def _part_tensors(
    model: VilaM3ForConditionalGeneration, part: str, dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Return the tensors of a part under their released names."""
    stored, tied = model.stored, set(model.all_tied_weights_keys)
    named = {name: value for name, value in model.state_dict().items() if name not in tied}
    tensors = {}
    for name, value in {**named, **stored.extras}.items():
        if not name.startswith(f"{part}."):
            continue
        target = dtype or stored.dtypes.get(name, value.dtype)
        cast = value.detach().to("cpu", target if value.is_floating_point() else None)
        tensors[released_name(name, model.config)] = cast.contiguous()
    return tensors


def released_name(name: str, config: VilaM3Config) -> str:
    """Return what a parameter is called in the files of its part."""
    part, _, short = name.partition(".")
    is_wrapped = part == "vision_tower" and config.vision_config.model_type != InternVitConfig.model_type
    return f"vision_model.{short}" if is_wrapped else short


def released_configs(config: VilaM3Config) -> dict[str, dict[str, Any]]:
    """Return the config files of the released layout: as they were read, with what this config says now."""
    before = config.released_configs
    llm, vision = _stored_config(config.text_config), _stored_config(config.vision_config)
    top = {
        "model_type": RELEASED_TYPE,
        "architectures": ["LlavaLlamaModel"],
        "chat_template": config.chat_template,
        "drops_chunk_starts": config.drops_chunk_starts,
        "hidden_size": config.text_config.hidden_size,
        "image_aspect_ratio": config.image_aspect_ratio,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_feature": config.vision_feature_select,
        "mm_vision_select_layer": config.vision_feature_layer,
    }
    projector = {"model_type": "v2l_projector", "mm_projector_type": config.projector_type}
    llm["tokenizer_model_max_length"] = config.context_length
    written = {"config": top, "llm": llm, "vision_tower": vision, "mm_projector": projector}
    merged = {name: {**before.get(name, {}), **values} for name, values in written.items()}
    return {**({"preprocessor": before["preprocessor"]} if "preprocessor" in before else {}), **merged}


def _stored_config(config: Any) -> dict[str, Any]:
    """Return a sub-config as older transformers read it, with ``rope_theta`` at the top."""
    values = config.to_dict()
    rope = values.pop("rope_parameters", None) or {}
    if "rope_theta" in rope:
        values["rope_theta"] = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    if scaling.get("rope_type", "default") != "default":
        values["rope_scaling"] = scaling
    return {key: value for key, value in values.items() if key not in ("_name_or_path", "transformers_version")}


def save_tokenizer(processor: VilaM3Processor, folder: Path) -> None:
    """Copy the tokenizer's files from where it was loaded; write them anew when they are gone."""
    source = Path(str(processor.tokenizer.name_or_path))
    files = [source / name for name in TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        processor.tokenizer.save_pretrained(str(folder))
    for file in files:
        if file.parent.resolve() != folder.resolve():
            shutil.copyfile(file, folder / file.name)


def _write_json(values: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def save_one_folder(model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, folder: str | Path) -> Path:
    """Write a model and its processor as transformers does; ``AutoModel`` and ``AutoProcessor`` read them."""
    model.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))
    return Path(folder)


@exits_with_message
def convert(checkpoint: str, output_dir: str, layout: str) -> Path:
    """Rewrite a checkpoint in the other layout; every tensor keeps its dtype.

    Args:
        checkpoint: folder in either layout, or a Hugging Face id.
        output_dir: target, which must be empty or absent.
        layout: ``one_folder`` or ``released``.
    """
    if layout not in ("one_folder", "released"):
        raise UserError(f"unknown layout {layout!r}; valid: one_folder, released")
    target = _empty_folder(output_dir)
    model = load_checkpoint(checkpoint, dtype="stored", show_progress=True)
    processor = load_processor(checkpoint)
    if layout == "released":
        save_released(model, processor, target)
    else:
        save_one_folder(model, processor, target)
    print(f"written to {target}")
    return target


def _empty_folder(output_dir: str) -> Path:
    target = Path(output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} is not empty; give an --output_dir that does not exist yet")
    return target
