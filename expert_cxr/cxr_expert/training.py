"""What the training of a small member needs beyond the collection's: a loss for unknown labels, the export."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.training import BestWeights, is_main_process
from vila_m3_common.weights import load_weights, save_weights

from .network import CxrEnsemble, CxrMember


class KnownLabelLoss(nn.Module):
    """Binary cross-entropy over the labels that are known; NaN labels have no part in it."""

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the mean over the known entries of ``(B, 18)`` logits and labels; 0 when none is known."""
        known = ~labels.isnan()
        losses = functional.binary_cross_entropy_with_logits(logits, labels.nan_to_num(), reduction="none")
        return (losses * known).sum() / known.sum().clamp(min=1)


@exits_with_message
def run_training(
    trainer: Any,
    member: CxrMember,
    ensemble: CxrEnsemble,
    best_weights: BestWeights,
    checkpoint_out: str,
    exports: str = "best",
) -> None:
    """Train, then write weights as safetensors; of several processes the first writes.

    Args:
        trainer: MONAI trainer of ``member``.
        member: the classifier that is trained, a part of ``ensemble``.
        ensemble: what inference loads.
        best_weights: keeps the weights of the best validation.
        checkpoint_out: file to write.
        exports: ``best`` for the weights of the best validation, ``last`` for those after the last epoch. The last
            ones leave the validation images out of every choice, so that figures on them are held-out figures.

    Raises:
        UserError: for another ``exports``, or when no validation could be scored.
    """
    if exports not in ("best", "last"):
        raise UserError(f"unknown exports {exports!r}; valid: best, last")
    trainer.run()
    if not is_main_process():
        return
    if exports == "best":
        _load_best(member, best_weights)
    print(f"{exports} weights written to {save_weights(ensemble, checkpoint_out)}")


def _load_best(member: CxrMember, best_weights: BestWeights) -> None:
    if best_weights.best == float("-inf"):
        raise UserError(
            "no validation had a finding with both a yes and a no, so none of the weights is the best; "
            "give more validation images"
        )
    load_weights(member, best_weights.path)
    print(f"best mean AUROC of a validation: {best_weights.best:.4f}")
