"""Pieces of the training configs: data set, collation, loss, metric, starting point, export."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.inferers import Inferer
from tokenizers import Tokenizer
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerBase

from vila_m3_common.chat_template import get_template, render
from vila_m3_common.errors import UserError

from .checkpoint import load_checkpoint, load_processor, read_config, resolve_checkpoint
from .configuration import IGNORED_LABEL, VilaM3Config
from .export import save_released
from .likeness import look_for_likeness
from .model import VilaM3ForConditionalGeneration, build_model
from .nano_tokenizer import relate_phrases, train_tokenizer, wrap_tokenizer
from .packing import pad_rows
from .phantom_conversations import ConversationMaker, build_pool
from .processor import Encoded, VilaM3Processor, build_processor, pad_prompts
from .tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

PAD_ID = 0


def read_cards(path: str | Path) -> str:
    """Read the model cards that stand before the first question."""
    return Path(path).read_text()


def start_model(
    config: Mapping[str, Any],
    checkpoint: str | None,
    tokenizer: PreTrainedTokenizerBase,
    device: str | torch.device = "cpu",
    is_shape_only: bool = False,
) -> VilaM3ForConditionalGeneration:
    """Return the model to train: the checkpoint's, or a new one with random weights when there is none.

    Args:
        config: of a new model.
        checkpoint: folder, or a Hugging Face id.
        tokenizer: of a new model.
        device: where its weights are.
        is_shape_only: whether to read no weights, as another process has them.
    """
    if is_shape_only:
        shape = read_config(resolve_checkpoint(checkpoint)) if checkpoint else VilaM3Config(**config)
        with init_empty_weights(include_buffers=False):
            return VilaM3ForConditionalGeneration(shape).train()
    if checkpoint:
        return load_checkpoint(checkpoint, device, torch.float32).train()
    model = build_model(dict(config))
    relate_phrases(model.get_input_embeddings(), tokenizer.backend_tokenizer)
    look_for_likeness(model.llm)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers wraps nn.Module.to
    return model


def start_tokenizer(
    checkpoint: str | None, maker: ConversationMaker | None, vocabulary_size: int, template: str, ckpt_dir: str
) -> PreTrainedTokenizerBase:
    """Return the checkpoint's tokenizer, or train a small one on conversations of the maker.

    A new one is kept in ``ckpt_dir``, where a resumed training finds it: the embeddings it learnt belong to
    these tokens, and another mixture of conversations would give others.

    Raises:
        UserError: if there is neither a checkpoint, nor a tokenizer in ``ckpt_dir``, nor a maker.
    """
    if checkpoint:
        return load_processor(checkpoint).tokenizer
    if (Path(ckpt_dir) / "tokenizer.json").is_file():
        return load_tokenizer(ckpt_dir)
    if maker is None:
        raise UserError(
            "there is no model to start from; give --start_checkpoint the folder of a checkpoint or of the stage "
            "before, or make one with configs/new_model.json"
        )
    texts = (render(maker(seed).conversation, get_template(template)).text for seed in range(3000))
    tokenizer = fit_tokenizer((text.replace(maker.cards, "") for text in texts), maker.cards, vocabulary_size)
    wrap_tokenizer(tokenizer).save_pretrained(ckpt_dir)
    return load_tokenizer(ckpt_dir)


def fit_tokenizer(texts: Iterable[str], cards: str, vocabulary_size: int) -> Tokenizer:
    """Train a small tokenizer (see :func:`vila_m3.nano_tokenizer.train_tokenizer`).

    Raises:
        UserError: if its phrases alone need more tokens.
    """
    tokenizer = train_tokenizer(texts, cards, vocabulary_size)
    if tokenizer.get_vocab_size() > vocabulary_size:
        raise UserError(f"the tokenizer needs {tokenizer.get_vocab_size()} tokens, the model has {vocabulary_size}")
    return tokenizer


def make_processor(tokenizer: PreTrainedTokenizerBase, model: VilaM3ForConditionalGeneration) -> VilaM3Processor:
    """Return the processor that fits a model."""
    return build_processor(tokenizer, model.config)


def make_conversations(volume_count: int, first_seed: int, cards: str, held_out: bool = False) -> ConversationMaker:
    """Draw a pool of phantoms and return the maker of conversations about them.

    Args:
        volume_count: phantoms per modality.
        first_seed: seeds of training and validation must not overlap.
        cards: text of the model cards.
        held_out: whether to use only question wordings that training never sees.
    """
    return ConversationMaker(build_pool(volume_count, first_seed), cards, held_out)


class ConversationDataset(Dataset):
    """Encoded conversations; item ``i`` always is the conversation of seed ``first_seed + i``.

    Args:
        maker: makes a conversation from a seed.
        processor: encodes it.
        count: number of items.
        first_seed: seed of item 0.
    """

    def __init__(self, maker: ConversationMaker, processor: VilaM3Processor, count: int, first_seed: int = 0) -> None:
        self.maker = maker
        self.processor = processor
        self.count = count
        self.first_seed = first_seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Encoded:
        if index >= self.count:
            raise IndexError(index)
        return self.processor.encode(self.maker(self.first_seed + index).conversation)

    def length(self, index: int) -> int:
        """Return the number of tokens of an item without touching its images."""
        conversation = self.maker(self.first_seed + index).conversation
        return len(self.processor.encode_text(render(conversation, self.processor.template))[0])


class LengthGroupedBatches(Sampler[list[int]]):
    """Batches of items of like length, so that little is padding; every item once, in a seeded order.

    Args:
        dataset: tells the length of each item.
        batch_size: items in a batch.
        seed: of the order.
        group_size: how many batches are sorted by length together.
    """

    def __init__(self, dataset: ConversationDataset, batch_size: int, seed: int = 0, group_size: int = 8) -> None:
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.group_size = group_size

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(self.seed)
        order = rng.sample(range(len(self.dataset)), len(self) * self.batch_size)
        chunk = self.batch_size * self.group_size
        for start in range(0, len(order), chunk):
            group = sorted(order[start : start + chunk], key=self.dataset.length)
            batches = [group[first : first + self.batch_size] for first in range(0, len(group), self.batch_size)]
            rng.shuffle(batches)
            yield from batches


def collate(items: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    """Pad a batch on the right; images of all rows follow each other.

    Two rows of 5 and 7 tokens with one and four images become ``input_ids`` (2, 7),
    ``attention_mask`` (2, 7) with two zeros in row 0, ``labels`` (2, 7) and ``pixel_values`` (5, 3, S, S).
    """
    return {
        **pad_prompts([item.input_ids for item in items], PAD_ID, "right"),
        "labels": pad_rows([item.labels for item in items], IGNORED_LABEL),
        "pixel_values": torch.cat([item.pixel_values for item in items]),
    }


class LogitsInferer(Inferer):
    """Runs the model and keeps the logits alone, which MONAI's engines hand to loss and metrics."""

    def __call__(
        self, inputs: torch.Tensor, network: VilaM3ForConditionalGeneration, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """``input_ids`` ``(B, L)`` -> logits ``(B, L, vocabulary)``."""
        return network(inputs, *args, use_cache=False, **kwargs).logits


def prepare_batch(
    batch: Mapping[str, torch.Tensor], device: str | torch.device, non_blocking: bool = False, **_: Any
) -> tuple[torch.Tensor, torch.Tensor, tuple[()], dict[str, torch.Tensor | None]]:
    """Split a collated batch the way MONAI's engines want it: inputs, targets, args, kwargs."""
    moved = {key: value.to(device, non_blocking=non_blocking) for key, value in batch.items()}
    pixel_values = moved["pixel_values"] if len(moved["pixel_values"]) else None
    return (
        moved["input_ids"],
        moved["labels"],
        (),
        {"pixel_values": pixel_values, "attention_mask": moved["attention_mask"]},
    )


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every supervised token given those before it.

    Args:
        logits: ``(B, L, V)``.
        labels: ``(B, L)``.
    """
    kept = labels[:, 1:] != IGNORED_LABEL
    return torch.nn.functional.cross_entropy(logits[:, :-1][kept].float(), labels[:, 1:][kept])


class ReplyAccuracy(Metric):
    """Share of assistant turns that greedy decoding would reproduce word for word, given what came before.

    A turn counts when the largest logit is right at every one of its tokens. Its end counts as right when
    any of the template's stop tokens is predicted: which of them follows depends on whether the conversation
    goes on, and nobody can know that.

    Args:
        stop_ids: token ids that end a turn.
        output_transform: picks (logits, labels) out of the engine's output.
    """

    def __init__(
        self, stop_ids: Iterable[int] = (), output_transform: Callable[[Any], Any] = lambda output: output
    ) -> None:
        self.stop_ids = sorted(stop_ids)
        super().__init__(output_transform)

    def reset(self) -> None:
        """Forget everything counted."""
        self._right = 0
        self._count = 0

    def update(self, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Count the turns of a batch of logits ``(B, L, V)`` and labels ``(B, L)``."""
        logits, labels = output
        targets = labels[:, 1:]
        is_right = tokens_right(logits[:, :-1].argmax(-1), targets, self.stop_ids)
        for row, row_targets in zip(is_right, targets, strict=True):
            for start, end in supervised_runs(row_targets):
                self._right += int(row[start:end].all())
                self._count += 1

    def compute(self) -> float:
        """Return the share, 0..1."""
        return self._right / max(1, self._count)


def tokens_right(predicted: torch.Tensor, targets: torch.Tensor, stop_ids: Sequence[int]) -> torch.Tensor:
    """Compare token ids of any shape; all stop tokens count as one."""
    stops = torch.tensor(list(stop_ids), dtype=targets.dtype, device=targets.device)
    return (predicted == targets) | (torch.isin(predicted, stops) & torch.isin(targets, stops))


def supervised_runs(targets: torch.Tensor) -> list[tuple[int, int]]:
    """Return start and end of every run of supervised positions in ``(L,)``."""
    kept = (targets != IGNORED_LABEL).int()
    edges = torch.diff(kept, prepend=kept.new_zeros(1), append=kept.new_zeros(1))
    starts = (edges == 1).nonzero()[:, 0].tolist()
    ends = (edges == -1).nonzero()[:, 0].tolist()
    return list(zip(starts, ends, strict=True))


def logits_and_labels(output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Pick what :class:`ReplyAccuracy` needs out of a MONAI engine's output."""
    return output["pred"], output["label"]


class CheckpointExporter:
    """Handler that writes the model and its tokenizer as a checkpoint folder when training ends.

    Args:
        model: the trained model.
        processor: its processor.
        folder: where to.
        dtype: precision of the stored tensors.
    """

    def __init__(
        self, model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, folder: str, dtype: str = "float16"
    ) -> None:
        self.model = model
        self.processor = processor
        self.folder = Path(folder)
        self.dtype: torch.dtype = getattr(torch, dtype)

    def attach(self, engine: Engine) -> None:
        """Write after every epoch, so that a stopped training leaves a usable checkpoint."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the checkpoint."""
        save_released(self.model, self.processor, self.folder, self.dtype)
        logger.info("wrote %s", self.folder)
