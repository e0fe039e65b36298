"""Conversation -> text: streaming generation whose key-value cache lives on from turn to turn."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError

from .configuration import IMAGE_TOKEN_ID
from .image_processor import as_tensor
from .model import VilaM3ForConditionalGeneration
from .packing import pad_rows
from .processor import VilaM3Processor

logger = logging.getLogger(__name__)

# Of batches: images whose features are kept (100 MB of the 8B model), and places that are worth a pass of their own.
RECENT_IMAGES = 64
WORTHWHILE_PREFIX = 16

StopReason = Literal["stop token", "max_new_tokens", "context", "abandoned"]
# One place of a sequence: a token id, or (digest of an image, which of its tokens).
Place = int | tuple[str, int]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token; larger values make unlikely ones likelier.
        top_p: only the likeliest tokens that together have this probability.
        top_k: only this many of the likeliest tokens; 0 for all.
        seed: of the random numbers.

    Raises:
        UserError: for values out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise UserError(f"temperature {self.temperature} is negative; 0 is greedy, 0.2 to 1 samples")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is out of range; give more than 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k {self.top_k} is negative; 0 keeps all tokens")

    def chooser(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return a function from logits ``(vocabulary,)`` to a token id ``()``."""
        if self.temperature == 0:
            return lambda logits: logits.argmax()
        # The warpers look at the scores alone.
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        random = torch.Generator().manual_seed(self.seed)

        def choose(logits: torch.Tensor) -> torch.Tensor:
            scores = warpers(torch.LongTensor(1, 0), logits[None].float())
            return torch.multinomial(scores.softmax(-1)[0].cpu(), 1, generator=random)[0].to(logits.device)

        return choose


@dataclass
class AnswerReport:
    """What one answer took.

    Args:
        prompt_token_count: tokens of the conversation, images included.
        reused_token_count: of these, taken from the cache of earlier turns.
        encoded_image_count: images that went through the vision tower.
        new_token_count: tokens generated, without the stop token.
        stop_reason: why it ended.
        first_token_seconds: time until the first token was chosen.
        seconds: time in all.
    """

    prompt_token_count: int = 0
    reused_token_count: int = 0
    encoded_image_count: int = 0
    new_token_count: int = 0
    stop_reason: StopReason = "abandoned"
    first_token_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Answered:
    """One answer of a batch.

    Args:
        text: what was said.
        stop_reason: why it ended.
        new_token_count: its length in tokens, without the stop token.
        confidence: the model's probability of this very answer, stop token included; None when it was sampled.
    """

    text: str
    stop_reason: StopReason
    new_token_count: int
    confidence: float | None = None

    @property
    def is_cut(self) -> bool:
        """Whether the answer was cut off before its end."""
        return self.stop_reason != "stop token"


def cut_notes(ended: AnswerReport | Answered, context_length: int) -> list[str]:
    """Say that an answer was cut off, where it was; ``context_length`` is what the model reads, in tokens."""
    if ended.stop_reason == "max_new_tokens":
        return [f"The answer was cut off after {ended.new_token_count} tokens (max_new_tokens)."]
    if ended.stop_reason == "context":
        return [f"The answer was cut off: the model reads {context_length} tokens in all."]
    return []


@dataclass
class _Kept:
    """A conversation whose keys and values are kept: ``places[i]`` is what position ``i`` of the cache holds."""

    cache: DynamicCache
    places: list[Place] = field(default_factory=list)


@dataclass
class _Generated:
    """Tokens of one row of a batch, and the logarithm of the probability of them all."""

    ids: list[int] = field(default_factory=list)
    log_probability: float = 0.0

    def add(self, token: int, log_probability: float) -> None:
        self.ids.append(token)
        self.log_probability += log_probability


