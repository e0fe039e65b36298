"""Synthetic CT, brain MRI and chest X-ray with ground truth, for the demo, the nano trainings and tests.

The phantoms are drawn from ellipsoids with the sizes, positions and intensities of textbook anatomy,
varied by a seed. They look like the modality, not like a patient: a model that does well on them
has learnt the phantoms. Volumes are RAS with a diagonal affine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from scipy import ndimage

CT_TUMORS = {"hepatic tumor": 26, "pancreatic tumor": 24, "lung tumor": 23, "bone lesion": 128}
CXR_PHANTOM_FINDINGS = (
    "Cardiomegaly",
    "Effusion",
    "Pneumothorax",
    "Consolidation",
    "Nodule",
    "Mass",
    "Edema",
    "Enlarged Cardiomediastinum",
)


@dataclass(frozen=True)
class VolumePhantom:
    """A synthetic volume.

    Args:
        image: ``(X, Y, Z)`` HU for CT; ``(4, X, Y, Z)`` T1c, T1, T2, FLAIR for MRI; float32.
        labels: ``(X, Y, Z)`` uint8: VISTA3D ids, or BraTS 1 (necrotic core), 2 (oedema), 4 (enhancing).
        affine: ``(4, 4)``, voxel index to RAS position in mm.
        tumor_counts: tumour name -> number of separate tumours.
    """

    image: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    tumor_counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RadiographPhantom:
    """A synthetic frontal chest X-ray: ``image`` (H, W) uint8 and the findings drawn into it."""

    image: np.ndarray
    findings: tuple[str, ...]


class _Canvas:
    """A label map and an intensity map that ellipsoids are drawn into; coordinates in mm from the centre."""

    def __init__(self, shape: tuple[int, int, int], spacing: float, rng: np.random.Generator) -> None:
        axes = [(np.arange(size) - (size - 1) / 2) * spacing for size in shape]
        self.x, self.y, self.z = np.meshgrid(*axes, indexing="ij", sparse=True)
        self.values = np.full(shape, -1000.0, dtype=np.float32)
        self.labels = np.zeros(shape, dtype=np.uint8)
        self.rng = rng

    def ellipsoid(self, centre: Sequence[float], radii: Sequence[float], jitter: float = 0.06) -> np.ndarray:
        """Return the mask of an ellipsoid whose centre and radii vary by ``jitter`` of the radii."""
        rx, ry, rz = scaled = np.asarray(radii, float) * (1 + self.rng.uniform(-jitter, jitter, 3))
        cx, cy, cz = np.asarray(centre, float) + scaled * self.rng.uniform(-jitter, jitter, 3)
        return ((self.x - cx) / rx) ** 2 + ((self.y - cy) / ry) ** 2 + ((self.z - cz) / rz) ** 2 <= 1

    def fill(self, mask: np.ndarray, value: float, label: int | None = None, spread: float = 10.0) -> None:
        """Set intensity and, when given, label inside a mask."""
        self.values[mask] = value + self.rng.uniform(-spread, spread)
        if label is not None:
            self.labels[mask] = label

    def place_inside(self, organ: np.ndarray, radius: float, margin: float = 0.6) -> np.ndarray | None:
        """Return a ball of about ``radius`` mm whose centre lies in the organ's inner part."""
        depth = ndimage.distance_transform_edt(organ)
        candidates = np.argwhere(depth >= margin * depth.max())
        if not len(candidates):
            return None
        i, j, k = candidates[self.rng.integers(len(candidates))]
        centre = (self.x[i, 0, 0], self.y[0, j, 0], self.z[0, 0, k])
        return self.ellipsoid(centre, (radius,) * 3, jitter=0.15)


