"""Conversation -> tensors: chat template, tokenizer, image places, labels, pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from vila_m3_common.chat_template import ChatTemplate, Rendered, get_template, render
from vila_m3_common.conversation import IMAGE_TOKEN, Conversation
from vila_m3_common.errors import UserError

from .configuration import IGNORED_LABEL, IMAGE_TOKEN_ID, VilaM3Config
from .image_processor import Picture, VilaM3ImageProcessor, as_tensor, image_processor_for
from .packing import expand_image_places, pad_rows
from .tokenizer import encode_with_offsets


@dataclass(frozen=True)
class Encoded:
    """One conversation as tensors.

    Args:
        input_ids: ``(L,)`` with ``IMAGE_TOKEN_ID`` at every visual token.
        labels: ``(L,)``, the token itself where it is supervised, ``IGNORED_LABEL`` elsewhere.
        pixel_values: ``(N, 3, S, S)``.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    pixel_values: torch.Tensor


class VilaM3Processor(ProcessorMixin):
    """Turns conversations, or prompts with pictures, into what the model reads.

    Args:
        image_processor: makes pixel values.
        tokenizer: of the LLM.
        template_name: of the chat template.
        tokens_per_image: places that one image takes.
        context_length: longest sequence in tokens.
        drops_chunk_starts: see :class:`vila_m3.configuration.VilaM3Config`.
    """

    def __init__(
        self,
        image_processor: VilaM3ImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        template_name: str = "llama_3",
        tokens_per_image: int = 196,
        context_length: int = 4096,
        drops_chunk_starts: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_processor, tokenizer, **kwargs)
        self.template_name = template_name
        self.tokens_per_image = tokens_per_image
        self.context_length = context_length
        self.drops_chunk_starts = drops_chunk_starts

    @property
    def template(self) -> ChatTemplate:
        """The chat template."""
        return get_template(self.template_name)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Token ids that end a turn: the template's, and the tokenizer's end token."""
        found = {self._token_id(text) for text in (self.template.stop, self.template.final_end)}
        return frozenset(token for token in {*found, self.tokenizer.eos_token_id} if token is not None)

    def _token_id(self, text: str) -> int | None:
        token = self.tokenizer.convert_tokens_to_ids(text)
        return token if token is not None and self.tokenizer.convert_ids_to_tokens(token) == text else None

    def __call__(
        self,
        images: Picture | Sequence[Picture] | None = None,
        text: str | Sequence[str] | None = None,
        padding_side: str = "left",
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Turn rendered prompts and their pictures into a batch, the way transformers' processors do.

        Args:
            images: pictures of all prompts, in the order of their placeholders.
            text: one or more prompts with ``<image>`` placeholders, already in the chat template's form.
            padding_side: ``left`` to generate, ``right`` to train.
            return_tensors: only ``pt``.
            kwargs: ignored; transformers passes its own.

        Returns:
            ``input_ids`` and ``attention_mask`` ``(B, L)``, ``pixel_values`` ``(N, 3, S, S)``.

        Raises:
            UserError: if placeholders and pictures differ in number, or a prompt is too long or empty.
        """
        prompts = [text] if isinstance(text, str) else list(text or [])
        pictures = _picture_list(images)
        placeholder_count = sum(prompt.count(IMAGE_TOKEN) for prompt in prompts)
        if placeholder_count != len(pictures):
            raise UserError(f"{len(pictures)} images were given for {placeholder_count} {IMAGE_TOKEN} placeholders")
        rows = [torch.tensor(self.encode_prompt(prompt)) for prompt in prompts]
        batch = pad_prompts(rows, self.pad_id, padding_side)
        batch["pixel_values"] = as_tensor(pictures, self.image_processor)
        return BatchFeature(batch, tensor_type=return_tensors)

    @property
    def pad_id(self) -> int:
        """Token id at padding; the attention mask hides it."""
        return int(self.tokenizer.pad_token_id or 0)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Tokenize a rendered prompt; every image takes ``tokens_per_image`` places.

        Raises:
            UserError: if it is empty or longer than the context.
        """
        if not prompt.strip():
            raise UserError("the prompt is empty; ask something")
        tokens, _ = self.encode_text(Rendered(prompt, ()))
        self._check_length(len(tokens))
        return tokens

    def encode(self, conversation: Conversation) -> Encoded:
        """Encode a conversation for training or generation (see :func:`render`).

        Raises:
            UserError: if it is empty, longer than the model's context, or its images do not fit its placeholders.
        """
        input_ids, labels = self.tokenize(conversation)
        pixel_values = as_tensor(conversation.images, self.image_processor)
        return Encoded(torch.tensor(input_ids), torch.tensor(labels), pixel_values)

    def tokenize(self, conversation: Conversation) -> tuple[list[int], list[int]]:
        """Return what :meth:`encode` makes of the text: token ids with every visual token in its place, and labels."""
        if not conversation.context:
            raise UserError("the conversation is empty; add a user turn")
        input_ids, labels = self.encode_text(render(conversation, self.template))
        self._check_length(len(input_ids))
        image_count = len(conversation.images)
        if input_ids.count(IMAGE_TOKEN_ID) != image_count * self.tokens_per_image:
            raise UserError(f"{image_count} images do not fit the {IMAGE_TOKEN} placeholders of the conversation")
        return input_ids, labels

    def _check_length(self, length: int) -> None:
        if length > self.context_length:
            raise UserError(
                f"the conversation has {length} tokens, the model reads {self.context_length}; start a new conversation"
            )

    def encode_text(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        """Tokenize each chunk between image placeholders alone; expand every placeholder.

        Returns:
            Token ids and labels, one per token.
        """
        tokens, labels = self.tokenize_chunks(rendered)
        return expand_image_places(tokens, self.tokens_per_image, labels)

    def tokenize_chunks(self, rendered: Rendered) -> tuple[list[int], list[int]]:
        """Tokenize each chunk between image placeholders alone, as VILA does.

        When the first chunk begins with the start token, the first token of every later chunk is dropped, which
        is meant for the start token that the tokenizer adds there again. A tokenizer that adds none loses a
        token of the text, in training as in use; released weights expect that.

        Returns:
            Token ids with one ``IMAGE_TOKEN_ID`` per image, and labels.
        """
        supervised = np.zeros(len(rendered.text) + 1, dtype=bool)
        for start, end in rendered.spans:
            supervised[start:end] = True
        tokens: list[int] = []
        labels: list[int] = []
        position, skipped = 0, 0
        for index, chunk in enumerate(rendered.text.split(IMAGE_TOKEN)):
            ids, ends = encode_with_offsets(self.tokenizer, chunk)
            if index == 0 and self.drops_chunk_starts and ids and ids[0] == self.tokenizer.bos_token_id:
                skipped = 1
            if index > 0:
                tokens.append(IMAGE_TOKEN_ID)
                labels.append(IGNORED_LABEL)
                ids, ends = ids[skipped:], ends[skipped:]
                position += len(IMAGE_TOKEN)
            # A token belongs to the reply when its last character does.
            tokens += ids
            labels += [
                token if end > 0 and supervised[position + end - 1] else IGNORED_LABEL
                for token, end in zip(ids, ends, strict=True)
            ]
            position += len(chunk)
        return tokens, labels

    def decode(self, token_ids: Sequence[int], **kwargs: Any) -> str:
        """Return the text of generated tokens, without control tokens."""
        return str(self.tokenizer.decode(list(token_ids), **{"skip_special_tokens": True, **kwargs}))


def _picture_list(images: Picture | Sequence[Picture] | None) -> list[Picture]:
    if images is None:
        return []
    return list(images) if isinstance(images, Sequence) else [images]


def pad_prompts(rows: Sequence[torch.Tensor], pad_id: int, side: str) -> dict[str, torch.Tensor]:
    """Pad token ids ``(L_i,)`` to ``input_ids`` and ``attention_mask`` ``(B, L)``."""
    return {
        "input_ids": pad_rows(rows, pad_id, side),
        "attention_mask": pad_rows([torch.ones_like(row) for row in rows], 0, side),
    }


def build_processor(tokenizer: PreTrainedTokenizerBase, config: VilaM3Config) -> VilaM3Processor:
    """Make the processor that fits a model.

    Args:
        tokenizer: the tokenizer of its LLM.
        config: of the model.
    """
    return VilaM3Processor(
        image_processor_for(config),
        tokenizer,
        template_name=config.chat_template,
        tokens_per_image=config.tokens_per_image,
        context_length=config.context_length,
        drops_chunk_starts=config.drops_chunk_starts,
    )


AutoProcessor.register(VilaM3Config, VilaM3Processor, exist_ok=True)
