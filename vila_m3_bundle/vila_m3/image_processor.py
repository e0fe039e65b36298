"""Pictures -> pixel values, as the vision towers of VILA-1.5 were fed; needs no torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from vila_m3_common.pictures import Picture, to_rgb

from .configuration import VilaM3Config, check_aspect_ratio

SIGLIP_MEAN = SIGLIP_STD = (0.5, 0.5, 0.5)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Vision tower -> mean, standard deviation, and whether its own default crops the centre of the shortest edge.
TOWER_DEFAULTS = {
    "siglip_vision_model": (SIGLIP_MEAN, SIGLIP_STD, False),
    "conv_stem_siglip": (SIGLIP_MEAN, SIGLIP_STD, False),
    "clip_vision_model": (CLIP_MEAN, CLIP_STD, True),
    "intern_vit_6b": (IMAGENET_MEAN, IMAGENET_STD, False),
}


class VilaM3ImageProcessor(BaseImageProcessor):
    """Makes pictures square, scales and normalises them.

    Args:
        size: side of the square in pixels.
        image_mean: mean of each channel, of values in 0..1.
        image_std: standard deviation of each channel.
        image_aspect_ratio: ``resize`` stretches the picture, ``pad`` first centres it on a square of the mean
            colour, ``none`` does what the tower's own processor does.
        do_center_crop: whether ``none`` brings the shortest edge to ``size`` and crops the centre (CLIP).
        kwargs: what :class:`transformers.BaseImageProcessor` takes.

    Raises:
        UserError: for an unknown aspect ratio.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int = 384,
        image_mean: Sequence[float] = SIGLIP_MEAN,
        image_std: Sequence[float] = SIGLIP_STD,
        image_aspect_ratio: str = "resize",
        do_center_crop: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_aspect_ratio(image_aspect_ratio)
        self.size = size
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.image_aspect_ratio = image_aspect_ratio
        self.do_center_crop = do_center_crop

    def preprocess(
        self, images: Picture | Sequence[Picture], return_tensors: str | None = "pt", **kwargs: Any
    ) -> BatchFeature:
        """Turn pictures into ``pixel_values`` ``(N, 3, size, size)`` float32.

        Args:
            images: one or more pictures: PIL images of any mode, or arrays ``(H, W, 3)`` uint8.
            return_tensors: ``pt`` or ``np``.
            kwargs: ignored; transformers passes its own.

        Raises:
            UserError: for a picture with several frames or of another shape or type.
        """
        pictures = [images] if isinstance(images, (np.ndarray, Image.Image)) else list(images)
        values = [self.to_pixel_values(picture) for picture in pictures]
        stacked = np.stack(values) if values else np.zeros((0, 3, self.size, self.size), np.float32)
        return BatchFeature({"pixel_values": stacked}, tensor_type=return_tensors)

    def to_pixel_values(self, picture: Picture) -> np.ndarray:
        """One picture -> ``(3, size, size)`` float32."""
        image = Image.fromarray(to_rgb(picture))
        if self.image_aspect_ratio == "pad":
            colour = tuple(int(mean * 255) for mean in self.image_mean)
            image = resize(pad_to_square(image, colour), self.size, self.size)
        elif self.image_aspect_ratio == "none" and self.do_center_crop:
            image = crop_centre(image, self.size)
        else:
            image = resize(image, self.size, self.size)
        # In the order and precision of the reference, whose results are then equal to the last digit.
        scaled = (np.asarray(image) * (1 / 255)).astype(np.float32)
        mean, std = np.array(self.image_mean, np.float32), np.array(self.image_std, np.float32)
        return ((scaled - mean) / std).transpose(2, 0, 1)


def resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize bicubically, first the width, then the height.

    The reference's Pillow always went in this order. Pillow 13 chooses it by cost and then differs by up to 16 grey
    values; two calls fix it.
    """
    wide = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return wide.resize((width, height), Image.Resampling.BICUBIC)


def pad_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """Centre a picture on a square of a colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def crop_centre(image: Image.Image, size: int) -> Image.Image:
    """Bring the shortest edge to ``size`` and cut out the central square."""
    if image.width <= image.height:
        width, height = size, int(size * image.height / image.width)
    else:
        width, height = int(size * image.width / image.height), size
    image = resize(image, width, height)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_processor_for(config: VilaM3Config) -> VilaM3ImageProcessor:
    """Make the image processor of a model: what its ``preprocessor_config.json`` leaves open is the tower's default."""
    mean, std, crops = TOWER_DEFAULTS[config.vision_config.model_type]
    stored = config.released_configs.get("preprocessor", {})
    return VilaM3ImageProcessor(
        size=config.image_size,
        image_mean=stored.get("image_mean", mean),
        image_std=stored.get("image_std", std),
        image_aspect_ratio=config.image_aspect_ratio,
        do_center_crop=bool(stored.get("do_center_crop", crops)),
    )


def as_tensor(pictures: Sequence[Picture], processor: VilaM3ImageProcessor) -> torch.Tensor:
    """Pictures -> ``(N, 3, S, S)`` float32; ``N`` may be 0."""
    return processor.preprocess(list(pictures))["pixel_values"]


AutoImageProcessor.register(VilaM3Config, slow_image_processor_class=VilaM3ImageProcessor, exist_ok=True)
