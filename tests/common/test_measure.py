"""Measurements against spheres, ellipsoids and boxes whose volume, diameters and side are known analytically."""

import numpy as np
import pytest

from vila_m3_common.measure import (
    MAX_MEASURED_LESIONS,
    find_lesions,
    find_midline,
    measure_labels,
    plane_diameters,
)

SHAPE = (60, 50, 40)
SPACING = (1.0, 1.2, 1.5)
AFFINE = np.diag([*SPACING, 1.0])


def rotation(*degrees: float) -> np.ndarray:
    """Rotate about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(np.radians(degrees)):
        turn = np.eye(3)
        first, second = [other for other in range(3) if other != axis]
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def affine_of(directions: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Directions in columns; the middle voxel of ``SHAPE`` lies at (10, -20, 30) mm."""
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = np.array([10, -20, 30]) - affine[:3, :3] @ ((np.array(SHAPE) - 1) / 2)
    return affine


SHEAR = np.array([[1, 0, 0], [0, 1, 0.3], [0, 0, 1.0]])
GRIDS = {
    "RAS": affine_of(np.eye(3), (1, 1, 1)),
    "anisotropic": affine_of(np.eye(3), (0.9, 1.1, 2.5)),
    "LPS": affine_of(np.diag([-1, -1, 1.0]), (1, 1.2, 1.5)),
    "upside down": affine_of(np.diag([1, 1, -1.0]), (1, 1, 2)),
    "sagittal slices": affine_of(np.eye(3)[:, [1, 2, 0]], (1, 1, 1.6)),
    "oblique": affine_of(rotation(12, -18, 25), (1, 1, 1)),
    "oblique anisotropic LPS": affine_of(rotation(-9, 21, 14) @ np.diag([-1, -1, 1.0]), (0.8, 1.3, 2.2)),
    "gantry tilt": affine_of(SHEAR, (1, 1, 1.5)),
}
every_grid = pytest.mark.parametrize("affine", GRIDS.values(), ids=list(GRIDS))


def ellipsoid(affine: np.ndarray, centre: tuple[float, ...], shape_matrix: np.ndarray) -> np.ndarray:
    """Voxels whose centre x fulfils (x - c)' Q (x - c) <= 1, positions in mm."""
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    offset = index @ affine[:3, :3].T + affine[:3, 3] - centre
    return np.einsum("...i,ij,...j->...", offset, shape_matrix, offset) <= 1


def quadric(radii: tuple[float, float, float], turned: np.ndarray | None = None) -> np.ndarray:
    turned = np.eye(3) if turned is None else turned
    return turned @ np.diag(1 / np.square(radii)) @ turned.T


def plane_columns(affine: np.ndarray, axis: int) -> np.ndarray:
    """The two columns of the affine that lie in the slices along the RAS axis."""
    world_axis_of_column = np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).argmax(axis=0)
    return affine[:3, :3][:, world_axis_of_column != axis]


def true_diameters(shape_matrix: np.ndarray, affine: np.ndarray, axis: int) -> tuple[float, float]:
    """The axes of the ellipse in which a slice through the centre cuts the ellipsoid."""
    plane = np.linalg.qr(plane_columns(affine, axis))[0]
    longest, shortest = 2 / np.sqrt(np.linalg.eigvalsh(plane.T @ shape_matrix @ plane))
    return float(longest), float(shortest)


@every_grid
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_sphere_has_its_volume_and_diameters_on_every_grid(affine: np.ndarray, axis: int) -> None:
    radius = 13.0
    mask = ellipsoid(affine, (11, -21, 31.5), quadric((radius,) * 3))
    (row,) = measure_labels(mask.astype(np.uint8), affine, {1: "liver"}, axis=axis)
    assert row["volume_ml"] == pytest.approx(4 / 3 * np.pi * radius**3 / 1000, rel=0.02)
    voxel = np.linalg.norm(plane_columns(affine, axis), axis=0).max()
    assert row["longest_diameter_mm"] == pytest.approx(2 * radius, abs=voxel)
    assert row["perpendicular_diameter_mm"] == pytest.approx(2 * radius, abs=voxel)
    assert row["component_count"] == 1


@every_grid
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_tilted_ellipsoid_has_its_volume_and_diameters_on_every_grid(affine: np.ndarray, axis: int) -> None:
    radii = (16.0, 10.0, 7.0)
    matrix = quadric(radii, rotation(20, 35, -50))
    mask = ellipsoid(affine, (10, -20, 30), matrix)
    (row,) = measure_labels(mask.astype(np.uint8), affine, {1: "liver"}, axis=axis)
    assert row["volume_ml"] == pytest.approx(4 / 3 * np.pi * np.prod(radii) / 1000, rel=0.02)
    voxel = np.linalg.norm(plane_columns(affine, axis), axis=0).max()
    longest, perpendicular = true_diameters(matrix, affine, axis)
    assert row["longest_diameter_mm"] == pytest.approx(longest, abs=voxel)
    assert row["perpendicular_diameter_mm"] == pytest.approx(perpendicular, abs=voxel)


