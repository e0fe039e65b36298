"""What the training of a small member needs beyond MONAI's engines: loss, resuming, export."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.handlers import CheckpointLoader, CheckpointSaver
from torch import nn
from torch.nn import functional

from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.weights import load_weights, save_weights

from .network import CxrEnsemble, CxrMember

logger = logging.getLogger(__name__)


class KnownLabelLoss(nn.Module):
    """Binary cross-entropy over the labels that are known; NaN labels have no part in it."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean over the known entries of ``(B, 18)`` logits and labels; 0 when none is known."""
        known = ~labels.isnan()
        losses = functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
        return (losses * known).sum() / known.sum().clamp(min=1)


class ResumableCheckpoint:
    """Handler that saves the training after every epoch and continues from there after a stop.

    Args:
        ckpt_dir: folder for ``latest_checkpoint_epoch=<n>.pt``, of which the newest is kept.
        save_dict: name -> object with a state dict; the trainer's own state is added.
    """

    def __init__(self, ckpt_dir: str, save_dict: Mapping[str, Any]) -> None:
        self.ckpt_dir = Path(ckpt_dir)
        self.save_dict = dict(save_dict)

    def attach(self, engine: Engine) -> None:
        """Register at the start of the training and, in its first process, at the end of every epoch."""
        self.save_dict["trainer"] = engine
        engine.add_event_handler(Events.STARTED, self)
        if idist.get_rank() == 0:
            saver = CheckpointSaver(
                str(self.ckpt_dir), self.save_dict, file_prefix="latest", save_interval=1, n_saved=1
            )
            saver.attach(engine)

    def __call__(self, engine: Engine) -> None:
        """Restore the newest checkpoint, if there is one."""
        newest = find_checkpoint(self.ckpt_dir, "latest")
        if newest is None:
            return
        logger.info("resuming from %s; remove the folder to start anew", newest)
        CheckpointLoader(load_path=str(newest), load_dict=self.save_dict)(engine)


def find_checkpoint(ckpt_dir: str | Path, prefix: str) -> Path | None:
    """Return the ``<prefix>_..=<number>.pt`` of ``CheckpointSaver`` with the largest number, None if there is none."""
    pattern = re.compile(rf"{re.escape(prefix)}_\w+=(-?[\d.]+)\.pt")
    numbered = [(match, path) for path in Path(ckpt_dir).glob("*.pt") if (match := pattern.fullmatch(path.name))]
    return max(numbered, key=lambda pair: float(pair[0][1]))[1] if numbered else None


@exits_with_message
def run_training(
    trainer: Any, member: CxrMember, ensemble: CxrEnsemble, ckpt_dir: str, checkpoint_out: str, exports: str = "best"
) -> None:
    """Train, then write weights as safetensors; of several processes the first writes.

    Args:
        trainer: MONAI trainer of ``member``.
        member: the classifier that is trained, a part of ``ensemble``.
        ensemble: what inference loads.
        ckpt_dir: holds ``best_network_key_metric=<score>.pt``.
        checkpoint_out: file to write.
        exports: ``best`` for the weights of the best validation, ``last`` for those after the last epoch. The last
            ones leave the validation images out of every choice, so that figures on them are held-out figures.
    """
    if exports not in ("best", "last"):
        raise UserError(f"unknown exports {exports!r}; valid: best, last")
    trainer.run()
    if idist.get_rank() != 0:
        return
    if exports == "best":
        _load_best(member, ckpt_dir)
    print(f"{exports} weights written to {save_weights(ensemble, checkpoint_out)}")


def _load_best(member: CxrMember, ckpt_dir: str) -> None:
    best = find_checkpoint(ckpt_dir, "best")
    if best is None:
        raise UserError(
            f"no validated checkpoint in {ckpt_dir}: the validation had no finding with both a yes and a no; "
            "give more validation images"
        )
    load_weights(member, best)
    print(f"best checkpoint: {best.name}")
