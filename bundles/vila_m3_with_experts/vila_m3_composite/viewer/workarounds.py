"""Faults of MONAI Label 0.8.5 that the app works around; each entry says how to see the fault without it.

Nothing here runs with another version: look whether the fault is gone, then drop the entry or add the version.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

logger = logging.getLogger(__name__)

AFFECTED = ("0.8.5",)


@dataclass(frozen=True)
class Workaround:
    """One fault.

    Args:
        fault: what goes wrong, and how to see it.
        apply: the remedy for the process; None for those that the tasks ask for by name.
    """

    fault: str
    apply: Callable[[], None] | None = None


def is_affected() -> bool:
    """Return whether the installed MONAI Label is one whose faults are known here."""
    try:
        return version("monailabel") in AFFECTED
    except PackageNotFoundError:
        return False


def apply_all() -> list[str]:
    """Apply every remedy for the process, before anything of MONAI Label's tasks is imported; return their names."""
    if not is_affected():
        logger.warning("the faults of this version of MONAI Label are not known; nothing is worked around")
        return []
    applied = []
    for name, entry in WORKAROUNDS.items():
        if entry.apply is not None:
            entry.apply()
            applied.append(name)
    return applied


def _without_torchvision() -> None:
    """Import the one module that wants torchvision's drawing functions with a stand-in, and take that away again."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    package, utils = ModuleType("torchvision"), ModuleType("torchvision.utils")
    for name in ("make_grid", "save_image"):
        setattr(utils, name, _not_installed)
    sys.modules.update({"torchvision": package, "torchvision.utils": utils})
    try:
        importlib.import_module("monailabel.transform.post")
    finally:
        # transformers asks for torchvision too, and must not find a stand-in.
        del sys.modules["torchvision"], sys.modules["torchvision.utils"]


def _not_installed(*arguments: Any, **keywords: Any) -> None:
    raise RuntimeError("torchvision is not installed; MONAI Label's dumps of training pictures need it")


def _dcmqi_on_path() -> None:
    """Let MONAI Label find the ``itkimage2segimage`` of the environment, so that it fetches none."""
    scripts = sysconfig.get_path("scripts")
    parts = os.environ.get("PATH", "").split(os.pathsep)
    if scripts not in parts:
        os.environ["PATH"] = os.pathsep.join([scripts, *parts])


def _quiet_log() -> None:
    """Keep requests, with what users typed and which patient it is about, out of the log."""
    logging.getLogger("monailabel").setLevel(logging.WARNING)


def on_one_device(request: dict[str, Any]) -> dict[str, Any]:
    """Return a request of a background task that runs on a machine without GPUs too."""
    if is_affected() and not torch.cuda.is_available():
        return {**request, "multi_gpu": False, "device": "cpu"}
    return request


def keep_going(infer: Callable[..., Any]) -> Callable[..., Any]:
    """Return an ``infer`` for batches that reports an image that fails in place of ending the batch."""
    if not is_affected():
        return infer

    def infer_one(request: dict[str, Any], datastore: Any = None) -> dict[str, Any]:
        try:
            return infer(request, datastore)
        except Exception as error:
            reason = str(getattr(error, "detail", None) or error)
            # Printed, because these lines are what a client can read of the task.
            print(f"left out {request.get('image')}: {reason}", flush=True)
            return {"error": reason}

    return infer_one


def is_readable(path: str, allowed: Sequence[str]) -> bool:
    """Return whether a request may name a file of the server: uploads, sessions and the datastore's own."""
    if not is_affected():
        return True
    place = Path(path).resolve()
    roots = [tempfile.gettempdir(), *allowed]
    return any(place.is_relative_to(Path(root).resolve()) for root in roots if root)


WORKAROUNDS = {
    "torchvision": Workaround(
        "monailabel/transform/post.py imports torchvision, whose wheel on PyPI is built for CUDA: beside a CPU build "
        "of torch `import torchvision` ends with 'operator torchvision::nms does not exist', and transformers, which "
        "uses it where it is installed, loads no model. See it by installing torchvision from PyPI beside torch for "
        "CPUs and importing monailabel.transform.post.",
        _without_torchvision,
    ),
    "dcmqi": Workaround(
        "For a DICOMweb store MONAI Label downloads dcmqi 1.2.4 from GitHub at the start unless itkimage2segimage is "
        "on PATH; the scripts of an environment whose Python is called by its path are not. See it by starting with "
        "--studies http://... without network.",
        _dcmqi_on_path,
    ),
    "log": Workaround(
        "monailabel/endpoints/infer.py and datastore/dicom.py log whole requests and DICOM tags at level INFO. See it "
        "in logs/app.log after a request with a text parameter.",
        _quiet_log,
    ),
    "multi_gpu": Workaround(
        "Batch inference asks for several GPUs by default; on a machine without one BatchInferTask ends with "
        "'integer modulo by zero'. See it with POST /batch/infer/{model} and no body."
    ),
    "batch": Workaround(
        "With one worker BatchInferTask ends at the first image that fails. See it with a damaged file in the studies "
        "folder."
    ),
    "paths": Workaround(
        "MONAILabelApp.infer opens any file of the server that `image` names. See it with POST "
        "/infer/{model}?image=/etc/hostname, which is read and only then refused as an image."
    ),
}
