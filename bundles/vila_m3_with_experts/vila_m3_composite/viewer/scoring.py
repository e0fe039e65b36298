"""Scores of images and labels: how sure an expert is, and how well what it found agrees with what users saved."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from vila_m3_common.errors import UserError
from vila_m3_common.study import Study
from vila_m3_common.volumes import load_volume

from ..expert_studies import segment
from .models import ViewerModels
from .running import open_for

# Noise of a variant, as a part of the range between the 1st and the 99th percentile inside the foreground.
NOISE = 0.03
# Blur of a variant in voxels.
BLUR = 0.7


def uncertainty(models: ViewerModels, name: str, image: str | Path, variants: int = 2, seed: int = 0) -> float:
    """Return how much an expert's label map changes when the image changes a little, 0 (not at all) to 1.

    The image is segmented as it is and with noise, and with noise and blur in turn; the score is one minus the mean
    Dice of all pairs of label maps, each the mean over the structures that either of the two holds (test-time
    augmentation, Wang et al. 2019, https://doi.org/10.1016/j.neucom.2019.01.103). It needs nothing of the network but
    its label maps.

    Args:
        models: of the app.
        name: of a segmenting expert.
        image: file or DICOM folder.
        variants: changed copies; each is one more run.
        seed: of the noise.

    Raises:
        UserError: if the expert cannot read the image.
    """
    if variants < 1:
        raise UserError(f"variants is {variants}; give 1 or more")
    with models.lock, tempfile.TemporaryDirectory() as folder:
        expert, work = models.expert(name), Path(folder)
        study = open_for(expert.card, image)
        copies = [write_variant(study, work / f"variant_{number}", number, seed) for number in range(variants)]
        runs = [[str(path) for path in study.paths], *copies]
        label_maps = [segment(expert, paths, work, "").labels for paths in runs]
    return 1.0 - float(np.mean([agreement(first, second) for first, second in combinations(label_maps, 2)]))


def write_variant(study: Study, folder: Path, number: int, seed: int = 0) -> list[str]:
    """Write a changed copy of a study: noise, every second time blur too; the background stays as it is."""
    folder.mkdir()
    rng = np.random.default_rng([seed, number])
    paths = []
    for place, path in enumerate(study.paths):
        volume = load_volume(path)
        channels = volume.array if volume.array.ndim == 4 else volume.array[..., None]
        changed = np.stack([_change(channels[..., index], rng, number % 2 == 1) for index in range(channels.shape[3])])
        array = np.moveaxis(changed, 0, 3) if volume.array.ndim == 4 else changed[0]
        target = folder / f"{place}_{path.name.split('.')[0]}.nii.gz"
        nib.save(nib.Nifti1Image(array.astype(np.float32), volume.affine), target)
        paths.append(str(target))
    return paths


def _change(channel: np.ndarray, rng: np.random.Generator, is_blurred: bool) -> np.ndarray:
    foreground = channel != channel.flat[0]
    low, high = np.percentile(channel[foreground] if foreground.any() else channel, (1, 99))
    noisy = channel + rng.normal(0, NOISE * (high - low), channel.shape)
    if is_blurred:
        noisy = ndimage.gaussian_filter(noisy, BLUR)
    return np.where(foreground, noisy, channel)


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Return the mean Dice over the labels that either of two label maps holds; 1 where both are empty."""
    scores = dice_by_label(first, second)
    return float(np.mean(list(scores.values()))) if scores else 1.0


def dice_by_label(first: np.ndarray, second: np.ndarray) -> dict[int, float]:
    """Return label -> Dice for the labels that either of two label maps ``(X, Y, Z)`` holds."""
    scores = {}
    for label in np.union1d(np.unique(first), np.unique(second)):
        if label:
            scores[int(label)] = dice(first == label, second == label)
    return scores


def dice(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Dice of two masks that are not both empty."""
    return 2 * int((first & second).sum()) / (int(first.sum()) + int(second.sum()))


def dice_by_name(
    final: np.ndarray, final_names: Mapping[int, str], original: np.ndarray, original_names: Mapping[int, str]
) -> dict[str, float]:
    """Return structure -> Dice between what a user saved and what an expert found.

    Structures are matched by name, so that a viewer's own numbering does not matter; where a label map tells no names,
    labels are matched by their numbers. What the user left out of his label is not compared.

    Args:
        final: ``(X, Y, Z)`` of the user.
        final_names: label -> structure of it; may be empty.
        original: of the expert, on the same grid.
        original_names: label -> structure of it; may be empty.
    """
    numbers = {name.lower(): label for label, name in original_names.items()}
    scores = {}
    for label in (int(value) for value in np.unique(final) if value):
        name = final_names.get(label) or original_names.get(label) or f"label {label}"
        other = numbers.get(name.lower(), -1) if final_names and original_names else label
        scores[name] = dice(final == label, original == other)
    return scores


def most_uncertain(
    images: Mapping[str, Mapping[str, Any]], experts: Sequence[str], served: Mapping[str, int]
) -> tuple[str, float | None]:
    """Choose the image to label next: the one that an expert is least sure of among those served least often.

    Args:
        images: id -> info of the datastore, with ``uncertainty`` (expert -> score and more) where it is known.
        experts: whose scores count; an image has the largest of theirs.
        served: id -> when it was last given out, seconds since 1970; 0 for never.

    Returns:
        Its id and score; without any scores the first one that was never served, and None.
    """
    scores = {image: _largest(info, experts) for image, info in images.items()}
    known = {image: score for image, score in scores.items() if score is not None}
    if not known:
        return min(sorted(images), key=lambda image: served.get(image, 0)), None
    chosen = min(sorted(known), key=lambda image: (served.get(image, 0) > 0, -known[image], served.get(image, 0)))
    if served.get(chosen, 0) > 0:  # all have been given out: begin anew with the one that waits longest
        chosen = min(sorted(known), key=lambda image: (served.get(image, 0), -known[image]))
    return chosen, known[chosen]


def _largest(info: Mapping[str, Any], experts: Sequence[str]) -> float | None:
    rows = info.get("uncertainty") or {}
    scores = [rows[name]["score"] for name in experts if rows.get(name, {}).get("score") is not None]
    return max(scores, default=None)
