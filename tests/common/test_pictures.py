"""Pictures of every kind: each has a defined result or a clear error."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vila_m3_common.errors import UserError
from vila_m3_common.pictures import to_rgb
from vila_m3_common.volumes import load_picture, load_radiograph

GREY = np.arange(48, dtype=np.uint8).reshape(6, 8)


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
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    for load in (load_picture, load_radiograph):
        with pytest.raises(UserError, match="moving.png has 3 frames; give one frame"):
            load(tmp_path / "moving.png")


@pytest.mark.parametrize(
    "array", [GREY, GREY[..., None], np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
)
def test_an_array_of_another_kind_is_refused(array: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"a picture is an array of shape .* and type .*; give \(H, W, 3\) uint8"):
        to_rgb(array)
