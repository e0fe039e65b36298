"""Tensors on disk, read one at a time: safetensors or pickled state dicts, whole or in shards."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from vila_m3_common.errors import UserError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class StoredTensor:
    """What a file says of a tensor before it is read."""

    name: str
    file: Path
    shape: tuple[int, ...]


@dataclass
class Stored:
    """How the tensors of a checkpoint stood on disk, to write them back alike.

    Args:
        dtypes: full tensor name -> dtype.
        extras: tensors of the files that are no parameters of the model.
    """

    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    extras: dict[str, torch.Tensor] = field(default_factory=dict)


def weight_files(folder: Path) -> list[Path]:
    """Return the weight files of a folder: one, or all shards that its index names.

    Raises:
        UserError: if there is none, or a shard is missing.
    """
    for name in INDEXES:
        index = folder / name
        if index.is_file():
            return _shards(index)
    for name in WHOLE_FILES:
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(
        f"{folder} holds no weights ({', '.join((*WHOLE_FILES, *INDEXES))}); the checkpoint is incomplete, get it again"
    )


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{index} is damaged: it needs a weight_map of tensor names to files") from error
    files = [index.parent / Path(name).name for name in names]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{index} names shards that are missing: {', '.join(missing)}; get the checkpoint again")
    return files


def list_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """Read names and shapes of all tensors; the values stay on disk.

    Raises:
        UserError: for a damaged file, or a tensor that stands in two files.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, shape in _headers(file):
            if name in found:
                raise UserError(f"{file} and {found[name].file} both hold {name}; keep one checkpoint in the folder")
            found[name] = StoredTensor(name, file, shape)
    return found


def _headers(file: Path) -> list[tuple[str, tuple[int, ...]]]:
    if file.suffix == ".safetensors":
        with _open_safetensors(file) as opened:
            return [(name, tuple(opened.get_slice(name).get_shape())) for name in opened.keys()]  # noqa: SIM118
    return [(name, tuple(value.shape)) for name, value in _load_pickled(file).items()]


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, tensor) one by one; each is a view of the file that the caller must copy."""
    if file.suffix != ".safetensors":
        yield from _load_pickled(file).items()
        return
    with _open_safetensors(file) as opened:
        for name in opened.keys():  # noqa: SIM118
            yield name, opened.get_tensor(name)


def _open_safetensors(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"weights {file} are damaged or cut off ({error}); get the file again") from error


def _load_pickled(file: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"weights {file} are damaged, cut off or no state dict; get the file again") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"weights {file} hold no state dict (tensors by name); give another checkpoint")
    return state