def ct_phantom(
    seed: int,
    tumors: Sequence[str] | None = None,
    shape: tuple[int, int, int] = (112, 96, 88),
    spacing: float = 3.0,
) -> VolumePhantom:
    """Draw a CT of the trunk from the lower lungs to the upper pelvis.

    Args:
        seed: everything random follows from it.
        tumors: which of ``CT_TUMORS`` to draw; None draws each with probability 0.4.
        shape: voxels along x (to the right), y (anterior), z (superior).
        spacing: voxel size in mm.
    """
    rng = np.random.default_rng(seed)
    if tumors is None:
        tumors = [name for name in CT_TUMORS if rng.random() < 0.4]
    canvas = _Canvas(shape, spacing, rng)
    _draw_trunk(canvas)
    organs = _draw_organs(canvas)
    counts = {name: _draw_tumors(canvas, name, organs[name]) for name in tumors}
    blurred = ndimage.gaussian_filter(canvas.values, 1.2 / spacing * 1.5)
    noise = ndimage.gaussian_filter(rng.normal(0, 1, shape), 0.6) * 22
    image = np.clip(blurred + noise, -1024, 3000).round().astype(np.float32)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    return VolumePhantom(image, canvas.labels, affine, {name: count for name, count in counts.items() if count})


def _draw_trunk(canvas: _Canvas) -> None:
    body = ((canvas.x / 158) ** 2 + (canvas.y / 112) ** 2 + 0 * canvas.z) <= 1
    canvas.fill(body, -95)
    wall = ((canvas.x / 145) ** 2 + (canvas.y / 100) ** 2 + 0 * canvas.z) <= 1
    canvas.fill(wall, 50)
    cavity = ((canvas.x / 130) ** 2 + ((canvas.y - 8) / 84) ** 2 + 0 * canvas.z) <= 1
    canvas.fill(cavity, -60)
    for side, label in ((-1, 104), (1, 105)):
        muscle = (((canvas.x - side * 34) / 24) ** 2 + ((canvas.y + 78) / 18) ** 2 + 0 * canvas.z) <= 1
        canvas.fill(muscle, 55, label)


def _draw_organs(canvas: _Canvas) -> dict[str, np.ndarray]:
    """Draw from back to front; return the mask in which each kind of tumour may lie."""
    right_lung = canvas.ellipsoid((70, -5, 118), (54, 74, 92)) & (canvas.z > 30)
    left_lung = canvas.ellipsoid((-70, -5, 118), (50, 74, 92)) & (canvas.z > 34)
    canvas.fill(right_lung, -850, 32)
    canvas.fill(left_lung, -850, 29)
    canvas.fill(canvas.ellipsoid((-18, 28, 104), (48, 40, 40)), 120, 115)
    liver = canvas.ellipsoid((62, 14, 18), (64, 66, 58)) & ~right_lung
    canvas.fill(liver, 110, 1)
    canvas.fill(canvas.ellipsoid((-98, -28, 34), (24, 34, 40)), 125, 3)
    canvas.fill(canvas.ellipsoid((-56, 30, 26), (36, 34, 34)), 15, 12)
    canvas.fill(canvas.ellipsoid((76, -46, -36), (26, 24, 46)), 165, 5)
    canvas.fill(canvas.ellipsoid((-76, -46, -28), (26, 24, 46)), 165, 14)
    pancreas = canvas.ellipsoid((-12, 14, -22), (62, 17, 17))
    canvas.fill(pancreas, 85, 4)
    canvas.fill(canvas.ellipsoid((34, 40, -28), (17, 16, 20)), 5, 10)
    canvas.fill(canvas.ellipsoid((98, 18, -74), (22, 24, 50)), -20, 62)
    canvas.fill(canvas.ellipsoid((0, 34, -88), (70, 34, 36)), 25, 19)
    canvas.fill(_column(canvas, (-8, -36), 11), 170, 6)
    canvas.fill(_column(canvas, (20, -28), 12), 120, 7)
    vertebrae = _draw_spine(canvas)
    return {
        "hepatic tumor": liver & (canvas.labels == 1),
        "pancreatic tumor": canvas.labels == 4,
        "lung tumor": (canvas.labels == 32) | (canvas.labels == 29),
        "bone lesion": vertebrae,
    }


def _column(canvas: _Canvas, centre: tuple[float, float], radius: float) -> np.ndarray:
    radius *= 1 + canvas.rng.uniform(-0.12, 0.12)
    return ((canvas.x - centre[0]) ** 2 + (canvas.y - centre[1]) ** 2 + 0 * canvas.z) <= radius**2


