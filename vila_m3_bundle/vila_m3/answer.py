"""Conversation -> stream of text: greedy generation with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.cache_utils import DynamicCache

from vila_m3_common.conversation import Conversation

from .model import VilaM3, load_model
from .processor import Processor, build_processor, load_tokenizer


class Answerer:
    """Answers conversations with one model; the ``answer`` hook of the bundle.

    Args:
        model: the VLM.
        processor: its processor.
        max_new_tokens: longest answer in tokens.
    """

    def __init__(self, model: VilaM3, processor: Processor, max_new_tokens: int = 256) -> None:
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens

    def __call__(self, conversation: Conversation) -> Iterator[str]:
        """Yield the next assistant turn piece by piece; the pieces join to the whole text."""
        emitted = ""
        token_ids: list[int] = []
        for token_id in self.generate(conversation):
            token_ids.append(token_id)
            text = self.processor.decode(token_ids)
            if text.endswith("\ufffd"):
                continue  # half a character; wait for its other bytes
            yield text[len(emitted) :]
            emitted = text

    @torch.inference_mode()
    def generate(self, conversation: Conversation) -> Iterator[int]:
        """Yield token ids greedily until the template's stop token or ``max_new_tokens``."""
        encoded = self.processor(conversation)
        device = self.model.device
        features = None
        if len(encoded.pixel_values):
            features = self.model.encode_images(encoded.pixel_values.to(device))
        embeddings = self.model.embed(encoded.input_ids[None].to(device), features)
        cache = DynamicCache(config=self.model.llm.config)
        embed_token = self.model.llm.get_input_embeddings()
        room = self.model.max_length - embeddings.shape[1]
        for _ in range(min(self.max_new_tokens, room)):
            token = self.model.step(embeddings, cache).argmax()
            if int(token) in self.processor.stop_ids:
                return
            yield int(token)
            embeddings = embed_token(token[None, None])


def open_answerer(checkpoint: str | Path, device: str | torch.device = "cpu", max_new_tokens: int = 256) -> Answerer:
    """Load a checkpoint folder and make it answer.

    Args:
        checkpoint: folder with ``config.json``, ``llm/``, ``vision_tower/`` and ``mm_projector/``.
        device: where it runs.
        max_new_tokens: longest answer in tokens.
    """
    model = load_model(checkpoint, device)
    tokenizer = load_tokenizer(Path(checkpoint) / "llm")
    return Answerer(model, build_processor(tokenizer, model), max_new_tokens)
