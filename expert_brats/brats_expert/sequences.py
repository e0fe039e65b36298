"""The four sequences of one patient: read, brought to one grid, and their order checked against what they show."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform
from scipy.stats import rankdata, skew

from vila_m3_common.errors import UserError
from vila_m3_common.study import SEQUENCES, check_sequence_order, match_sequences
from vila_m3_common.volumes import Volume, check_file, load_volume

# Grids are the same when no corner lies further apart than this part of a voxel; headers round.
GRID_TOLERANCE = 0.1
# Below this many brain voxels the intensities tell no order.
MIN_BRAIN_VOXELS = 2000
# Differences of the score of an order, see `judge_order`. On two patients every wrong order scored 0.44 or more
# below the true one; on 40 phantoms, where contrast shows in tumours only, the true order scored at most 0.11
# below another one.
CLEARLY_BETTER = 0.25
CONFIRMED_BY = 0.1
# Less background than this part of the voxels is no skull-stripped brain.
MIN_BACKGROUND = 0.05
# Voxels that the order is judged by.
_SAMPLE_COUNT = 50_000


@dataclass(frozen=True)
class BrainScan:
    """Four sequences on the grid of the T1c.

    Args:
        channels: T1c, T1, T2, FLAIR, each ``(X, Y, Z)`` float32.
        affine: ``(4, 4)``, voxel index to RAS position in mm.
        path: file or folder of the T1c, or the 4-D file.
        order_source: what the order comes from: ``names``, ``sequence_order`` or ``position``.
    """

    channels: tuple[np.ndarray, ...]
    affine: np.ndarray
    path: Path
    order_source: str

    @functools.cached_property
    def seen_order(self) -> tuple[tuple[str, ...], float]:
        """What :func:`judge_order` tells of the channels."""
        return judge_order(self.channels)

    def volume(self, sequence: str) -> Volume:
        """Return one sequence (``t1c``, ``t1``, ``t2`` or ``flair``) as a volume."""
        return Volume(self.channels[SEQUENCES.index(sequence)], self.affine, self.path)


def load_scan(paths: Sequence[str | Path], sequence_order: Sequence[str] | None = None) -> BrainScan:
    """Read the four sequences of a patient.

    Args:
        paths: four files or DICOM folders, or one 4-D file with the sequences along its last axis. Names that
            tell all four sequences decide over the order of the list.
        sequence_order: the sequences in the order of the channels (or of files whose names do not tell);
            None means T1c, T1, T2, FLAIR.

    Raises:
        UserError: if the sequences are not four, or do not lie on one grid.
    """
    order = check_sequence_order(sequence_order)
    source = "position" if sequence_order is None else "sequence_order"
    files = [Path(path) for path in paths]
    for file in files:
        check_file(file)
    stamps = tuple((file.absolute(), file.stat().st_mtime_ns) for file in files)
    return _load_scan(stamps, order, source)


@functools.lru_cache(maxsize=2)
def _load_scan(stamps: tuple[tuple[Path, int], ...], order: tuple[str, ...], source: str) -> BrainScan:
    """Read what is given by path and time of its last change, which is part of the cache's key."""
    paths = [path for path, _ in stamps]
    if len(paths) == 1:
        return _read_four_d(paths[0], order, source)
    if len(paths) != len(SEQUENCES):
        raise UserError(
            f"BRATS was given {len(paths)} images; give four files (T1c, T1, T2, FLAIR) or one 4-D file of them"
        )
    files = match_sequences(paths)
    if len(files) == len(SEQUENCES):
        source = "names"
    else:
        files = _by_position(paths, order, files)
    volumes = [load_volume(files[name]) for name in SEQUENCES]
    first = volumes[0]
    return BrainScan(tuple(align(volume, first) for volume in volumes), first.affine, first.path, source)


def _read_four_d(path: Path, order: tuple[str, ...], source: str) -> BrainScan:
    volume = load_volume(path)
    shape = volume.array.shape
    if len(shape) != 4 or shape[3] != len(SEQUENCES):
        raise UserError(
            f"{volume.path.name} has shape {shape}; BRATS needs (x, y, z, 4) with T1c, T1, T2, FLAIR, or four files"
        )
    channels = tuple(volume.array[..., order.index(name)] for name in SEQUENCES)
    return BrainScan(channels, volume.affine, volume.path, source)


