"""The full-size ensemble: seven DenseNet121 at 224 and one ResNet50 at 512, with the released weights."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from monai.networks.nets import DenseNet121, resnet50
from torch import nn

from vila_m3_common.errors import UserError, near_match_hint
from vila_m3_common.prompts import CXR_FINDINGS
from vila_m3_common.weights import read_state_dict

from .network import CxrEnsemble, CxrMember
from .pickled import read_pickled_network
from .released_table import CLASS_MODELS, RELEASED_MODELS, ReleasedModel

# TorchXRayVision's name of a tensor -> MONAI's. The two ResNets agree; wrappers add a prefix.
_KEY_CHANGES = (
    (re.compile(r"^model\."), ""),
    (re.compile(r"(denselayer\d+)\.(norm|conv)"), r"\1.layers.\2"),
    (re.compile(r"^classifier\."), "class_layers.out."),
)
# Stored by some versions next to the weights; the table holds them.
_NOT_WEIGHTS = ("op_threshs",)


def build_ensemble(
    names: Sequence[str] | None = None, untrained_heads_vote: bool = False, restricts_classes: bool = True
) -> CxrEnsemble:
    """Build the networks of released weight sets, with random weights.

    Args:
        names: which of ``RELEASED_MODELS`` to use; None takes all eight.
        untrained_heads_vote: True gives the reference's mean, see :class:`CxrEnsemble`.
        restricts_classes: whether eight findings are left to the reference's choice of models (``CLASS_MODELS``).

    Raises:
        UserError: if a name is unknown or the list is empty.
    """
    names = list(RELEASED_MODELS) if names is None else list(names)
    if not names:
        raise UserError(f"no chest X-ray model was chosen; valid: {', '.join(RELEASED_MODELS)}")
    for name in names:
        if name not in RELEASED_MODELS:
            hint = near_match_hint(name, list(RELEASED_MODELS))
            raise UserError(f"unknown chest X-ray model {name!r}; {hint}valid: {', '.join(RELEASED_MODELS)}")
    members = {name: _build_member(RELEASED_MODELS[name]) for name in names}
    return CxrEnsemble(members, untrained_heads_vote, CLASS_MODELS if restricts_classes else None)


def _build_member(released: ReleasedModel) -> CxrMember:
    targets = [finding if finding in released.op_threshs else "" for finding in CXR_FINDINGS]
    points = [released.op_threshs.get(finding) for finding in CXR_FINDINGS]
    network = build_resnet50() if "resnet50" in released.file else build_densenet121()
    return CxrMember(network, released.input_size, targets, points)


def build_densenet121() -> nn.Module:
    """Return the network of the seven DenseNet sets: ``(B, 1, 224, 224)`` to ``(B, 18)`` logits."""
    return DenseNet121(spatial_dims=2, in_channels=1, out_channels=len(CXR_FINDINGS))


def build_resnet50() -> nn.Module:
    """Return the network of the ResNet set: ``(B, 1, 512, 512)`` to ``(B, 18)`` logits."""
    # MONAI's ResNet is made for volumes: its defaults do not stride in the stem and add a bias to the shortcuts.
    return resnet50(
        spatial_dims=2, n_input_channels=1, num_classes=len(CXR_FINDINGS), conv1_t_stride=2, bias_downsample=False
    )


def rename_released(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Give the tensors of a released DenseNet121 or ResNet50 the names of MONAI's networks."""
    renamed = {}
    for key, value in state.items():
        if key in _NOT_WEIGHTS:
            continue
        for pattern, replacement in _KEY_CHANGES:
            key = pattern.sub(replacement, key)
        renamed[key] = value
    return renamed


def load_released(network: CxrEnsemble, models_dir: str | Path, device: str | torch.device = "cpu") -> CxrEnsemble:
    """Fill every member from its own file, move the ensemble to ``device`` and put it into evaluation mode.

    Args:
        network: from :func:`build_ensemble`.
        models_dir: holds a file per member: the released ``.pt``, or a state dict of that name with the ending
            ``.safetensors``.
        device: where the ensemble shall run.

    Raises:
        UserError: if a file is missing or damaged, names what is no part of the network, or does not fit.
    """
    for name, member in network.classifiers.items():
        path = find_weights(name, models_dir)
        state = rename_released(_read(name, path))
        misfits = _find_misfits(member.network.state_dict(), state)
        if misfits:
            listed = ", ".join(misfits[:3])
            raise UserError(
                f"weights {path} do not fit {name}: {len(misfits)} tensors are missing, unexpected or of another shape "
                f"({listed} ...); give the weights of that model"
            )
        member.network.load_state_dict(state)
    return network.to(device).eval()


def _find_misfits(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> list[str]:
    one_sided = expected.keys() ^ found.keys()
    reshaped = {key for key in expected.keys() & found.keys() if expected[key].shape != found[key].shape}
    return sorted(one_sided | reshaped)


def find_weights(name: str, models_dir: str | Path) -> Path:
    """Return the file of a released weight set: a ``.safetensors`` of that name if it is there, else the ``.pt``."""
    released = Path(models_dir) / RELEASED_MODELS[name].file
    converted = released.with_suffix(".safetensors")
    return converted if converted.is_file() else released


def _read(name: str, path: Path) -> dict[str, torch.Tensor]:
    """Read a state dict; the released DenseNets are whole pickled modules."""
    is_pickled = "densenet" in name and path.suffix == ".pt" and path.is_file()
    return read_pickled_network(path) if is_pickled else read_state_dict(path)