def test_diameters_of_random_ellipses_err_by_less_than_a_voxel() -> None:
    draw = np.random.default_rng(0).uniform
    for _ in range(200):
        spacing = draw(0.6, 3, 2)
        long = draw(3, 20) * spacing.max()
        short, angle = long * draw(0.4, 1), draw(0, np.pi)
        size = np.ceil(2 * long / spacing).astype(int) + 4
        x, y = np.meshgrid(*(np.arange(count) * step for count, step in zip(size, spacing, strict=True)), indexing="ij")
        x, y = x - (size[0] / 2 + draw()) * spacing[0], y - (size[1] / 2 + draw()) * spacing[1]
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        longest, perpendicular = plane_diameters((along / long) ** 2 + (across / short) ** 2 <= 1, np.diag(spacing))
        assert abs(longest - 2 * long) < spacing.max()
        assert abs(perpendicular - 2 * short) < spacing.max()


def box(size: tuple[int, int]) -> np.ndarray:
    mask = np.zeros((20, 20), bool)
    mask[3 : 3 + size[0], 3 : 3 + size[1]] = True
    return mask


@pytest.mark.parametrize(("size", "longest", "perpendicular"), [((1, 1), 1, 1), ((1, 10), 10, 1), ((9, 1), 9, 1)])
def test_a_row_of_pixels_measures_its_length_and_its_width(size, longest, perpendicular) -> None:
    assert plane_diameters(box(size), np.eye(2)) == pytest.approx((longest, perpendicular))


def test_a_row_of_pixels_is_measured_in_mm_along_each_axis() -> None:
    assert plane_diameters(box((1, 10)), np.diag([1.0, 2.0])) == pytest.approx((20.0, 1.0))
    assert plane_diameters(box((10, 1)), np.diag([1.0, 2.0])) == pytest.approx((10.0, 2.0))


def test_a_square_measures_along_its_diagonals() -> None:
    assert plane_diameters(box((10, 10)), np.eye(2)) == pytest.approx((np.hypot(10, 10),) * 2, abs=1)


def sphere(centre_mm: tuple[float, float, float], radius_mm: float) -> np.ndarray:
    return ellipsoid(AFFINE, centre_mm, quadric((radius_mm,) * 3))


def test_the_diameter_does_not_span_separate_lesions() -> None:
    labels = (sphere((15, 30, 30), 8) | sphere((45, 30, 30), 6)).astype(np.uint8)
    (row,) = measure_labels(labels, AFFINE, {1: "hepatic tumor"})
    assert row["component_count"] == 2
    assert row["longest_diameter_mm"] == pytest.approx(16, abs=1.2)


def test_the_diameter_is_that_of_the_longest_lesion_in_its_own_slice() -> None:
    rod = ellipsoid(AFFINE, (25, 12, 10.5), quadric((20, 4, 4)))
    labels = (rod | sphere((30, 40, 40), 11)).astype(np.uint8)
    (row,) = measure_labels(labels, AFFINE, {1: "hepatic tumor"})
    assert row["longest_diameter_mm"] == pytest.approx(40, abs=1.2)
    assert row["perpendicular_diameter_mm"] == pytest.approx(8, abs=1.2)
    assert row["diameter_slice"] == 7  # 10.5 mm at 1.5 mm per slice
    assert row["largest_slice"] in (26, 27)  # where the larger area is


def test_many_lesions_are_all_counted() -> None:
    labels = np.zeros((60, 60, 8), np.uint8)
    for i in range(5):
        for j in range(4):
            labels[12 * i : 12 * i + 4, 12 * j : 12 * j + 4, 2:6] = 1
    labels[48:58, 50:52, 2:6] = 1  # the largest and longest
    (row,) = measure_labels(labels, np.eye(4), {1: "bone lesion"})
    assert row["component_count"] == 21 > MAX_MEASURED_LESIONS
    assert row["longest_diameter_mm"] == pytest.approx(10, abs=1)


def test_specks_are_no_lesions() -> None:
    labels = (sphere((15, 15, 15), 6) | sphere((45, 45, 45), 6)).astype(np.uint8)
    labels[0, 0, 39] = 1  # 1.8 mm3, below 0.03 mL
    (row,) = measure_labels(labels, AFFINE, {1: "hepatic tumor"})
    assert row["component_count"] == 2


