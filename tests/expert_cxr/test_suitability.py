import json

import numpy as np
import pytest
from dicom_files import write_dicom
from PIL import Image

from cxr_expert.data import read_labels_csv, split_by_patient
from cxr_expert.suitability import find_doubts, read_small, standardize, write_template
from vila_m3_common.phantoms import cxr_phantom

NO_FILM = "the picture does not look like a frontal chest X-ray"


@pytest.fixture(scope="module")
def film(shared):
    """A real film, (1024, 1024) uint8."""
    return np.asarray(Image.open(shared / "data/cxr/full_size/00000001_000-Cardiomegaly.png").convert("L"))


def doubts_of(picture, folder):
    Image.fromarray(np.ascontiguousarray(picture)).save(folder / "x.png")
    return find_doubts(folder / "x.png")


def test_real_films_and_phantoms_raise_no_doubt(shared, tmp_path):
    for path in sorted((shared / "data/cxr/full_size").iterdir()):
        assert find_doubts(path) == []
    assert doubts_of(cxr_phantom(11, []).image, tmp_path) == []


@pytest.mark.parametrize(
    ("change", "doubt"),
    [
        (lambda film: 255 - film, "the picture looks inverted (bone dark)"),
        (lambda film: film[::-1, ::-1], "the picture looks upside down"),
        (lambda film: np.rot90(film), "the picture looks turned by a quarter to the left"),
        (lambda film: np.rot90(film, -1), "the picture looks turned by a quarter to the right"),
        (lambda film: film[:200, :200], NO_FILM),
    ],
)
def test_a_film_in_another_orientation_is_named(film, tmp_path, change, doubt):
    assert doubts_of(change(film), tmp_path) == [doubt]


def test_noise_and_a_slice_on_black_are_no_films(tmp_path):
    rng = np.random.default_rng(0)
    assert doubts_of(rng.integers(0, 255, (64, 64), dtype=np.uint8), tmp_path) == [NO_FILM]
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    assert doubts_of(np.where(x**2 + y**2 < 0.5, 180 + 40 * x, 0).astype(np.uint8), tmp_path) == [NO_FILM]


def test_few_held_out_films_are_doubted(shared):
    """Every fifth film of patients outside the template; docs/README.md states the share over all."""
    folder = shared / "data/cxr/nih_256"
    films = split_by_patient(read_labels_csv(folder, folder / "labels.csv"), 0.2)["validation"][::5]
    assert np.mean([bool(find_doubts(item["image"])) for item in films]) <= 0.05


def test_slices_of_ct_and_mri_are_doubted(shared):
    folder = shared / "data/vqa/slake"
    questions = json.loads((folder / "test.json").read_text())
    slices = {item["img_name"]: item["modality"] for item in questions if item["modality"] in ("CT", "MRI")}
    doubted = [bool(find_doubts(folder / "imgs" / name)) for name in list(slices)[::4]]
    assert np.mean(doubted) >= 0.95


@pytest.mark.parametrize(
    ("tags", "doubt"),
    [
        ({"ViewPosition": "LL"}, "the DICOM view position is LL, and only frontal views"),
        ({"ViewPosition": "LATERAL", "BodyPartExamined": "CHEST"}, "the DICOM view position is LATERAL"),
        ({"BodyPartExamined": "HAND"}, "the DICOM body part is HAND, no chest"),
        ({"Modality": "MG"}, "the DICOM modality is MG, no radiograph"),
    ],
)
def test_dicom_tags_of_other_views_are_named(film, tmp_path, tags, doubt):
    path = write_dicom(tmp_path / "x.dcm", film.astype(np.uint16), "DX", **tags)
    (found,) = find_doubts(path)
    assert found.startswith(doubt)


def test_a_frontal_dicom_film_is_judged_by_its_picture(film, tmp_path):
    tags = {"ViewPosition": "PA", "BodyPartExamined": "CHEST"}
    assert find_doubts(write_dicom(tmp_path / "a.dcm", film.astype(np.uint16), "DX", **tags)) == []
    turned = write_dicom(tmp_path / "b.dcm", film[::-1, ::-1].astype(np.uint16), "DX", **tags)
    assert find_doubts(turned) == ["the picture looks upside down"]


def test_a_template_is_the_mean_of_standardised_films(shared, tmp_path):
    paths = sorted((shared / "data/cxr/full_size").glob("*.png"))[:2]
    written = np.array(json.loads(write_template(paths, tmp_path / "t.json").read_text()))
    expected = (standardize(read_small(paths[0])) + standardize(read_small(paths[1]))) / 2
    np.testing.assert_allclose(written, expected, atol=0.006)
