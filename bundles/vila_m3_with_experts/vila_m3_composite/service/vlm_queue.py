"""One thread that runs the VLM for all requests: streaming a lone turn, batching turns that wait together."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from vila_m3.answer import Sampling, cut_notes
from vila_m3_common.conversation import Conversation

from .metrics import Metrics

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.2


class Abandoned(BaseException):
    """Nobody waits for the answer any more; passes every handler of ordinary errors, as an interrupt does."""


class OutOfTime(Abandoned):
    """The request took longer than it may."""


@dataclass(frozen=True)
class Options:
    """How a turn is generated: turns of equal options can be answered in one batch.

    Args:
        max_new_tokens: longest turn.
        sampling: how tokens are chosen.
    """

    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)


@dataclass
class Usage:
    """Tokens of one or more turns."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.prompt + other.prompt, self.cached + other.cached, self.completion + other.completion)


class Job:
    """One turn that the VLM shall write; iterate over it for the pieces.

    Args:
        conversation: what the VLM reads.
        options: how it writes.
        check: raises when the request is over; called while waiting.
    """

    def __init__(self, conversation: Conversation, options: Options, check: Callable[[], None]) -> None:
        self.conversation, self.options, self._check = conversation, options, check
        self.usage = Usage()
        self.notes: list[str] = []
        self.is_cancelled = False
        self.is_over = threading.Event()
        self._pieces: queue.SimpleQueue[str | BaseException | None] = queue.SimpleQueue()

    @property
    def is_cut(self) -> bool:
        """Whether the turn ended before its end, which its notes then tell."""
        return bool(self.notes)

    def __iter__(self) -> Iterator[str]:
        try:
            while True:
                try:
                    piece = self._pieces.get(timeout=_LOOK_SECONDS)
                except queue.Empty:
                    self._check()
                    continue
                if piece is None:
                    return
                if isinstance(piece, BaseException):
                    raise piece
                self._check()
                yield piece
        finally:
            self.is_cancelled = True

    def put(self, piece: str) -> None:
        """Hand over a piece."""
        self._pieces.put(piece)

    def end(self, error: BaseException | None = None) -> None:
        """Say that the turn is whole, or why not."""
        self._pieces.put(error)
        self.is_over.set()


class VlmQueue:
    """Runs the VLM in a thread of its own.

    Turns of equal options that wait at the same time are answered in one batch, when nothing is sampled (a batch has
    one stream of random numbers) and all of them fit; their text then comes in one piece. A turn that waits alone is
    streamed and continues the key-value cache of its conversation.

    Args:
        vlm: has the VLM's ``answer`` hook as ``hook``; getting it may load weights.
        batch: turns answered at once.
        metrics: of the service.
    """

    def __init__(self, vlm: Any, batch: int, metrics: Metrics) -> None:
        self._vlm, self._batch_size, self._metrics = vlm, batch, metrics
        self._jobs: list[Job] = []
        self._condition = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="vlm", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> Job:
        """Put a turn into the queue and return it."""
        with self._condition:
            self._jobs.append(job)
            self._condition.notify()
        return job

    def close(self) -> None:
        """End the thread after the turn that it is at."""
        with self._condition:
            self._is_closed = True
            self._condition.notify()
        self._thread.join(timeout=30)

    def _take(self) -> list[Job] | None:
        with self._condition:
            while True:
                self._jobs = [job for job in self._jobs if not job.is_cancelled]
                if self._jobs or self._is_closed:
                    break
                self._condition.wait()
            if self._is_closed:
                return None
            first = self._jobs[0]
            alike = [job for job in self._jobs if job.options == first.options][: self._batch_size]
            taken = alike if first.options.sampling.temperature == 0 else [first]
            self._jobs = [job for job in self._jobs if job not in taken]
            return taken

    def _work(self) -> None:
        while (jobs := self._take()) is not None:
            try:
                hook = self._vlm.hook
                hook.max_new_tokens, hook.sampling = jobs[0].options.max_new_tokens, jobs[0].options.sampling
                together = self._fitting(hook, jobs)
                if len(together) > 1:
                    self._answer_batch(hook, together)
                for job in jobs if len(together) < 2 else [job for job in jobs if job not in together]:
                    self._stream(hook, job)
            except BaseException as error:
                logger.exception("the VLM failed")
                for job in jobs:
                    job.end(error)

    def _fitting(self, hook: Any, jobs: list[Job]) -> list[Job]:
        """Return the jobs that a batch does not shorten: the longest conversation leaves room for all answers."""
        if len(jobs) < 2 or not hasattr(hook, "answer_batch"):
            return []
        fitting = []
        for job in jobs:
            try:
                job.usage.prompt = len(hook.tokenize(job.conversation))
            except ValueError:
                continue  # told when it is answered alone
            if job.usage.prompt + job.options.max_new_tokens <= hook.model.context_length:
                fitting.append(job)
        return fitting

    def _answer_batch(self, hook: Any, jobs: list[Job]) -> None:
        self._metrics.batch.observe(len(jobs))
        for job, answered in zip(jobs, hook.answer_batch([job.conversation for job in jobs]), strict=True):
            job.usage.completion = answered.new_token_count
            job.notes = cut_notes(answered, hook.model.context_length)
            self._finish(job, answered.text)

    def _stream(self, hook: Any, job: Job) -> None:
        self._metrics.batch.observe(1)
        pieces = iter(hook(job.conversation))
        try:
            for piece in pieces:
                if job.is_cancelled:
                    break
                job.put(piece)
        except Exception as error:
            job.end(error)
            return
        finally:
            close = getattr(pieces, "close", None)
            if close:
                close()
        report = getattr(hook, "report", None)
        if report is not None:
            job.usage = Usage(report.prompt_token_count, report.reused_token_count, report.new_token_count)
            job.notes = cut_notes(report, hook.model.context_length)
        self._finish(job, "")

    def _finish(self, job: Job, text: str) -> None:
        self._metrics.tokens.labels("prompt").inc(job.usage.prompt)
        self._metrics.tokens.labels("completion").inc(job.usage.completion)
        if text:
            job.put(text)
        job.end()