def _draw_spine(canvas: _Canvas) -> np.ndarray:
    """Vertebrae L5 (33) upwards, 32 mm each with a disc between; the cord (121) behind them."""
    spine = _column(canvas, (0, -62), 22)
    vertebrae = np.zeros_like(spine)
    bottom = float(canvas.z.min())
    for level in range(12):
        low = bottom + 32 * level
        body = spine & (canvas.z >= low) & (canvas.z < low + 26)
        canvas.fill(body, 320, 33 + level, spread=40)
        vertebrae |= body
    canvas.fill(spine & ~vertebrae, 90)
    canvas.fill(_column(canvas, (0, -88), 8), 35, 121)
    return vertebrae


def _draw_tumors(canvas: _Canvas, name: str, organ: np.ndarray) -> int:
    """Draw one to three separate tumours; return how many are separate and visible."""
    value = {"hepatic tumor": 45, "pancreatic tumor": 35, "lung tumor": 40, "bone lesion": 60}[name]
    largest = {"hepatic tumor": 22, "pancreatic tumor": 14, "lung tumor": 20, "bone lesion": 13}[name]
    drawn = np.zeros_like(organ)
    for _ in range(int(canvas.rng.integers(1, 4))):
        ball = canvas.place_inside(
            organ & ~ndimage.binary_dilation(drawn, iterations=5), canvas.rng.uniform(9, largest)
        )
        if ball is None or (ndimage.binary_dilation(ball, iterations=2) & drawn).any():
            continue
        inside = ball & organ if name != "lung tumor" else ball & (organ | (canvas.labels == 0))
        canvas.fill(inside, value, CT_TUMORS[name])
        drawn |= inside
    return int(ndimage.label(drawn, structure=np.ones((3, 3, 3)))[1])


def mri_phantom(
    seed: int,
    has_tumor: bool | None = None,
    shape: tuple[int, int, int] = (96, 112, 80),
    spacing: float = 2.0,
) -> VolumePhantom:
    """Draw a skull-stripped brain in four sequences, with or without a glioma.

    Args:
        seed: everything random follows from it.
        has_tumor: None draws a tumour with probability 0.75.
        shape: voxels along x (to the right), y (anterior), z (superior).
        spacing: voxel size in mm.
    """
    rng = np.random.default_rng(seed)
    has_tumor = bool(rng.random() < 0.75) if has_tumor is None else has_tumor
    canvas = _Canvas(shape, spacing, rng)
    brain = canvas.ellipsoid((0, 0, 0), (72, 88, 66))
    white = canvas.ellipsoid((0, 0, 4), (54, 68, 46))
    ventricles = canvas.ellipsoid((14, 4, 8), (9, 30, 13)) | canvas.ellipsoid((-14, 4, 8), (9, 30, 13))
    # T1c, T1, T2, FLAIR intensities of grey matter, white matter, fluid, oedema, necrosis, enhancing rim
    tissue = {
        "grey": (420, 400, 520, 480),
        "white": (560, 540, 380, 380),
        "fluid": (180, 160, 900, 140),
        "edema": (380, 340, 780, 880),
        "core": (220, 240, 760, 560),
        "rim": (1050, 430, 640, 700),
    }
    parts = [(brain, "grey"), (white & brain, "white"), (ventricles, "fluid")]
    labels = np.zeros(shape, np.uint8)
    if has_tumor:
        parts += _glioma_parts(canvas, white & brain, brain, labels)
    image = np.zeros((4, *shape), np.float32)
    for mask, name in parts:
        for channel in range(4):
            image[channel][mask] = tissue[name][channel] * (1 + rng.uniform(-0.06, 0.06))
    for channel in range(4):
        image[channel] = _add_mri_texture(image[channel], brain, rng)
    affine = np.diag([spacing, spacing, spacing, 1.0])
    return VolumePhantom(image, labels, affine, {"glioma": 1} if has_tumor else {})


