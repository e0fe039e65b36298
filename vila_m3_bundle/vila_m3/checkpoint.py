"""Reads checkpoints: the released three-folder layout of VILA-1.5, and transformers' one-folder layout.

The released layout is ``config.json`` above ``llm/``, ``vision_tower/`` and ``mm_projector/``, each with a
``config.json`` and weights; ``llm/`` also holds the tokenizer and ``vision_tower/`` the image processor's config.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import dispatch_model, infer_auto_device_map, init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from vila_m3_common.errors import UserError

from .configuration import VilaM3Config
from .model import VilaM3ForConditionalGeneration
from .processor import VilaM3Processor, build_processor
from .quantization import quantizer
from .tensor_files import Stored, list_tensors, read_tensors, weight_files
from .tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

PARTS = ("llm", "vision_tower", "mm_projector")
RELEASED_TYPE = "llava_llama"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Keys of stored configs that describe the writer, not the network.
_WRITER_KEYS = {"_name_or_path", "architectures", "transformers_version", "torch_dtype", "dtype", "auto_map"}
# What older writers stored although it is computed, and heads that a tower may be built without.
_COMPUTED = re.compile(r"(^|\.)(position_ids|rotary_emb\.inv_freq)$")
_UNUSED = re.compile(r"^vision_tower\.(vision_model\.)?(head|post_layernorm)\.")
_NAMES_IN_ERRORS = 5


def resolve_checkpoint(checkpoint: str | Path, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint; a Hugging Face id is downloaded first.

    Downloads are kept in the Hugging Face cache (``HF_HOME``) and go on where they were cut off; with
    ``HF_HUB_OFFLINE=1`` only the cache is looked at.

    Args:
        checkpoint: a folder, or an id such as ``MONAI/Llama3-VILA-M3-8B``.
        revision: branch, tag or commit of a Hugging Face repository.

    Raises:
        UserError: if there is neither.
    """
    folder = Path(checkpoint).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(checkpoint)):
        raise UserError(
            f"checkpoint {checkpoint} does not exist; give a folder, or a Hugging Face id such as "
            "MONAI/Llama3-VILA-M3-8B"
        )
    try:
        patterns = ["*.json", "*.safetensors", "*.bin", "*.model"]
        return Path(snapshot_download(str(checkpoint), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"checkpoint {checkpoint} is no folder here and could not be had from Hugging Face ({_first_line(error)}); "
            "check the name and the network, or download it elsewhere and give its folder"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]


def is_released_layout(folder: Path) -> bool:
    """Return whether a folder has the released layout.

    Raises:
        UserError: if it is no checkpoint of either layout.
    """
    kind = _read_json(folder / "config.json").get("model_type")
    if kind not in (RELEASED_TYPE, VilaM3Config.model_type):
        raise UserError(
            f"{folder / 'config.json'} has model_type {kind!r}; read are {RELEASED_TYPE} (released layout) and "
            f"{VilaM3Config.model_type} (one folder)"
        )
    return kind == RELEASED_TYPE


def read_config(folder: Path, chat_template: str | None = None) -> VilaM3Config:
    """Read the config of a checkpoint in either layout.

    Args:
        folder: the checkpoint.
        chat_template: overrules what the checkpoint says or what its tokenizer tells.

    Raises:
        UserError: naming the file and what in it is not supported.
    """
    if not is_released_layout(folder):
        config = VilaM3Config(**_read_json(folder / "config.json"))
        config.chat_template = chat_template or config.chat_template
        return config
    stored = {"config": _read_json(folder / "config.json")}
    stored |= {part: _read_json(folder / part / "config.json") for part in PARTS}
    preprocessor = folder / "vision_tower" / "preprocessor_config.json"
    if preprocessor.is_file():
        stored["preprocessor"] = _read_json(preprocessor)
    top, llm = stored["config"], stored["llm"]
    _check_supported(top, folder / "config.json")
    return VilaM3Config(
        text_config=_network_keys(llm),
        vision_config=_network_keys(stored["vision_tower"]),
        projector_type=stored["mm_projector"]["mm_projector_type"],
        vision_feature_layer=top.get("mm_vision_select_layer", -2),
        vision_feature_select=top.get("mm_vision_select_feature", "cls_patch"),
        image_aspect_ratio=top.get("image_aspect_ratio") or "none",
        chat_template=chat_template or top.get("chat_template") or _guess_template(folder / "llm"),
        context_length=llm.get("tokenizer_model_max_length") or llm.get("model_max_length"),
        drops_chunk_starts=top.get("drops_chunk_starts", True),
        released_configs=stored,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(
            f"{path} is missing; a checkpoint is a folder with config.json, llm/, vision_tower/ and mm_projector/, "
            "or one that transformers wrote"
        )
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON ({error}); get the file again") from error


def _check_supported(top: Mapping[str, Any], path: Path) -> None:
    """Refuse variants of VILA that no VILA-M3 checkpoint uses, rather than compute something else."""
    for key in ("s2", "mm_use_im_start_end", "mm_use_im_patch_token"):
        if top.get(key):
            raise UserError(f"{path} sets {key}, which VILA-M3 does not use and this program does not compute")


def _network_keys(stored: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in stored.items() if key not in _WRITER_KEYS}


def _guess_template(llm: Path) -> str:
    """Released configs do not name the template; the turn tokens of the tokenizer do."""
    files = [llm / name for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json")]
    text = "".join(file.read_text() for file in files if file.is_file())
    marks = {"llama_3": '"<|eot_id|>"', "hermes-2": '"<|im_start|>"'}
    return next((name for name, mark in marks.items() if mark in text), "vicuna_v1")


def default_dtype(device: str | torch.device) -> torch.dtype:
    """Return bfloat16 on an accelerator, float32 on a CPU."""
    return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16


def load_checkpoint(
    checkpoint: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    device_map: str | dict[str, Any] | None = None,
    attention: str = "sdpa",
    quantization: str | None = None,
    chat_template: str | None = None,
    show_progress: bool = False,
) -> VilaM3ForConditionalGeneration:
    """Load a model, tensor by tensor: memory never holds the weights twice.

    Args:
        checkpoint: folder in either layout, or a Hugging Face id.
        device: where it runs.
        dtype: ``float32``, ``bfloat16``, ``float16`` (as the reference served it) or ``stored`` (each tensor as
            on disk); None takes bfloat16 on an accelerator and float32 on a CPU.
        device_map: ``auto`` to spread it over all devices, or module name -> device; overrules ``device``.
        attention: ``sdpa``, ``eager`` or another implementation of transformers.
        quantization: ``int8`` or ``int4`` weights in the LLM's linear layers; None for none.
        chat_template: overrules the checkpoint's.
        show_progress: whether to draw a progress bar.

    Returns:
        The model in evaluation mode.

    Raises:
        UserError: naming the file and the tensors that are missing, unexpected, damaged or of another shape.
    """
    folder = resolve_checkpoint(checkpoint)
    config = read_config(folder, chat_template)
    config._attn_implementation = attention
    with init_empty_weights(include_buffers=False):
        model = VilaM3ForConditionalGeneration(config)
    target = _dtype(dtype, device)
    devices = _device_map(model, device_map, device, target)
    fill(model, _part_folders(folder), target, devices, quantizer(quantization), show_progress)
    model.tie_weights()
    generation_config = folder / "llm" if is_released_layout(folder) else folder
    if (generation_config / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(str(generation_config))
    if len(set(devices.values())) > 1:
        model = dispatch_model(model, devices)
    else:
        model.to(next(iter(devices.values())))
    return model.eval()


def _part_folders(folder: Path) -> dict[str, Path]:
    """Prefix of parameter names -> folder of the weights."""
    if is_released_layout(folder):
        return {f"{part}.": folder / part for part in PARTS}
    return {"": folder}


def _dtype(given: str | torch.dtype | None, device: str | torch.device) -> torch.dtype | None:
    """Return the dtype to load in; None keeps each tensor's own."""
    if given is None:
        return default_dtype(device)
    if isinstance(given, torch.dtype):
        return given
    if given == "stored":
        return None
    if given not in DTYPES:
        raise UserError(f"unknown dtype {given!r}; valid: {', '.join(DTYPES)}, stored")
    return DTYPES[given]


def _device_map(
    model: VilaM3ForConditionalGeneration,
    given: str | dict[str, Any] | None,
    device: str | torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Any]:
    if given is None:
        return {"": torch.device(device)}
    if isinstance(given, dict):
        return given
    if given != "auto":
        raise UserError(f"unknown device_map {given!r}; valid: auto, or a table of module names to devices")
    return infer_auto_device_map(model, no_split_module_classes=sorted(model._no_split_modules or ()), dtype=dtype)


def _device_of(name: str, devices: Mapping[str, Any]) -> Any:
    """Return the device of the longest module name that a parameter stands under."""
    prefixes = [module for module in devices if not module or name == module or name.startswith(f"{module}.")]
    return devices[max(prefixes, key=len)]


def fill(
    model: VilaM3ForConditionalGeneration,
    folders: Mapping[str, Path],
    dtype: torch.dtype | None,
    devices: Mapping[str, Any],
    quantize: Callable[[nn.Linear], None] | None = None,
    show_progress: bool = False,
) -> None:
    """Read the weights of all parts into a model on the meta device.

    Names and shapes of every file are compared with the model before the first value is read.

    Args:
        model: parameters on the meta device.
        folders: prefix of the parameter names -> folder.
        dtype: None keeps each tensor's own.
        devices: module name -> device.
        quantize: is given each linear layer of the LLM when its weight has come.
        show_progress: whether to draw a progress bar.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    optional = set(model.all_tied_weights_keys)
    plan = [_compare(prefix, folder, expected, optional) for prefix, folder in folders.items()]
    model.stored = Stored()
    total = sum(len(names) for _, names in plan)
    with tqdm(total=total, desc="weights", unit="tensor", disable=not show_progress) as bar:
        for prefix, names in plan:
            for file in dict.fromkeys(names.values()):
                for stored_name, value in read_tensors(file):
                    _place(model, model_name(prefix + stored_name), value, dtype, devices, quantize)
                    bar.update()


def model_name(stored_name: str) -> str:
    """Released SigLIP and CLIP towers stand under ``vision_model.``, which transformers 5 does without."""
    return stored_name.replace("vision_tower.vision_model.", "vision_tower.", 1)


def _compare(
    prefix: str, folder: Path, expected: Mapping[str, tuple[int, ...]], optional: set[str]
) -> tuple[str, dict[str, Path]]:
    """Check that the files of one folder hold what the model needs; return prefix and stored name -> file."""
    tensors = list_tensors(weight_files(folder))
    found = {model_name(prefix + name): tensor for name, tensor in tensors.items()}
    needed = {name for name in expected if name.startswith(prefix)}
    missing = sorted(needed - set(found) - optional)
    unexpected = sorted(name for name in set(found) - needed if not (_COMPUTED.search(name) or _UNUSED.match(name)))
    wrong = [
        f"{name} is {tensor.shape}, needed {expected[name]}"
        for name, tensor in found.items()
        if name in needed and tensor.shape != expected[name]
    ]
    problems = [f"missing {_some(missing)}"] if missing else []
    problems += [f"unexpected {_some(unexpected)}"] if unexpected else []
    problems += [_some(wrong)] if wrong else []
    if problems:
        files = ", ".join(dict.fromkeys(str(tensor.file) for tensor in tensors.values()))
        raise UserError(f"weights {files} do not fit {folder / 'config.json'}: {'; '.join(problems)}")
    return prefix, {name: tensor.file for name, tensor in tensors.items()}


def _some(names: list[str]) -> str:
    more = len(names) - _NAMES_IN_ERRORS
    return ", ".join(names[:_NAMES_IN_ERRORS]) + (f" and {more} more" if more > 0 else "")


def _place(
    model: VilaM3ForConditionalGeneration,
    name: str,
    value: torch.Tensor,
    dtype: torch.dtype | None,
    devices: Mapping[str, Any],
    quantize: Callable[[nn.Linear], None] | None,
) -> None:
    """Copy one tensor out of its file into the model."""
    module_name, _, leaf = name.rpartition(".")
    module = _submodule(model, module_name)
    model.stored.dtypes[name] = value.dtype
    if module is None or leaf not in module._parameters:
        model.stored.extras[name] = value.clone()
        return
    # A copy even where nothing changes: the file may be replaced while the model lives.
    copied = value.to(_device_of(name, devices), dtype if value.is_floating_point() else None, copy=True)
    module._parameters[leaf] = nn.Parameter(copied, requires_grad=copied.is_floating_point())
    if quantize is not None and name.startswith("llm.model.") and isinstance(module, nn.Linear):
        quantize(module)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def load_processor(checkpoint: str | Path, chat_template: str | None = None) -> VilaM3Processor:
    """Load tokenizer, image processor and template of a checkpoint in either layout.

    Args:
        checkpoint: folder, or a Hugging Face id.
        chat_template: overrules the checkpoint's.
    """
    folder = resolve_checkpoint(checkpoint)
    config = read_config(folder, chat_template)
    tokenizer = load_tokenizer(folder / "llm" if is_released_layout(folder) else folder)
    return build_processor(tokenizer, config)
