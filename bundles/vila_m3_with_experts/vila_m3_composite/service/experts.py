"""Experts for many requests: one run at a time each, within a time limit, with signs of life."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from vila_m3_common.errors import UserError
from vila_m3_common.expert import Expert, ExpertRequest, ExpertResult, ModelCard

from .metrics import Metrics

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.5
# Runs over their limit that may still compute; a thread cannot be ended from outside.
_MAX_STUCK = 2


@dataclass
class _Slot:
    """One opened expert; the lock is held while it runs."""

    expert: Expert
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass
class _Run:
    """One run: what came of it, when it is over."""

    result: ExpertResult | None = None
    error: Exception | None = None
    is_over: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Watch:
    """How a request follows a run.

    Args:
        check: raises when the request is over; called while the expert runs.
        on_wait: is told the seconds that the request has waited for its turn.
        on_run: is told the seconds of this run so far, and the usual ones (None before the first run).
    """

    check: Callable[[], None]
    on_wait: Callable[[float], None]
    on_run: Callable[[float, float | None], None]


class ExpertRunner:
    """Runs one expert for all requests.

    A run over its time limit cannot be ended. Its result is dropped, and the next request gets a freshly opened expert;
    while ``_MAX_STUCK`` such runs go on, the expert is refused.

    Args:
        expert: opened.
        reopen: opens it anew; None keeps using the same one, after the stuck run has ended.
        seconds: time limit of a run.
        metrics: of the service.
    """

    def __init__(self, expert: Expert, reopen: Callable[[], Expert] | None, seconds: float, metrics: Metrics) -> None:
        self.card = expert.card
        self._slot = _Slot(expert)
        self._reopen, self._seconds, self._metrics = reopen, seconds, metrics
        self._stuck: list[_Run] = []
        self._usual: float | None = None

    def run(self, request: ExpertRequest, watch: Watch) -> ExpertResult:
        """Wait for the expert, run it, and return its result.

        Raises:
            UserError: if it takes too long.
        """
        slot = self._wait(watch)
        start = time.perf_counter()
        run = self._start(slot, request)
        while not run.is_over.wait(_LOOK_SECONDS):
            elapsed = time.perf_counter() - start
            if elapsed > self._seconds:
                self._give_up(slot, run)
                raise UserError(f"it took longer than {self._seconds:g} s")
            watch.check()
            watch.on_run(elapsed, self._usual)
        seconds = time.perf_counter() - start
        self._metrics.expert_seconds.labels(self.card.name, "failed" if run.error else "done").observe(seconds)
        if run.error:
            raise run.error
        assert run.result is not None
        self._usual = seconds if self._usual is None else 0.7 * self._usual + 0.3 * seconds
        return run.result

    def _wait(self, watch: Watch) -> _Slot:
        """Return the expert with its lock held."""
        start = time.perf_counter()
        while True:
            self._stuck = [run for run in self._stuck if not run.is_over.is_set()]
            if len(self._stuck) >= _MAX_STUCK:
                raise UserError("earlier runs of it hang; try again later")
            slot = self._slot
            if slot.lock.acquire(timeout=_LOOK_SECONDS):
                if slot is self._slot:
                    return slot
                slot.lock.release()
            watch.check()
            watch.on_wait(time.perf_counter() - start)

    def _start(self, slot: _Slot, request: ExpertRequest) -> _Run:
        run = _Run()

        def work() -> None:
            try:
                run.result = slot.expert.run(request)
            except Exception as error:
                run.error = error
            finally:
                slot.lock.release()
                run.is_over.set()

        threading.Thread(target=work, name=f"expert {self.card.name}", daemon=True).start()
        return run

    def _give_up(self, slot: _Slot, run: _Run) -> None:
        logger.error("expert %s ran longer than %g s and was given up", self.card.name, self._seconds)
        self._metrics.expert_seconds.labels(self.card.name, "over time").observe(self._seconds)
        self._stuck.append(run)
        if self._reopen is not None and self._slot is slot:
            self._slot = _Slot(self._reopen())


class WatchedExpert:
    """An expert as the agent of one request sees it.

    Args:
        runner: shared by all requests.
        watch: of this request.
    """

    def __init__(self, runner: ExpertRunner, watch: Watch) -> None:
        self.card: ModelCard = runner.card
        self._runner, self._watch = runner, watch

    def run(self, request: ExpertRequest) -> ExpertResult:
        """Run the expert on one request."""
        return self._runner.run(request, self._watch)
