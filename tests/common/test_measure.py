"""Measurements against spheres and boxes whose volume is known analytically."""

import numpy as np
import pytest

from vila_m3_common.measure import count_components, longest_diameter, measure_labels

SHAPE = (60, 50, 40)
SPACING = (1.0, 1.2, 1.5)
AFFINE = np.diag([*SPACING, 1.0])


def sphere(centre_mm: tuple[float, float, float], radius_mm: float) -> np.ndarray:
    x, y, z = np.meshgrid(*(np.arange(size) * step for size, step in zip(SHAPE, SPACING, strict=True)), indexing="ij")
    return (x - centre_mm[0]) ** 2 + (y - centre_mm[1]) ** 2 + (z - centre_mm[2]) ** 2 <= radius_mm**2


def test_a_sphere_has_its_volume_diameter_and_largest_slice() -> None:
    labels = sphere((30, 30, 30), 12).astype(np.uint8)
    (row,) = measure_labels(labels, AFFINE, {1: "liver"})
    assert row["volume_ml"] == pytest.approx(4 / 3 * np.pi * 12**3 / 1000, rel=0.02)
    assert row["longest_diameter_mm"] == pytest.approx(24, abs=1.2)
    assert row["largest_slice"] == 20  # 30 mm at 1.5 mm per slice
    assert (row["name"], row["label"], row["component_count"], row["slice_axis"]) == ("liver", 1, 1, "axial")


def test_separate_spheres_are_counted_and_specks_are_not() -> None:
    labels = (sphere((15, 15, 15), 6) | sphere((45, 45, 45), 6)).astype(np.uint8)
    labels[0, 0, 39] = 1  # 1.8 mm3, below 0.03 mL
    (row,) = measure_labels(labels, AFFINE, {1: "hepatic tumor"})
    assert row["component_count"] == 2


def test_a_single_speck_still_counts_as_one() -> None:
    mask = np.zeros((5, 5, 5), bool)
    assert count_components(mask, 0.001) == 0
    mask[2, 2, 2] = True
    assert count_components(mask, 0.001) == 1


def test_voxels_that_touch_at_a_corner_are_one_component() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[:2, :2, :2] = mask[2:, 2:, 2:] = True
    assert count_components(mask, 0.01) == 1


def test_the_mean_is_that_of_the_labels_voxels() -> None:
    labels = sphere((30, 30, 30), 10).astype(np.uint8)
    image = np.where(labels == 1, 60.0, -1000.0)
    (row,) = measure_labels(labels, AFFINE, {1: "liver"}, image)
    assert row["mean_intensity"] == 60.0


@pytest.mark.parametrize(("axis", "largest", "name"), [(0, 30, "sagittal"), (1, 25, "coronal"), (2, 20, "axial")])
def test_the_largest_slice_follows_the_axis(axis: int, largest: int, name: str) -> None:
    (row,) = measure_labels(sphere((30, 30, 30), 9).astype(np.uint8), AFFINE, {1: "liver"}, axis=axis)
    assert (row["largest_slice"], row["slice_axis"]) == (largest, name)


def test_measurements_do_not_depend_on_the_stored_orientation() -> None:
    labels = (sphere((20, 30, 24), 9) * 4).astype(np.uint8)
    flipped_affine = AFFINE.copy()
    flipped_affine[0, 0] *= -1
    expected = measure_labels(labels, AFFINE, {4: "pancreas"})
    assert measure_labels(labels[::-1], flipped_affine, {4: "pancreas"}) == expected
    assert measure_labels(labels.transpose(2, 0, 1), AFFINE[:, [2, 0, 1, 3]], {4: "pancreas"}) == expected


def test_labels_that_are_absent_or_unnamed_are_left_out() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:6, 2:6, 2:6] = 7
    assert measure_labels(labels, AFFINE, {1: "liver", 200: "nothing"}) == []


@pytest.mark.parametrize(
    ("size", "diameter"), [((1, 1), 1.0), ((1, 10), 10.0), ((4, 5), np.hypot(3, 4) + 1), ((2, 2), np.sqrt(2) + 1)]
)
def test_the_diameter_of_boxes(size: tuple[int, int], diameter: float) -> None:
    mask = np.zeros((20, 20), bool)
    mask[3 : 3 + size[0], 3 : 3 + size[1]] = True
    assert longest_diameter(mask, [1.0, 1.0]) == pytest.approx(diameter)
