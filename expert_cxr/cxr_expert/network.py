"""The ensemble of chest X-ray classifiers: resize, network, sigmoid, operating point, mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import nn

from vila_m3_common.prompts import CXR_FINDINGS

from .transforms import resize_square


class CxrMember(nn.Module):
    """One classifier with a head per finding, in the order of ``CXR_FINDINGS``.

    Which heads are trained and where their operating points lie is saved with the weights, so that a
    weight file tells by itself which of its outputs mean something.

    Args:
        network: maps ``(B, 1, S, S)`` in -1024..1024 to ``(B, 18)`` logits.
        input_size: S, the side in pixels that the network was trained at.
        targets: 18 names; an empty one marks a head that was never trained.
        op_threshs: 18 operating points in 0..1, NaN or None for a head without one. None for a member
            whose sigmoid is already meant to be cut at 0.5.

    Raises:
        ValueError: if a name is not the finding of its head, or a list is not 18 long.
    """

    op_threshs: torch.Tensor
    trained_heads: torch.Tensor

    def __init__(
        self,
        network: nn.Module,
        input_size: int,
        targets: Sequence[str] = CXR_FINDINGS,
        op_threshs: Sequence[float | None] | None = None,
    ) -> None:
        super().__init__()
        _check_targets(targets)
        points = [float("nan") if point is None else point for point in op_threshs or [None] * len(CXR_FINDINGS)]
        if len(points) != len(CXR_FINDINGS):
            raise ValueError(f"{len(points)} operating points were given for {len(CXR_FINDINGS)} findings")
        self.network = network
        self.input_size = input_size
        self.register_buffer("trained_heads", torch.tensor([bool(name) for name in targets]))
        self.register_buffer("op_threshs", torch.tensor(points, dtype=torch.float32))

    @property
    def targets(self) -> tuple[str, ...]:
        """The 18 names, empty where the head was never trained."""
        flags = self.trained_heads.tolist()
        return tuple(name if flag else "" for name, flag in zip(CXR_FINDINGS, flags, strict=True))

    @property
    def voting_heads(self) -> torch.Tensor:
        """``(18,)`` bool: trained, and with an operating point if the member has any.

        A head whose operating point is missing answers 0.5 to every image, which is no opinion.
        """
        has_point = ~self.op_threshs.isnan()
        return self.trained_heads & has_point if has_point.any() else self.trained_heads

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map square radiographs ``(B, 1, H, H)`` in -1024..1024 to ``(B, 18)`` logits."""
        return self.network(resize_square(image, self.input_size))

    def scores(self, image: torch.Tensor) -> torch.Tensor:
        """Map square radiographs to ``(B, 18)`` scores in 0..1, 0.5 being the operating point."""
        probabilities = self(image).sigmoid()
        if self.op_threshs.isnan().all():
            return probabilities
        return normalize_operating_point(probabilities, self.op_threshs)


def _check_targets(targets: Sequence[str]) -> None:
    if len(targets) != len(CXR_FINDINGS):
        raise ValueError(f"{len(targets)} targets were given for {len(CXR_FINDINGS)} findings")
    for name, finding in zip(targets, CXR_FINDINGS, strict=True):
        if name not in ("", finding):
            raise ValueError(f"target {name!r} stands at the head of {finding!r}; give that name or an empty one")


def normalize_operating_point(probabilities: torch.Tensor, op_threshs: torch.Tensor) -> torch.Tensor:
    """Stretch probabilities so that each head's operating point becomes 0.5, as TorchXRayVision does.

    Below the point the scale is linear from 0 to 0.5, from the point on linear from 0.5 to 1. A head
    without an operating point (NaN) becomes 0.5.

    Args:
        probabilities: ``(B, 18)`` in 0..1.
        op_threshs: ``(18,)`` in 0..1 or NaN.
    """
    below = probabilities / (2 * op_threshs)
    above = 1 - (1 - probabilities) / (2 * (1 - op_threshs))
    stretched = torch.where(probabilities < op_threshs, below, above)
    return torch.where(op_threshs.isnan(), 0.5, stretched)


class CxrEnsemble(nn.Module):
    """Mean score per finding over the members that were trained for it.

    The reference averages untrained heads too; each of them answers 0.5 to every image and pulls the
    mean towards "yes". Here they have no vote, unless ``untrained_heads_vote`` asks for the reference's mean.

    Args:
        members: name -> classifier.
        untrained_heads_vote: whether heads without training count, with 0.5, as in the reference.
        class_models: finding -> names of the members that may vote on it; a finding that is not listed is
            open to all. If none of the listed members has a trained head, the others with one vote instead.

    Raises:
        ValueError: if there is no member.
    """

    def __init__(
        self,
        members: Mapping[str, CxrMember],
        untrained_heads_vote: bool = False,
        class_models: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs at least one member")
        self.members = nn.ModuleDict(members)
        self.untrained_heads_vote = untrained_heads_vote
        self.class_models = dict(class_models or {})

    @property
    def classifiers(self) -> dict[str, CxrMember]:
        """The members by name, in the order in which they were given."""
        return {name: cast(CxrMember, member) for name, member in self.members.items()}

    def votes(self) -> torch.Tensor:
        """Return ``(members, 18)`` bool: who takes part in the mean of which finding."""
        eligible = torch.stack([member.voting_heads.cpu() for member in self.classifiers.values()])
        if self.untrained_heads_vote:
            eligible = torch.ones_like(eligible)
        chosen = eligible & torch.tensor([self._is_allowed(name) for name in self.members])
        return torch.where(chosen.any(dim=0), chosen, eligible)

    def _is_allowed(self, member: str) -> list[bool]:
        return [member in self.class_models.get(finding, (member,)) for finding in CXR_FINDINGS]

    @property
    def untrained_findings(self) -> tuple[str, ...]:
        """Findings for which no member has a vote; they are reported as 0.0."""
        has_vote = self.votes().any(dim=0).tolist()
        return tuple(finding for finding, vote in zip(CXR_FINDINGS, has_vote, strict=True) if not vote)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Map square radiographs ``(B, 1, H, H)`` in -1024..1024 to ``(B, 18)`` mean scores in 0..1."""
        # Members of one size share the picture; each would resize it alike.
        pictures = {size: resize_square(image, size) for size in {m.input_size for m in self.classifiers.values()}}
        scores = torch.stack([member.scores(pictures[member.input_size]) for member in self.classifiers.values()])
        return average_votes(scores, self.votes().to(scores.device))


def average_votes(scores: torch.Tensor, votes: torch.Tensor) -> torch.Tensor:
    """Average the members' scores over those that vote.

    Args:
        scores: ``(members, B, 18)``.
        votes: ``(members, 18)`` bool.

    Returns:
        ``(B, 18)``; 0.0 for a finding on which nobody votes.
    """
    weights = votes[:, None].to(scores.dtype)
    return (scores * weights).sum(dim=0) / weights.sum(dim=0).clamp(min=1)