def test_a_single_speck_still_counts_as_one() -> None:
    mask = np.zeros((5, 5, 5), bool)
    assert find_lesions(mask, 0.001)[1] == []
    mask[2, 2, 2] = True
    assert find_lesions(mask, 0.001)[1] == [1]


def test_voxels_that_touch_at_a_corner_are_one_lesion() -> None:
    mask = np.zeros((4, 4, 4), bool)
    mask[:2, :2, :2] = mask[2:, 2:, 2:] = True
    assert len(find_lesions(mask, 0.01)[1]) == 1


def test_the_mean_is_that_of_the_labels_voxels() -> None:
    labels = sphere((30, 30, 30), 10).astype(np.uint8)
    image = np.where(labels == 1, 60.0, -1000.0)
    (row,) = measure_labels(labels, AFFINE, {1: "liver"}, image)
    assert row["mean_hu"] == 60.0


@every_grid
def test_the_mean_is_that_of_the_labels_voxels_on_every_grid(affine: np.ndarray) -> None:
    labels = ellipsoid(affine, (14, -22, 28), quadric((9, 12, 8))).astype(np.uint8)
    gradient = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    (row,) = measure_labels(labels, affine, {1: "liver"}, gradient)
    assert row["mean_hu"] == pytest.approx(gradient[labels == 1].mean(dtype=np.float64), abs=0.5, rel=1e-5)


@pytest.mark.parametrize(("axis", "largest", "name"), [(0, 30, "sagittal"), (1, 25, "coronal"), (2, 20, "axial")])
def test_the_largest_slice_follows_the_axis(axis: int, largest: int, name: str) -> None:
    (row,) = measure_labels(sphere((30, 30, 30), 9).astype(np.uint8), AFFINE, {1: "liver"}, axis=axis)
    assert (row["largest_slice"], row["slice_axis"]) == (largest, name)


def test_measurements_do_not_depend_on_the_stored_orientation() -> None:
    labels = (sphere((20, 30, 24), 9) * 4).astype(np.uint8)
    expected = measure_labels(labels, AFFINE, {4: "pancreas"}, midline=30)
    flipped = AFFINE.copy()
    flipped[0] = [-1, 0, 0, SHAPE[0] - 1]
    assert measure_labels(labels[::-1], flipped, {4: "pancreas"}, midline=30) == expected
    turned = AFFINE[:, [2, 0, 1, 3]]
    assert measure_labels(labels.transpose(2, 0, 1), turned, {4: "pancreas"}, midline=30) == expected
    assert expected[0]["side"] == "left"


def test_labels_that_are_absent_or_unnamed_are_left_out() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[2:6, 2:6, 2:6] = 7
    assert measure_labels(labels, AFFINE, {1: "liver", 200: "nothing"}) == []


def head(affine: np.ndarray, centre: tuple[float, float, float]) -> np.ndarray:
    return np.where(ellipsoid(affine, centre, quadric((19, 22, 20))), 500.0, 0.0)


@every_grid
@pytest.mark.parametrize("x", [8.0, 12.0])
def test_the_midline_is_the_middle_of_the_body_on_every_grid(affine: np.ndarray, x: float) -> None:
    voxel = np.linalg.norm(affine[:3, :3], axis=0).max()
    assert find_midline(head(affine, (x, -20, 30)), affine) == pytest.approx(x, abs=voxel)


def test_a_table_and_an_arm_do_not_move_the_midline() -> None:
    image = np.full((120, 90, 60), -1000.0)
    image[30:90, 25:75] = 40  # trunk, middle at 59.5 mm
    image[100:112, 40:50] = 40  # an arm on the right
    image[10:110, 5:8] = 200  # table
    assert find_midline(image, np.eye(4)) == pytest.approx(59.5, abs=1)


def test_an_image_without_a_body_has_its_midline_in_the_middle() -> None:
    assert find_midline(np.zeros((11, 4, 4)), np.diag([2.0, 1, 1, 1])) == 10.0


@every_grid
@pytest.mark.parametrize(("x", "side"), [(-1.0, "left"), (21.0, "right"), (10.0, "both")])
def test_the_side_is_the_patients_on_every_grid(affine: np.ndarray, x: float, side: str) -> None:
    mask = ellipsoid(affine, (x, -20, 30), quadric((7, 7, 7)))
    image = head(affine, (10, -20, 30))
    (row,) = measure_labels(mask.astype(np.uint8), affine, {1: "kidney"}, midline=find_midline(image, affine))
    assert row["side"] == side


def test_without_a_midline_no_side_is_claimed() -> None:
    (row,) = measure_labels(sphere((30, 30, 30), 9).astype(np.uint8), AFFINE, {1: "liver"})
    assert "side" not in row