class Answerer:
    """Answers conversations with one model; the ``answer`` hook of the bundle.

    Only what a conversation adds to an earlier one is encoded: the turn after an expert's feedback reads neither
    the model cards nor the first image again.

    Args:
        model: the VLM.
        processor: its processor.
        max_new_tokens: longest answer in tokens.
        sampling: how tokens are chosen; None is greedy.
        kept_conversations: how many conversations keep their cache; 0 encodes everything anew.
    """

    def __init__(
        self,
        model: VilaM3ForConditionalGeneration,
        processor: VilaM3Processor,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        kept_conversations: int = 1,
    ) -> None:
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens {max_new_tokens} leaves no room for an answer; give at least 1")
        self.model = model
        self.processor = processor
        self.max_new_tokens = max_new_tokens
        self.sampling = sampling or Sampling()
        self.kept_conversations = kept_conversations
        self.report = AnswerReport()
        self.stop_ids = processor.stop_ids | eos_ids(model)
        self._kept: list[_Kept] = []
        self._features: dict[str, torch.Tensor] = {}
        # Of batches: what the last ones began with, and the features of their images, the oldest first.
        self._prefix = _Kept(DynamicCache(config=model.config.text_config))
        self._recent: dict[str, torch.Tensor] = {}

    @property
    def notes(self) -> list[str]:
        """What a reader must know about the last answer: that it was cut off."""
        return cut_notes(self.report, self.model.context_length)

    def __call__(self, conversation: Conversation) -> Iterator[str]:
        """Yield the next assistant turn piece by piece; the pieces join to the whole text.

        Raises:
            UserError: if the conversation is empty, too long, or ends with an assistant turn.
        """
        emitted = ""
        token_ids: list[int] = []
        for token_id in self.generate(conversation):
            token_ids.append(token_id)
            text = self.processor.decode(token_ids)
            if text.endswith("\ufffd"):
                continue  # half a character; wait for its other bytes
            yield text[len(emitted) :]
            emitted = text
        rest = self.processor.decode(token_ids)[len(emitted) :]
        if rest:
            yield rest
        for note in self.notes:
            logger.warning(note)

    @torch.inference_mode()
    def generate(self, conversation: Conversation) -> Iterator[int]:
        """Yield token ids until a stop token, ``max_new_tokens`` or the end of the context."""
        start = time.perf_counter()
        self.report = report = AnswerReport()
        kept, embeddings = self._prepare(conversation)
        choose = self.sampling.chooser()
        room = self.model.context_length - report.prompt_token_count
        limit = min(self.max_new_tokens, room)
        report.stop_reason = "max_new_tokens" if limit == self.max_new_tokens else "context"
        embed_token = self.model.get_input_embeddings()
        try:
            for _ in range(limit):
                token = choose(self._step(embeddings, kept.cache))
                token_id = int(token)
                report.first_token_seconds = report.first_token_seconds or time.perf_counter() - start
                if token_id in self.stop_ids:
                    report.stop_reason = "stop token"
                    return
                report.new_token_count += 1
                yield token_id
                embeddings = embed_token(token[None, None])
                kept.places.append(token_id)
        except GeneratorExit:
            report.stop_reason = "abandoned"
            raise
        finally:
            report.seconds = time.perf_counter() - start
            del kept.places[kept.cache.get_seq_length() :]

    def _step(self, embeddings: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Feed ``(1, L, hidden)`` after what ``cache`` holds; return the last logits ``(vocabulary,)``."""
        outputs = self.model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return outputs.logits[0, -1]

    def _prepare(self, conversation: Conversation) -> tuple[_Kept, torch.Tensor]:
        """Find the kept conversation that this one continues, and embed what is new."""
        input_ids = self.tokenize(conversation)
        digests = [digest_of(image) for image in conversation.images]
        images = dict(zip(digests, conversation.images, strict=True))
        places = _places(input_ids, digests, self.processor.tokens_per_image)
        kept, shared = self._continue(places)
        self.report.prompt_token_count = len(places)
        self.report.reused_token_count = shared
        embeddings = self._embed(places[shared:], images)
        kept.places += places[shared:]
        return kept, embeddings

    def _continue(self, places: Sequence[Place]) -> tuple[_Kept, int]:
        """Return a kept conversation, cut to what it shares with this one, and how much that is.

        The last place is always encoded again, because its logits choose the first token.
        """
        lengths = [min(_shared_length(kept.places, places), len(places) - 1) for kept in self._kept]
        best = max(range(len(lengths)), key=lengths.__getitem__, default=None)
        is_full = len(self._kept) >= self.kept_conversations
        if best is None or not (is_full or 2 * lengths[best] > len(self._kept[best].places)):
            shared, kept = 0, _Kept(DynamicCache(config=self.model.config.text_config))
        else:
            shared, kept = lengths[best], self._kept.pop(best)
            surplus = kept.cache.get_seq_length() - shared
            if surplus:
                kept.cache.crop(-surplus)
            del kept.places[shared:]
        if self.kept_conversations:
            self._kept = [*self._kept, kept][-self.kept_conversations :]
        self._forget_features(places)
        return kept, shared

    def _forget_features(self, places: Sequence[Place]) -> None:
        sequences = [places, *(kept.places for kept in self._kept)] if self.kept_conversations else []
        used = {place[0] for sequence in sequences for place in sequence if isinstance(place, tuple)}
        self._features = {digest: value for digest, value in self._features.items() if digest in used}

    def _embed(self, places: Sequence[Place], images: Mapping[str, np.ndarray]) -> torch.Tensor:
        """Embed places ``(1, L, hidden)``; images whose features are not known go through the tower."""
        needed = dict.fromkeys(place[0] for place in places if isinstance(place, tuple))
        fresh = [digest for digest in needed if digest not in self._features]
        self._features.update(self._encode_images({digest: images[digest] for digest in fresh}))
        rows = [self._features[place[0]][place[1]] for place in places if isinstance(place, tuple)]
        ids = [IMAGE_TOKEN_ID if isinstance(place, tuple) else place for place in places]
        input_ids = torch.tensor([ids], device=self.model.device)
        return self.model.embed(input_ids, torch.stack(rows)[None] if rows else None)

    def _encode_images(self, images: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Return the features of each image, ``(tokens_per_image, hidden)``."""
        self.report.encoded_image_count = len(images)
        if not images:
            return {}
        pixels = as_tensor(list(images.values()), self.processor.image_processor)
        return dict(zip(images, self.model.encode_images(pixels), strict=True))

    def tokenize(self, conversation: Conversation) -> list[int]:
        """Tokenize a conversation that the model shall answer.

        Raises:
            UserError: if it is empty, too long, or ends with an assistant turn.
        """
        if conversation.context and conversation.context[-1].role == "assistant":
            raise UserError("the conversation ends with an assistant turn; add a user turn for the model to answer")
        return self.processor.tokenize(conversation)[0]

    @torch.inference_mode()
    def answer_batch(self, conversations: Sequence[Conversation]) -> list[Answered]:
        """Answer several conversations at once.

        What all of them begin with (system text, model cards, perhaps an image) is read once and kept for the next
        batch, and so are the features of the last images. A row that has ended leaves the batch.

        Returns:
            The answers, in order, each as alone. :attr:`report` tells of the whole batch.

        Raises:
            UserError: if one of the conversations is empty, too long, or ends with an assistant turn.
        """
        if not conversations:
            return []
        start = time.perf_counter()
        self.report = report = AnswerReport()
        rows, images = self._rows_of(conversations)
        features = self._recent_features(images)
        cache, shared = self._begin_batch(rows, features)
        report.prompt_token_count, report.reused_token_count = sum(map(len, rows)), shared * len(rows)
        limits = [min(self.max_new_tokens, self.model.context_length - len(row)) for row in rows]
        generated = self._decode([row[shared:] for row in rows], shared, features, cache, limits)
        answers = [self._answered(row, limit) for row, limit in zip(generated, limits, strict=True)]
        report.new_token_count = sum(answer.new_token_count for answer in answers)
        report.stop_reason = next((answer.stop_reason for answer in answers if answer.is_cut), "stop token")
        report.seconds = time.perf_counter() - start
        return answers

    def _rows_of(self, conversations: Sequence[Conversation]) -> tuple[list[list[Place]], dict[str, np.ndarray]]:
        rows: list[list[Place]] = []
        images: dict[str, np.ndarray] = {}
        pictures = {id(image): image for conversation in conversations for image in conversation.images}
        names = {key: digest_of(image) for key, image in pictures.items()}
        for conversation in conversations:
            digests = [names[id(image)] for image in conversation.images]
            images |= dict(zip(digests, conversation.images, strict=True))
            rows.append(_places(self.tokenize(conversation), digests, self.processor.tokens_per_image))
        return rows, images

    def _recent_features(self, images: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
        """Return the features of each image of a batch; the last ``RECENT_IMAGES`` are kept for the next."""
        known = {digest: self._recent.pop(digest) for digest in images if digest in self._recent}
        found = known | self._encode_images({digest: image for digest, image in images.items() if digest not in known})
        self._recent |= found
        for digest in list(self._recent)[:-RECENT_IMAGES]:
            del self._recent[digest]
        return found

    def _begin_batch(
        self, rows: Sequence[Sequence[Place]], features: Mapping[str, torch.Tensor]
    ) -> tuple[DynamicCache, int]:
        """Return the cache ``(B, ...)`` of what all rows begin with, and its length; some place of each is left out."""
        first = rows[0][:-1]
        shared = min(_shared_length(first, row[:-1]) for row in rows)
        kept, known = self._prefix, _shared_length(self._prefix.places, first[:shared])
        if shared - known < WORTHWHILE_PREFIX or len(rows) == 1:
            shared = known  # a pass of its own for a few places costs more than they do
        else:
            kept.cache.crop(known - kept.cache.get_seq_length())
            self._step(self._embed_batch([first[known:shared]], features), kept.cache)
            kept.places = list(first[:shared])
        cache = DynamicCache(config=self.model.config.text_config)
        for index, layer in enumerate(kept.cache.layers if shared else []):
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            keys, values = (part[:, :, :shared].expand(len(rows), -1, -1, -1) for part in (layer.keys, layer.values))
            cache.update(keys, values, index)
        return cache, shared

    def _embed_batch(self, rows: Sequence[Sequence[Place]], features: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Embed rows of places ``(B, L, hidden)``, padded on the left; an image in them is never cut."""
        ids = [
            torch.tensor([IMAGE_TOKEN_ID if isinstance(place, tuple) else place for place in row], dtype=torch.long)
            for row in rows
        ]
        starts = [place[0] for row in rows for place in row if isinstance(place, tuple) and place[1] == 0]
        input_ids = pad_rows(ids, self.processor.pad_id, "left").to(self.model.device)
        return self.model.embed(input_ids, torch.stack([features[name] for name in starts]) if starts else None)

    def _decode(
        self,
        rows: Sequence[Sequence[Place]],
        shared: int,
        features: Mapping[str, torch.Tensor],
        cache: DynamicCache,
        limits: Sequence[int],
    ) -> list[_Generated]:
        """Generate the tokens of each row, its stop token included, behind the ``shared`` places of ``cache``."""
        mask = pad_rows([torch.ones(len(row), dtype=torch.long) for row in rows], 0, "left").to(self.model.device)
        mask = torch.cat([mask.new_ones(len(rows), shared), mask], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, shared:]
        choosers = [self.sampling.chooser() for _ in rows]
        embeddings, generated = self._embed_batch(rows, features), [_Generated() for _ in rows]
        active = list(range(len(rows)))
        while active:
            logits = self._batch_step(embeddings, cache, mask, positions)
            tokens, logs = self._choose(logits, [choosers[row] for row in active])
            for row, token, log in zip(active, tokens, logs, strict=True):
                if len(generated[row].ids) < limits[row]:
                    generated[row].add(token, log)
            alive = [place for place, row in enumerate(active) if self._is_going_on(generated[row].ids, limits[row])]
            if len(alive) < len(active):
                chosen = torch.tensor(alive, device=mask.device, dtype=torch.long)
                cache.batch_select_indices(chosen)
                mask, positions, active = mask[chosen], positions[chosen], [active[place] for place in alive]
            last = torch.tensor([generated[row].ids[-1:] for row in active], device=mask.device, dtype=torch.long)
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], 1)
            positions = positions[:, -1:] + 1
            embeddings = self.model.get_input_embeddings()(last)
        return generated

    def _batch_step(
        self, embeddings: torch.Tensor, cache: DynamicCache, mask: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Feed ``(B, L, hidden)`` after what ``cache`` holds; return the last logits ``(B, vocabulary)``."""
        outputs = self.model(
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1]

    def _choose(
        self, logits: torch.Tensor, choosers: Sequence[Callable[[torch.Tensor], torch.Tensor]]
    ) -> tuple[list[int], list[float]]:
        """Return the next token of each row, and the logarithms of their probabilities."""
        if self.sampling.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            tokens = torch.stack([choose(row) for choose, row in zip(choosers, logits, strict=True)])
        chosen = logits.gather(1, tokens[:, None])[:, 0].float()
        return tokens.tolist(), (chosen - logits.float().logsumexp(-1)).tolist()

    def _is_going_on(self, token_ids: Sequence[int], limit: int) -> bool:
        return len(token_ids) < limit and token_ids[-1] not in self.stop_ids

    def _answered(self, generated: _Generated, limit: int) -> Answered:
        """Take the stop token off a generated row, and say why it ended."""
        ids = generated.ids
        confidence = math.exp(generated.log_probability) if self.sampling.temperature == 0 else None
        if ids and ids[-1] in self.stop_ids:
            return Answered(self.processor.decode(ids[:-1]), "stop token", len(ids) - 1, confidence)
        reason: StopReason = "max_new_tokens" if limit == self.max_new_tokens else "context"
        return Answered(self.processor.decode(ids), reason, len(ids), confidence)


def eos_ids(model: VilaM3ForConditionalGeneration) -> frozenset[int]:
    """Return the end tokens that a checkpoint's generation config names."""
    given = model.generation_config.eos_token_id if model.generation_config else None
    if given is None:
        return frozenset()
    return frozenset(given) if isinstance(given, list) else frozenset([given])


def digest_of(image: np.ndarray) -> str:
    """Return what tells one picture ``(H, W, 3)`` from another."""
    return hashlib.sha256(f"{image.shape}".encode() + np.ascontiguousarray(image).tobytes()).hexdigest()


def _places(token_ids: Sequence[int], digests: Sequence[str], tokens_per_image: int) -> list[Place]:
    """Name every place: a token by its id, a visual token by its image and number."""
    places: list[Place] = []
    count = 0
    for token in token_ids:
        if token == IMAGE_TOKEN_ID:
            places.append((digests[count // tokens_per_image], count % tokens_per_image))
            count += 1
        else:
            places.append(token)
    return places


def _shared_length(first: Sequence[Place], second: Sequence[Place]) -> int:
    """Return how many places two sequences have in common from the start."""
    for index, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return index
    return min(len(first), len(second))
