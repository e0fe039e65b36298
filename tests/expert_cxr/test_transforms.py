"""Pictures and checksums come from TorchXRayVision 1.5.7, recorded in golden/experts/cxr."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_expert.transforms import CenterSquareCropd, LoadRadiographd, ResizeSquared, resize_square
from vila_m3_common.errors import UserError

NAMES = {"a": "a_1024_L", "b": "b_300_L", "c": "c_988x860_L", "d": "d_1036x885_RGB", "e": "e_300_RGB_distinct"}


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden" / "experts" / "cxr"


@pytest.mark.parametrize("key", sorted(NAMES))
def test_preprocessing_equals_the_package_to_the_bit(golden, load_image, key):
    expected = json.loads((golden / "preprocess.json").read_text())["images"][key]
    crop = np.ascontiguousarray(np.asarray(load_image(golden / "inputs" / f"{NAMES[key]}.png")))
    assert list(crop.shape) == expected["crop_shape"]
    assert hashlib.sha256(crop.tobytes()).hexdigest() == expected["crop_sha256_f32"]


@pytest.mark.parametrize("key", sorted(NAMES))
def test_resize_equals_the_one_inside_the_released_models(golden, load_image, key):
    crop = load_image(golden / "inputs" / f"{NAMES[key]}.png")
    expected = np.load(golden / f"prep_{key}.npz")["fix_resolution_224"]
    np.testing.assert_allclose(resize_square(crop[None], 224)[0].numpy(), expected, atol=1e-4)


def test_colour_keeps_channel_zero(golden, load_image):
    plain, colored = (load_image(golden / "inputs" / f"{NAMES[key]}.png") for key in "be")
    assert torch.equal(plain, colored)


@pytest.mark.parametrize("shape", ["5x8", "8x5", "5x7", "7x5", "6x6", "4x9", "9x4"])
def test_centre_crop_starts_where_the_package_starts(golden, shape):
    expected = json.loads((golden / "preprocess.json").read_text())["centercrop_arange"][shape]
    height, width = map(int, shape.split("x"))
    picture = torch.arange(height * width, dtype=torch.float32).reshape(1, height, width)
    crop = CenterSquareCropd("image")({"image": picture})["image"]
    assert list(crop.shape) == expected["shape"]
    assert (crop.flatten()[0], crop.flatten()[-1]) == (expected["first"], expected["last"])


def test_dicom_radiograph_is_read(shared, load_image):
    crop = load_image(shared / "data" / "cxr" / "full_size" / "cr_chest.dcm")
    assert crop.shape[0] == 1
    assert crop.shape[1] == crop.shape[2]
    assert (float(crop.min()), float(crop.max())) == pytest.approx((-1024, 1024), abs=40)


def test_picture_of_the_wanted_size_is_left_as_it_is():
    picture = torch.rand(1, 1, 16, 16)
    assert resize_square(picture, 16) is picture
    assert ResizeSquared("image", 8)({"image": picture[0]})["image"].shape == (1, 8, 8)


def test_constant_picture_is_refused(tmp_path):
    Image.new("L", (8, 8), 7).save(tmp_path / "flat.png")
    with pytest.raises((UserError, RuntimeError), match="flat.png is constant"):
        LoadRadiographd("image")({"image": tmp_path / "flat.png"})
