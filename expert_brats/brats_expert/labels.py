"""BraTS labels: what the ids mean in each release of the data, and the three regions that are evaluated."""

from __future__ import annotations

import torch

from vila_m3_common.errors import UserError, near_match_hint

# What this bundle writes, and what VILA-M3 was trained to read.
LABEL_NAMES = {1: "necrotic and non-enhancing tumor core", 2: "peritumoral edema", 4: "enhancing tumor"}

# Regions in the order of the network's output channels.
REGIONS = ("tumor core", "whole tumor", "enhancing tumor")

# The evaluation regions of the BraTS challenge that consist of several labels (Menze 2015, Bakas 2017).
REGION_LABELS = {"tumor core": (1, 4), "whole tumor": (1, 2, 4)}

# Release -> the ids of each of REGIONS; None where the release does not draw the region.
CONVENTIONS: dict[str, tuple[tuple[int, ...] | None, ...]] = {
    # 2017 to 2021: 1 necrotic and non-enhancing core, 2 oedema, 4 enhancing tumour
    "brats2018": ((1, 4), (1, 2, 4), (4,)),
    # from 2022 on: enhancing tumour is 3
    "brats2023": ((1, 3), (1, 2, 3), (3,)),
    # 2013: 1 necrosis, 2 oedema, 3 non-enhancing core, 4 enhancing tumour
    "brats2013": ((1, 3, 4), (1, 2, 3, 4), (4,)),
    # 2012: 1 oedema, 2 tumour core; enhancing tumour is not told from the rest of the core
    "brats2012": ((2,), (1, 2), None),
    # Medical Segmentation Decathlon, task 1: 1 oedema, 2 non-enhancing core, 3 enhancing tumour
    "decathlon": ((2, 3), (1, 2, 3), (3,)),
}

# Ids stored as floating point may be off by rounding, not more.
_ROUNDING = 1e-3


def labels_to_regions(labels: torch.Tensor, convention: str = "brats2018") -> torch.Tensor:
    """Turn a label map into the three nested regions.

    Args:
        labels: ``(1, X, Y, Z)`` ids, integer or floating point.
        convention: release that the ids come from, a key of ``CONVENTIONS``.

    Returns:
        ``(3, X, Y, Z)`` float32 of 0 and 1, tumour core, whole tumour, enhancing tumour; a region that the
        release does not draw is not a number everywhere.

    Raises:
        UserError: if the convention is unknown, or the map holds other ids than its own.
    """
    regions = region_ids(convention)
    ids = _whole_ids(labels[0])
    known = {0, *(label for region in regions for label in region or ())}
    unknown = sorted({int(label) for label in ids.flatten().bincount().nonzero()} - known)
    if unknown:
        raise UserError(
            f"the label map holds the ids {unknown}, which {convention} does not use ({sorted(known)}); "
            f"give the label_convention that it follows: {', '.join(CONVENTIONS)}"
        )
    return torch.stack([_region(ids, region) for region in regions])


def _whole_ids(labels: torch.Tensor) -> torch.Tensor:
    """Return the ids as int64; fractions come from interpolation and would be read as wrong ids."""
    rounded = labels.round() if labels.is_floating_point() else labels
    # Written so that NaN fails too.
    if not float((labels - rounded).abs().max()) <= _ROUNDING or float(rounded.min()) < 0:
        raise UserError(
            "the label map holds fractions, negative numbers or NaN, which are no ids; "
            "if it was resampled, use nearest neighbour"
        )
    return rounded.to(torch.int64)


def _region(ids: torch.Tensor, labels: tuple[int, ...] | None) -> torch.Tensor:
    if labels is None:
        return torch.full(ids.shape, torch.nan)
    inside = torch.zeros(ids.shape)
    for label in labels:
        inside[ids == label] = 1
    return inside


def region_ids(convention: str) -> tuple[tuple[int, ...] | None, ...]:
    """Return the ids of each of ``REGIONS`` in a release of the data.

    Raises:
        UserError: if the convention is unknown.
    """
    if convention not in CONVENTIONS:
        hint = near_match_hint(convention, list(CONVENTIONS))
        raise UserError(f"unknown label_convention {convention!r}; {hint}allowed: {', '.join(CONVENTIONS)}")
    return CONVENTIONS[convention]


def regions_to_labels(regions: torch.Tensor) -> torch.Tensor:
    """Turn the three nested regions into one label map.

    Args:
        regions: ``(3, X, Y, Z)`` tumour core, whole tumour, enhancing tumour; non-zero is inside.

    Returns:
        ``(1, X, Y, Z)`` uint8: 1 necrotic and non-enhancing core, 2 oedema, 4 enhancing tumour, 0 elsewhere.
        Where the regions are not nested, enhancing tumour wins over core, and core over whole tumour.
    """
    core, whole, enhancing = regions > 0
    labels = torch.zeros_like(whole, dtype=torch.uint8)
    labels[whole] = 2
    labels[core] = 1
    labels[enhancing] = 4
    return labels[None]
