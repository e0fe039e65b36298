"""Pictures of every kind: each has a defined result or a clear error."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vila_m3.image_processor import VilaM3ImageProcessor, resize, to_rgb
from vila_m3_common.errors import UserError

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)


@pytest.mark.parametrize("ratio", ["resize", "pad", "none"])
@pytest.mark.parametrize("crops", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (17, 4)])
def test_any_size_becomes_a_square(ratio: str, crops: bool, shape: tuple[int, int]) -> None:
    processor = VilaM3ImageProcessor(24, image_aspect_ratio=ratio, do_center_crop=crops)
    values = processor.to_pixel_values(np.full((*shape, 3), 255, np.uint8))
    assert values.shape == (3, 24, 24)
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    # Padding is of the mean colour, grey; in a padded line of one pixel nothing else is left.
    assert values.max() == pytest.approx(-1 / 255 if ratio == "pad" and 5000 in shape else 1.0)


def modes() -> dict[str, Image.Image]:
    rgb = Image.fromarray(np.repeat(GREY[..., None], 3, axis=2))
    transparent = rgb.copy()
    transparent.putalpha(0)
    return {
        "L": Image.fromarray(GREY),
        "RGB": rgb,
        "RGBA": transparent,
        "CMYK": rgb.convert("CMYK"),
        "P": rgb.convert("P"),
    }


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "CMYK", "P"])
def test_every_mode_shows_the_same_picture(mode: str) -> None:
    """Transparency is dropped, not filled; a palette may round."""
    picture = modes()[mode]
    assert picture.mode == mode
    shown = to_rgb(picture)
    assert shown.shape == (6, 8, 3)
    difference = np.abs(shown.astype(int) - GREY[..., None].astype(int)).max()
    assert difference <= (51 if mode == "P" else 0)


def test_black_and_white_is_black_and_white() -> None:
    assert set(np.unique(to_rgb(Image.fromarray(GREY > 20)))) == {0, 255}


def test_16_bit_grey_is_scaled_and_not_cut(tmp_path: Path) -> None:
    deep = (GREY.astype(np.uint16) * 1000) + 500
    Image.fromarray(deep).save(tmp_path / "deep.png")
    shown = to_rgb(Image.open(tmp_path / "deep.png"))
    assert shown.min() == 0
    assert shown.max() == 255
    np.testing.assert_allclose(shown[..., 0], GREY * (255 / 47), atol=1)


def test_a_constant_16_bit_picture_is_black() -> None:
    assert to_rgb(Image.fromarray(np.full((3, 3), 700, np.uint16))).max() == 0


def test_an_animation_is_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (0, 100, 200)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="a picture has 3 frames; give one frame as a picture of its own"):
        to_rgb(Image.open(tmp_path / "moving.gif"))


@pytest.mark.parametrize(
    "array", [GREY, GREY[..., None], np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_an_array_of_another_kind_is_refused(array: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"a picture is an array of shape .* and type .*; give \(H, W, 3\) uint8"):
        to_rgb(array)


def test_resizing_goes_first_by_width() -> None:
    """Pillow 13 may go by height first; the result then differs."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 40, 3), dtype=np.uint8))
    wide = noise.resize((64, 300), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(np.asarray(resize(noise, 64, 64)), np.asarray(wide))


def test_pictures_make_a_batch() -> None:
    processor = VilaM3ImageProcessor(8)
    batch = processor([np.zeros((4, 4, 3), np.uint8), Image.new("RGB", (3, 3))])["pixel_values"]
    assert batch.shape == (2, 3, 8, 8)
    assert batch.dtype == torch.float32
    assert processor([])["pixel_values"].shape == (0, 3, 8, 8)
