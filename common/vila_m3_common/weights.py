"""Loading network weights: safetensors or a PyTorch state dict, never arbitrary pickles."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file

from .errors import UserError

Network = TypeVar("Network", bound=torch.nn.Module)


def read_state_dict(path: str | Path) -> dict[str, torch.Tensor]:
    """Read tensors by name from ``.safetensors``, or from ``.pt``/``.pth`` with ``weights_only``.

    Raises:
        UserError: if the file is missing, damaged, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"weights {path} do not exist; get them with `python -m monai.bundle download_large_files "
            f"--bundle_path {path.parent.parent}` or give another checkpoint"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(str(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise UserError(f"weights {path} are damaged or no state dict: {error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"weights {path} are damaged: {error}") from error
    if isinstance(state, dict):
        state = state.get("model", state.get("state_dict", state))
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"weights {path} hold no state dict (tensors by name); give another checkpoint")
    return state


def load_weights(network: Network, checkpoint: str | Path | None, device: str | torch.device = "cpu") -> Network:
    """Fill a network from a checkpoint, move it to ``device`` and put it into evaluation mode.

    Args:
        network: the module, built with its final shapes.
        checkpoint: file to read; None keeps the random initial weights (for tests).
        device: where the network shall run.

    Raises:
        UserError: naming the tensors that are missing, unexpected or of another shape.
    """
    if checkpoint:
        state = read_state_dict(checkpoint)
        expected = network.state_dict()
        problems = _differences(expected, state)
        if problems:
            raise UserError(f"weights {checkpoint} do not fit the network: {'; '.join(problems)}")
        network.load_state_dict(state)
    return network.to(device).eval()


def _differences(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], limit: int = 5) -> list[str]:
    problems = [f"missing {key}" for key in expected if key not in found]
    problems += [f"unexpected {key}" for key in found if key not in expected]
    problems += [
        f"{key} is {tuple(found[key].shape)}, needed {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != expected[key].shape
    ]
    more = len(problems) - limit
    return problems[:limit] + ([f"and {more} more"] if more > 0 else [])


def save_weights(network: torch.nn.Module, path: str | Path) -> Path:
    """Write a network's state dict as safetensors."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}, str(path))
    return path
