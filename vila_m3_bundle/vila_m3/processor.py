"""Conversation -> tensors: chat template, tokenizer, image places, labels, pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer

from vila_m3_common.chat_template import ChatTemplate, Rendered, get_template, render
from vila_m3_common.conversation import IMAGE_TOKEN, Conversation
from vila_m3_common.errors import UserError

from .model import IGNORED_LABEL, IMAGE_TOKEN_ID, VilaM3


@dataclass(frozen=True)
class Encoded:
    """One conversation as tensors.

    Args:
        input_ids: ``(L,)`` with ``IMAGE_TOKEN_ID`` at every visual token.
        labels: ``(L,)``, the token itself where it is supervised, ``IGNORED_LABEL`` elsewhere.
        pixel_values: ``(N, 3, S, S)`` in -1..1.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor


class Processor:
    """Turns conversations into what :class:`vila_m3.model.VilaM3` reads.

    Args:
        tokenizer: a fast tokenizer.
        image_size: side of the vision tower's square input in pixels.
        tokens_per_image: places that one image takes.
        template: the chat template.
        max_length: longest sequence in tokens.
    """

    def __init__(
        self, tokenizer: Tokenizer, image_size: int, tokens_per_image: int, template: ChatTemplate, max_length: int
    ) -> None:
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.tokens_per_image = tokens_per_image
        self.template = template
        self.max_length = max_length
        stops = (tokenizer.token_to_id(text) for text in (template.stop, template.final_end))
        self.stop_ids: frozenset[int] = frozenset(stop for stop in stops if stop is not None)

    def __call__(self, conversation: Conversation) -> Encoded:
        """Encode a conversation for training or generation (see :func:`render`).

        Raises:
            UserError: if it is longer than the model's context.
        """
        rendered = render(conversation, self.template)
        input_ids, labels = self.encode_text(rendered)
        if len(input_ids) > self.max_length:
            raise UserError(
                f"the conversation has {len(input_ids)} tokens, the model reads {self.max_length}; "
                "start a new conversation"
            )
        images = conversation.images
        if input_ids.count(IMAGE_TOKEN_ID) != len(images) * self.tokens_per_image:
            raise UserError(f"{len(images)} images do not fit the {IMAGE_TOKEN} placeholders of the conversation")
        return Encoded(torch.tensor(input_ids), torch.tensor(labels), self.encode_images(images))

    def encode_text(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        """Tokenize each chunk between image placeholders alone; expand every placeholder."""
        supervised = np.zeros(len(rendered.text) + 1, dtype=bool)
        for start, end in rendered.spans:
            supervised[start:end] = True
        input_ids: list[int] = []
        labels: list[int] = []
        position = 0
        for index, chunk in enumerate(rendered.text.split(IMAGE_TOKEN)):
            if index:
                input_ids += [IMAGE_TOKEN_ID] * self.tokens_per_image
                labels += [IGNORED_LABEL] * self.tokens_per_image
                position += len(IMAGE_TOKEN)
            encoding = self.tokenizer.encode(chunk, add_special_tokens=False)
            input_ids += encoding.ids
            labels += [
                token if supervised[position + start] else IGNORED_LABEL
                for token, (start, _) in zip(encoding.ids, encoding.offsets, strict=True)
            ]
            position += len(chunk)
        return input_ids, labels

    def encode_images(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """RGB images ``(H, W, 3)`` uint8 -> ``(N, 3, S, S)`` in -1..1."""
        if not images:
            return torch.zeros((0, 3, self.image_size, self.image_size))
        return torch.stack([to_pixel_values(image, self.image_size) for image in images])

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of generated tokens, without control tokens."""
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def to_pixel_values(image: np.ndarray, size: int) -> torch.Tensor:
    """Resize to a square (bicubic, horizontal pass first, as the reference's Pillow did) and scale to -1..1.

    Pillow 13 chooses the order of the passes by cost and then differs by up to 16/255; two calls fix it.
    """
    picture = Image.fromarray(np.ascontiguousarray(image))
    wide = picture.resize((size, picture.height), Image.Resampling.BICUBIC)
    square = np.asarray(wide.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return torch.from_numpy((square / 255.0 - 0.5) / 0.5).permute(2, 0, 1)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load ``tokenizer.json`` of a checkpoint's ``llm/`` folder."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path} is missing; the checkpoint's llm folder needs its tokenizer")
    return Tokenizer.from_file(str(path))


def build_processor(tokenizer: Tokenizer, model: VilaM3) -> Processor:
    """Make the processor that fits a model.

    Args:
        tokenizer: the tokenizer of its LLM.
        model: the model.
    """
    return Processor(
        tokenizer,
        model.image_size,
        model.tokens_per_image,
        get_template(model.chat_template),
        model.max_length,
    )