def _by_position(paths: Sequence[Path], order: tuple[str, ...], named: Mapping[str, Path]) -> dict[str, Path]:
    """Assign files by their place in the list; no name may speak against it."""
    by_position = dict(zip(order, paths, strict=True))
    for name, path in named.items():
        if by_position[name] != path:
            raise UserError(
                f"{path.name} looks like {name}, but stands where {', '.join(order)} were expected in this order; "
                "name all four files by their sequences, or put them in that order"
            )
    return by_position


def align(volume: Volume, target: Volume) -> np.ndarray:
    """Return a volume's voxels in the axis order and direction of another one on the same grid.

    Args:
        volume: ``(X, Y, Z)``; may be stored with other axes, such as LPS where the target is RAS.
        target: gives grid and storage.

    Raises:
        UserError: if the voxels of the two do not lie at the same positions.
    """
    if volume.array.ndim != 3:
        raise UserError(f"{volume.path.name} has shape {volume.array.shape}; each of the four sequences is 3-D")
    change = ornt_transform(io_orientation(volume.affine), io_orientation(target.affine))
    array = apply_orientation(volume.array, change)
    affine = volume.affine @ inv_ornt_aff(change, volume.array.shape)
    if array.shape != target.array.shape[:3] or _corner_distance(array.shape, affine, target.affine) > GRID_TOLERANCE:
        raise UserError(
            f"{_describe(volume)} and {_describe(target)} do not lie on the same grid; "
            "register and resample them to the T1c"
        )
    return array


def _corner_distance(shape: tuple[int, ...], affine: np.ndarray, other: np.ndarray) -> float:
    """Return the largest distance between the corners of two grids, in voxels."""
    corners = np.array([(*corner, 1) for corner in itertools.product(*((0, size - 1) for size in shape))])
    distances = np.linalg.norm((corners @ (affine - other).T)[:, :3], axis=1)
    return float(distances.max() / np.linalg.norm(other[:3, :3], axis=0).min())


def _describe(volume: Volume) -> str:
    spacing = " x ".join(f"{step:.3g}" for step in volume.spacing)
    origin = ", ".join(f"{value:.4g}" for value in volume.affine[:3, 3])
    return f"{volume.path.name} {volume.array.shape} of {spacing} mm from ({origin})"


def check_scan(scan: BrainScan) -> list[str]:
    """Refuse a scan that the network would misread; return what could not be made sure of, for the user.

    Raises:
        UserError: if a sequence is constant, two hold the same voxels, the background is not zero, or the
            intensities clearly show another order than an order that no file name tells.
    """
    for name, channel in zip(SEQUENCES, scan.channels, strict=True):
        _check_background(name, channel, scan.path)
    for (first, one), (second, other) in itertools.combinations(zip(SEQUENCES, scan.channels, strict=True), 2):
        if np.array_equal(one, other):
            raise UserError(f"{first} and {second} of {scan.path.name} hold the same voxels; give each sequence once")
    seen, lead = scan.seen_order
    if seen != SEQUENCES and lead > CLEARLY_BETTER and scan.order_source == "position":
        raise UserError(
            f"the sequences of {scan.path.name} look like {', '.join(seen)}, not like {', '.join(SEQUENCES)}; "
            f'if so add --sequence_order "{list(seen)}", else --sequence_order "{list(SEQUENCES)}"'
        )
    return scan_notes(scan)


def _check_background(name: str, channel: np.ndarray, path: Path) -> None:
    low, high = float(channel.min()), float(channel.max())
    if low == high:
        raise UserError(f"{name} of {path.name} is constant ({low:g}); BRATS needs all four sequences")
    corner = float(channel[0, 0, 0])
    fraction = float((channel == corner).mean())
    if corner != 0 and fraction > 0.2:
        raise UserError(
            f"the background of {name} of {path.name} is {corner:g} ({fraction:.0%} of the voxels), not 0; "
            "BRATS reads skull-stripped scans: set every voxel outside the brain to 0"
        )


