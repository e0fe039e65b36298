"""Creates the checkpoint that a training from scratch starts from: random weights, and a tokenizer for its texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vila_m3_common.conversation import IMAGE_TOKEN
from vila_m3_common.errors import UserError, exits_with_message

from .data.mixture import IndexedJsonl
from .export import save_released
from .nano_tokenizer import wrap_tokenizer
from .training import fit_tokenizer, make_processor, start_model


def read_texts(files: Sequence[str | Path], cards: str) -> Iterator[str]:
    """Yield the turns of prepared conversations, without the model cards and image placeholders."""
    for file in files:
        rows = IndexedJsonl(file)
        for index in range(len(rows)):
            for message in rows[index].messages:
                yield message.text.replace(cards, "").replace(IMAGE_TOKEN, "")


@exits_with_message
def create_model(
    config: Mapping[str, Any],
    files: Sequence[str | Path],
    cards: str,
    vocabulary_size: int,
    output_dir: str | Path,
    seed: int = 0,
) -> None:
    """Write a new checkpoint in the released layout, which ``--start_checkpoint`` of a training takes.

    Args:
        config: arguments of :class:`vila_m3.configuration.VilaM3Config`; its vocabulary is ``vocabulary_size``.
        files: JSONL files of the conversations that will be trained on.
        cards: text of the model cards, whose lines become tokens.
        vocabulary_size: most tokens of the tokenizer.
        output_dir: folder of the checkpoint.
        seed: of the weights.

    Raises:
        UserError: if there are no files, one cannot be read, or the vocabulary is too small.
    """
    if not files:
        raise UserError("no texts are given to make a tokenizer of; name the JSONL files of the training as files")
    tokenizer = wrap_tokenizer(fit_tokenizer(read_texts(files, cards), cards, vocabulary_size))
    torch.manual_seed(seed)
    text_config = {**config["text_config"], "vocab_size": vocabulary_size}
    model = start_model({**config, "text_config": text_config}, None, tokenizer)
    save_released(model, make_processor(tokenizer, model), output_dir)
    counts = {part: sum(value.numel() for value in getattr(model, part).parameters()) for part in _PARTS}
    described = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    print(f"{output_dir}: {len(tokenizer):,} tokens; {sum(counts.values()):,} parameters ({described})")


_PARTS = ("llm", "vision_tower", "mm_projector")