def _glioma_parts(
    canvas: _Canvas, white: np.ndarray, brain: np.ndarray, labels: np.ndarray
) -> list[tuple[np.ndarray, str]]:
    depth = ndimage.distance_transform_edt(white)
    candidates = np.argwhere((depth > 2) & (np.abs(canvas.x) + 0 * canvas.y + 0 * canvas.z > 18))
    i, j, k = candidates[canvas.rng.integers(len(candidates))]
    centre = (canvas.x[i, 0, 0], canvas.y[0, j, 0], canvas.z[0, 0, k])
    radius = canvas.rng.uniform(12, 22)
    edema = canvas.ellipsoid(centre, (radius * 1.7, radius * 1.8, radius * 1.6), 0.2) & brain
    rim = canvas.ellipsoid(centre, (radius,) * 3, 0.1) & brain
    core = canvas.ellipsoid(centre, (radius * 0.62,) * 3, 0.1) & rim
    labels[edema], labels[rim], labels[core] = 2, 4, 1
    return [(edema, "edema"), (rim, "rim"), (core, "core")]


def _add_mri_texture(channel: np.ndarray, brain: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    smooth = ndimage.gaussian_filter(channel, 0.7)
    field_gain = 1 + 0.15 * ndimage.zoom(rng.normal(0, 1, (3, 3, 3)), [size / 3 for size in channel.shape], order=1)
    noise = rng.normal(0, 18, channel.shape)
    return np.where(brain, np.clip(smooth * field_gain + noise, 1, None), 0).round().astype(np.float32)


def cxr_phantom(seed: int, findings: Sequence[str] | None = None, size: int = 256) -> RadiographPhantom:
    """Draw a frontal chest X-ray.

    Args:
        seed: everything random follows from it.
        findings: which of ``CXR_PHANTOM_FINDINGS`` to draw; None draws each with probability 0.2.
        size: side of the square picture in pixels.
    """
    rng = np.random.default_rng(seed)
    if findings is None:
        findings = [name for name in CXR_PHANTOM_FINDINGS if rng.random() < 0.2]
    findings = tuple(name for name in CXR_PHANTOM_FINDINGS if name in findings)
    x, y = np.meshgrid(np.linspace(-1, 1, size), np.linspace(-1, 1, size))
    film = 165 + 25 * (1 - x**2)
    lungs = [_ellipse(x, y, side * 0.42, -0.08, 0.30, 0.60, rng) for side in (-1, 1)]
    for lung in lungs:
        film[lung] = 70 + rng.uniform(-8, 8)
    film = _draw_ribs(film, x, y, rng)
    film = _draw_mediastinum(film, x, y, findings, rng)
    for name in findings:
        if name in _FINDING_PAINTERS:
            film = _FINDING_PAINTERS[name](film, x, y, lungs, rng)
    film = ndimage.gaussian_filter(film, size / 180)
    film = film * rng.uniform(0.9, 1.1) + rng.normal(0, 5, film.shape)
    return RadiographPhantom(np.clip(film, 0, 255).astype(np.uint8), findings)


def _ellipse(x, y, centre_x, centre_y, radius_x, radius_y, rng, jitter=0.06) -> np.ndarray:
    scale = 1 + rng.uniform(-jitter, jitter, 4)
    return ((x - centre_x * scale[0]) / (radius_x * scale[1])) ** 2 + (
        (y - centre_y * scale[2]) / (radius_y * scale[3])
    ) ** 2 <= 1


def _draw_ribs(film: np.ndarray, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    offset = rng.uniform(-0.03, 0.03)
    for rib in range(9):
        height = -0.72 + 0.15 * rib + offset
        distance = np.abs(y - (height + 0.28 * (np.abs(x) - 0.35) ** 2 * 3))
        film = film + 22 * np.exp(-((distance / 0.022) ** 2)) * (np.abs(x) < 0.78)
    return film


def _draw_mediastinum(
    film: np.ndarray, x: np.ndarray, y: np.ndarray, findings: Sequence[str], rng: np.random.Generator
) -> np.ndarray:
    width = 0.24 if "Enlarged Cardiomediastinum" in findings else 0.11
    trunk = np.abs(x) < width * (1 + rng.uniform(-0.1, 0.1))
    film = np.where(trunk & (y < 0.35), np.maximum(film, 185), film)
    heart_radius = 0.44 if "Cardiomegaly" in findings else 0.25
    heart = _ellipse(x, y, 0.12, 0.28, heart_radius, 0.26, rng)
    film = np.where(heart, np.maximum(film, 195), film)
    spine = np.abs(x) < 0.05
    film = film + 18 * spine
    return np.where(y > 0.62 + 0.10 * x**2, np.maximum(film, 185 + 8 * rng.random()), film)


def _paint_effusion(film, x, y, lungs, rng):
    side = int(rng.integers(2))
    level = rng.uniform(0.12, 0.32)
    outer = 0.28 * np.clip(np.abs(x) - 0.3, 0, None)
    return np.where(lungs[side] & (y > level - outer), 190, film)


def _paint_pneumothorax(film, x, y, lungs, rng):
    side = int(rng.integers(2))
    sign = (-1, 1)[side]
    inner = ((x - sign * 0.34) / 0.20) ** 2 + ((y + 0.0) / 0.46) ** 2 <= 1
    rim = ((x - sign * 0.34) / 0.22) ** 2 + ((y + 0.0) / 0.48) ** 2 <= 1
    film = np.where(lungs[side] & ~rim, 22, film)
    return np.where(lungs[side] & rim & ~inner, 165, film)


def _paint_consolidation(film, x, y, lungs, rng):
    side = int(rng.integers(2))
    centre = ((-1, 1)[side] * rng.uniform(0.38, 0.5), rng.uniform(-0.35, 0.2))
    cloud = np.exp(-(((x - centre[0]) / 0.16) ** 2 + ((y - centre[1]) / 0.15) ** 2))
    texture = ndimage.gaussian_filter(rng.normal(0, 1, film.shape), 4)
    return film + np.where(lungs[side], 105 * cloud * (1 + 0.5 * texture / (np.abs(texture).max() + 1e-6)), 0)


def _paint_ball(film, x, y, lungs, rng, radius):
    side = int(rng.integers(2))
    centre = ((-1, 1)[side] * rng.uniform(0.36, 0.52), rng.uniform(-0.42, 0.12))
    ball = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2) <= radius**2
    return np.where(ball, np.maximum(film, 172), film)


def _paint_nodule(film, x, y, lungs, rng):
    return _paint_ball(film, x, y, lungs, rng, rng.uniform(0.045, 0.06))


def _paint_mass(film, x, y, lungs, rng):
    return _paint_ball(film, x, y, lungs, rng, rng.uniform(0.12, 0.16))


def _paint_edema(film, x, y, lungs, rng):
    haze = np.exp(-((np.abs(np.abs(x) - 0.22) / 0.24) ** 2)) * np.exp(-(((y + 0.02) / 0.42) ** 2))
    return film + np.where((lungs[0] | lungs[1]) & (film < 150), 62 * haze, 0)


_FINDING_PAINTERS = {
    "Effusion": _paint_effusion,
    "Pneumothorax": _paint_pneumothorax,
    "Consolidation": _paint_consolidation,
    "Nodule": _paint_nodule,
    "Mass": _paint_mass,
    "Edema": _paint_edema,
}


def save_volume(array: np.ndarray, affine: np.ndarray, path: str | Path) -> Path:
    """Write one ``(X, Y, Z)`` volume as NIfTI: int16 for images, uint8 as given for label maps."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array if array.dtype == np.uint8 else array.astype(np.int16), affine), path)
    return path


def save_mri(phantom: VolumePhantom, folder: str | Path) -> Path:
    """Write the four sequences as ``t1c``, ``t1n``, ``t2w`` and ``t2f`` into a folder; return the folder."""
    folder = Path(folder)
    for name, channel in zip(("t1c", "t1n", "t2w", "t2f"), phantom.image, strict=True):
        save_volume(channel, phantom.affine, folder / f"{name}.nii.gz")
    return folder


def save_radiograph(phantom: RadiographPhantom, path: str | Path) -> Path:
    """Write a chest X-ray phantom as a grey PNG."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(phantom.image).save(path)
    return path
