"""Files in the layout of TorchXRayVision's released DenseNets: whole modules pickled by their class names."""

import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

PACKAGE_CLASSES = {
    "DenseNet": nn.Module,
    "_DenseLayer": nn.Sequential,
    "_DenseBlock": nn.Sequential,
    "_Transition": nn.Sequential,
}


@contextmanager
def torchxrayvision_models() -> Iterator[types.ModuleType]:
    """A module of that name with empty classes, known to pickle for as long as the block lasts."""
    names = ("torchxrayvision", "torchxrayvision.models")
    modules = {name: types.ModuleType(name) for name in names}
    models = modules[names[1]]
    modules[names[0]].models = models
    for name, base in PACKAGE_CLASSES.items():
        setattr(models, name, type(name, (base,), {"__module__": models.__name__}))
    kept = {name: sys.modules.get(name) for name in names}
    sys.modules.update(modules)
    try:
        yield models
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


def build_network(state: Mapping[str, torch.Tensor], models: types.ModuleType) -> nn.Module:
    """Build modules of the package's classes that hold a state dict, with the parts that have no tensors too."""
    network = models.DenseNet()
    for key, value in state.items():
        *path, name = key.split(".")
        module = network
        for depth, part in enumerate(path):
            if part not in module._modules:
                module.add_module(part, _new_module(part, state, ".".join(path[: depth + 1]), models))
            module = module._modules[part]
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(value.clone())
        else:
            module._buffers[name] = value.clone()
    network.features.add_module("pool0", nn.MaxPool2d(3, 2, 1))
    network.features.denseblock1.denselayer1.add_module("relu1", nn.ReLU(inplace=True))
    network.op_threshs = torch.full((18,), 0.5)
    return network.eval()


def _new_module(part: str, state: Mapping[str, torch.Tensor], path: str, models: types.ModuleType) -> nn.Module:
    if f"{path}.running_mean" in state:
        return nn.BatchNorm2d(len(state[f"{path}.running_mean"]))
    if f"{path}.weight" in state:
        shape = state[f"{path}.weight"].shape
        if len(shape) == 2:
            return nn.Linear(shape[1], shape[0])
        return nn.Conv2d(shape[1], shape[0], shape[2], bias=False)
    kinds = {"denselayer": models._DenseLayer, "denseblock": models._DenseBlock, "transition": models._Transition}
    return kinds.get(part.rstrip("0123456789"), nn.Sequential)()


def save_released(state: Mapping[str, torch.Tensor], path: Path, is_legacy: bool = True) -> Path:
    """Write a state dict as the released files hold it; PyTorch before 1.6 wrote the legacy layout."""
    with torchxrayvision_models() as models:
        torch.save(build_network(state, models), path, _use_new_zipfile_serialization=not is_legacy)
    return path
