"""Any picture becomes a square of pixel values."""

import numpy as np
import pytest
import torch
from PIL import Image

from vila_m3.image_processor import VilaM3ImageProcessor, resize


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