def scan_notes(scan: BrainScan) -> list[str]:
    """Say what about a scan could not be made sure of."""
    notes = []
    if min(float((channel == 0).mean()) for channel in scan.channels) < MIN_BACKGROUND:
        notes.append(
            "The scan has no empty background; BRATS was trained on skull-stripped scans and may mark skull or skin."
        )
    seen, lead = scan.seen_order
    if seen != SEQUENCES and lead > CLEARLY_BETTER:
        said = {"names": "The file names say", "sequence_order": "sequence_order says"}.get(
            scan.order_source, "Taken was"
        )
        notes.append(
            f"{said} {', '.join(SEQUENCES)}, but the intensities look like {', '.join(seen)}; check the files."
        )
    elif scan.order_source == "position" and (seen != SEQUENCES or lead < CONFIRMED_BY):
        notes.append(
            f"The sequences were taken to be {', '.join(SEQUENCES)}; the intensities neither confirm nor deny it."
        )
    return notes


def judge_order(channels: Sequence[np.ndarray]) -> tuple[tuple[str, ...], float]:
    """Tell from the intensities which sequences a scan most likely holds.

    Args:
        channels: four arrays ``(X, Y, Z)`` on one grid, zero outside the brain.

    Returns:
        The most likely sequence of each channel, and by how much its score is above that of the standard order,
        or, where it is the standard order, above that of the second best. With too few brain voxels to tell:
        the standard order and 0.
    """
    brain = np.logical_and.reduce([channel != 0 for channel in channels])
    count = int(brain.sum())
    if count < MIN_BRAIN_VOXELS:
        return SEQUENCES, 0.0
    stride = max(1, count // _SAMPLE_COUNT)
    values = np.stack([channel[brain][::stride] for channel in channels]).astype(np.float64)
    evidence = _Evidence.of(values)
    scores = {order: evidence.score(order) for order in itertools.permutations(range(4))}
    best, second = sorted(scores, key=lambda order: -scores[order])[:2]
    standard = tuple(range(4))
    other = second if best == standard else standard
    seen = tuple(SEQUENCES[best.index(channel)] for channel in range(4))
    return seen, scores[best] - scores[other]


@dataclass(frozen=True)
class _Evidence:
    """What the intensities of four channels tell about each other; ranks run from 0 to 1 inside the brain.

    Args:
        correlation: ``(4, 4)``, rank correlations.
        where_dark: ``(4, 4)``, mean rank of channel j where channel i is darkest (lowest 5 %).
        where_bright: ``(4, 4)``, the same where channel i is brightest (highest 5 %).
        asymmetry: ``(4, 4)``, skewness of the difference of channels i and j, each of unit variance.
    """

    correlation: np.ndarray
    where_dark: np.ndarray
    where_bright: np.ndarray
    asymmetry: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> _Evidence:
        """Compare the channels of ``(4, N)`` brain voxels."""
        ranks = rankdata(values, axis=1) / values.shape[1]
        normal = (values - values.mean(axis=1, keepdims=True)) / np.maximum(values.std(axis=1, keepdims=True), 1e-6)
        return cls(
            np.corrcoef(ranks),
            np.array([ranks[:, row < 0.05].mean(axis=1) for row in ranks]),
            np.array([ranks[:, row > 0.95].mean(axis=1) for row in ranks]),
            skew(normal[:, None] - normal[None], axis=2),
        )

    def score(self, order: Sequence[int]) -> float:
        """Score the claim that T1c, T1, T2 and FLAIR are the channels ``order``."""
        t1c, t1, t2, flair = order
        dark = self.where_dark[[t1c, t1]].mean(axis=0)
        alike = self.correlation[t1c, t1] + self.correlation[t2, flair]
        # What is darkest with and without contrast is the same: fluid.
        shared = 0.5 - (self.where_dark[t1c, t1] + self.where_dark[t1, t1c]) / 2
        # Fluid, dark on T1, is bright on T2 and suppressed on FLAIR.
        fluid = dark[t2] - dark[flair]
        # What is brightest on T2, fluid and oedema, is dark on T1 with and without contrast.
        water = 0.5 - (self.where_bright[t2, t1] + self.where_bright[t2, t1c]) / 2
        # Contrast makes a small part of the brain, vessels and tumour, much brighter than without it.
        contrast = float(np.clip(self.asymmetry[t1c, t1], -1, 1)) / 4
        return float(alike + shared + fluid + water + contrast)
