"""One chat request: messages in, events out, with the agent in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from vila_m3.answer import Sampling
from vila_m3_common.agent import Agent, ExpertCall, Listener, Results, Session, TurnRecord
from vila_m3_common.conversation import Conversation
from vila_m3_common.hooks import BundleExpert
from vila_m3_common.trigger import parse_triggers

from .conversations import (
    FORGOTTEN_NOTE,
    MANY_NOTE,
    SYSTEM_NOTE,
    Kept,
    Memory,
    SessionBuilder,
    check_messages,
    digest,
    fork,
    new_id,
)
from .errors import ApiError, as_api_error
from .experts import ExpertRunner, Watch, WatchedExpert
from .labels import label_rows
from .metrics import Metrics
from .schemas import ChatRequest, Message
from .settings import Settings
from .store import FileStore
from .vlm_queue import Abandoned, Job, Options, OutOfTime, Usage, VlmQueue

logger = logging.getLogger(__name__)

Event = dict[str, Any]
MAX_STOPS, LONGEST_STOP = 4, 200
_END_SECONDS = 5.0


class ChatService:
    """Everything that lives as long as the server.

    Args:
        composite: an opened :class:`vila_m3_composite.app.Composite`.
        settings: of the service.
    """

    def __init__(self, composite: Any, settings: Settings) -> None:
        limits = settings.limits
        self.composite, self.settings = composite, settings
        self.metrics = Metrics()
        self.store = FileStore(settings.data_dir, limits.store_mb * 2**20, 60 * limits.file_minutes)
        self.memory = Memory(limits.kept_conversations, self.store.drop_folder)
        self.builder = SessionBuilder(self.store, settings)
        self.vlm = VlmQueue(composite.vlm, limits.batch, self.metrics)
        self.runners = {name: self._runner(expert) for name, expert in composite.experts.items()}
        self._threads = ThreadPoolExecutor(limits.running, thread_name_prefix="conversation")
        self._lock = threading.Lock()
        self._admitted = 0
        self.is_closing = False
        self.metrics.waiting.set_function(lambda: max(0, self._admitted - limits.running))
        self.metrics.running.set_function(lambda: min(self._admitted, limits.running))
        self.metrics.kept.set_function(lambda: len(self.memory))
        self.metrics.store_bytes.set_function(lambda: self.store.byte_count)

    def _runner(self, expert: Any) -> ExpertRunner:
        reopen = None
        if isinstance(expert, BundleExpert):
            overrides = self.composite.expert_overrides

            def reopen() -> BundleExpert:
                return BundleExpert(expert.root, overrides)

        return ExpertRunner(expert, reopen, self.settings.limits.expert_seconds, self.metrics)

    def new_agent(self, answer: Any, watch: Watch, results: Results) -> Agent:
        """Return the composite's agent for one request."""
        own = self.composite.agent
        return Agent(
            answer,
            {name: WatchedExpert(runner, watch) for name, runner in self.runners.items()},
            own.cards,
            own.variant,
            own.max_expert_calls,
            own.tells_measurements,
            results,
        )

    def start(self, request: ChatRequest, owner: str) -> ChatRun:
        """Put a request into the queue.

        Raises:
            ApiError: if the request can never be answered, or too many wait.
        """
        run = ChatRun(self, request, owner)
        limits = self.settings.limits
        with self._lock:
            if self._admitted >= limits.running + limits.waiting:
                raise ApiError(429, f"{self._admitted} conversations are in work; try again later", "server_busy")
            self._admitted += 1
        self._threads.submit(self._run, run)
        return run

    def _run(self, run: ChatRun) -> None:
        try:
            run.work()
        finally:
            with self._lock:
                self._admitted -= 1

    def sweep(self) -> None:
        """Erase and forget what is over its time."""
        self.memory.sweep()
        count = self.store.sweep()
        if count:
            logger.info("%d files were erased", count)

    def close(self) -> None:
        """End the threads; conversations in work end at their next step."""
        self.is_closing = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.vlm.close()


class ChatRun:
    """One request while it is answered; must be made in the event loop that reads its events.

    Args:
        service: what lives longer.
        request: validated.
        owner: who asks.

    Raises:
        ApiError: if the request can never be answered.
    """

    def __init__(self, service: ChatService, request: ChatRequest, owner: str) -> None:
        settings = service.settings
        if request.model != settings.model_id:
            message = f"the model {request.model[:80]!r} does not exist; there is {settings.model_id!r}"
            raise ApiError(404, message, "model_not_found", "model")
        self._service, self._request, self._owner = service, request, owner
        self._said = check_messages(request.messages, settings)
        self._options = _options_of(request, settings)
        self._stops = _stops_of(request)
        self.usage = Usage()
        self.is_cut = False
        self.conversation_id = new_id()
        self.transcript: list[dict[str, Any]] = []
        self.study: dict[str, Any] | None = None
        self.notes: list[str] = []  # of the VLM's last turn, for the agent
        self._told_notes: list[str] = []
        self._start = time.perf_counter()
        self._is_cancelled = False
        self._is_live = False
        self._told_content = ""
        self._held_blank = ""
        self._turn = 0
        self._has_piece = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()

    # What the event loop calls.

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens, in order.

        Raises:
            ApiError: if the request fails.
        """
        while (event := await self._events.get()) is not None:
            if event["type"] == "error":
                raise event["error"]
            yield event

    def cancel(self) -> None:
        """Nobody waits any more: the work ends at its next step."""
        self._is_cancelled = True

    # What the thread does.

    def work(self) -> None:
        """Answer the request; every outcome becomes an event."""
        try:
            self._check()
            self._answer()
        except OutOfTime:
            limit = self._service.settings.limits.request_seconds
            error = ApiError(504, f"the request took longer than {limit:g} s", "request_timeout")
            self._put({"type": "error", "error": error})
        except Abandoned:
            pass
        except BaseException as fault:
            told = as_api_error(fault)
            if told.status == 500:
                logger.exception("a conversation failed")
            self._put({"type": "error", "error": told})
        finally:
            self._put(None)

    def _put(self, event: Event | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def _check(self) -> None:
        if self._is_cancelled or self._service.is_closing:
            raise Abandoned
        if time.perf_counter() - self._start > self._service.settings.limits.request_seconds:
            raise OutOfTime

    def _answer(self) -> None:
        service, said, options = self._service, self._said, self._request.study
        kept = service.memory.find(digest(said[:-1], options, self._owner)) if len(said) > 1 else None
        results: Results = kept.results if kept else {}
        agent = service.new_agent(self, self._watch(), results)
        if kept:
            self._ask(agent, fork(kept.session), results, is_new=False)
            return
        folder = service.store.new_folder()
        try:
            session = service.builder.build(said, options, self._owner, agent, folder)
            self._ask(agent, session, results, is_new=True)
        except BaseException:
            service.store.drop_folder(folder)
            raise

    def _ask(self, agent: Agent, session: Session, results: Results, is_new: bool) -> None:
        said = self._said
        self._is_live = session.study is None
        self._turn = len(session.records)
        self._note(session, has_forgotten=is_new and len(said) > 1)
        if is_new and len(said) == 1 and session.study is not None:
            # The images are rendered before anything is told, so that a slice that does not exist is a plain error.
            agent.user_turn(session, "")
        self._describe(session)
        agent.ask(session, said[-1].text, Listener(self._on_piece, self._on_turn))
        if not self._told_content:
            self._tell_content(session.answer)
        self._describe(session)
        self._keep(session, results)
        self._put({"type": "finished"})

    def _note(self, session: Session, has_forgotten: bool) -> None:
        messages = self._request.messages
        if any(message.role in ("system", "developer") for message in messages):
            session.add_note(SYSTEM_NOTE)
        asked = [sum(message.role == "user" for message in some) for some in (messages, self._said)]
        if asked[0] > asked[1]:
            session.add_note(MANY_NOTE)
        if has_forgotten and session.study is not None:
            session.add_note(FORGOTTEN_NOTE)

    def _describe(self, session: Session) -> None:
        self._told_notes = list(session.notes)
        if session.study is not None:
            self.study = {
                "modality": session.study.modality,
                "source": session.study.source,
                "slice_index": session.slice_index,
                "axis": session.axis,
            }
        self._put({"type": "study", "study": self.study, "notes": self._told_notes})

    def _keep(self, session: Session, results: Results) -> None:
        answer = Message(role="assistant", content=self._told_content)
        key = digest([*self._said, answer], self._request.study, self._owner)
        expires_at = time.time() + self._service.store.seconds
        self._service.memory.keep(key, Kept(self.conversation_id, self._owner, session, results, expires_at))

    # The VLM, as the agent calls it.

    def __call__(self, conversation: Conversation) -> Iterator[str]:
        """Yield the next assistant turn piece by piece, up to a stop sequence."""
        job = self._service.vlm.submit(Job(conversation, self._options, self._check))
        if not self._stops:
            yield from job
        elif self._is_live:
            yield from until_stop(job, self._stops)
        else:
            # A turn that calls an expert is never cut: its text is not part of the answer.
            text = "".join(job)
            yield text if parse_triggers(text) else "".join(until_stop([text], self._stops))
        # After a stop sequence the VLM is still at its last token; the counts come with its end.
        job.is_over.wait(_END_SECONDS)
        self.usage += job.usage
        self.is_cut, self.notes = job.is_cut, job.notes

    def _on_piece(self, piece: str) -> None:
        self._check()
        if not self._has_piece:
            self._has_piece = True
            self._service.metrics.first_token_seconds.observe(time.perf_counter() - self._start)
        self._put({"type": "piece", "turn": self._turn, "text": piece})
        if self._is_live:
            self._tell_content(piece)

    def _tell_content(self, text: str) -> None:
        """Tell a part of the answer; blanks at its two ends are left out."""
        text = self._held_blank + text if self._told_content else text.lstrip()
        shown = text.rstrip()
        self._held_blank = text[len(shown) :]
        if shown:
            self._told_content += shown
            self._put({"type": "content", "text": shown})

    def _on_turn(self, record: TurnRecord) -> None:
        self._turn += 1
        if record.turn.role == "assistant":
            triggers = [str(trigger) for trigger in parse_triggers(record.turn.text)]
            text = record.turn.text.strip()
            self._put({"type": "assistant", "turn": self._turn - 1, "text": text, "triggers": triggers})
            self.transcript.append({"role": "assistant", "content": text})
            if triggers and self._told_content:
                self._held_blank = "\n\n"
        elif record.call is not None:
            self._tell_expert(record, record.call)
            self._is_live = True

    # The experts, as the agent calls them.

    def _watch(self) -> Watch:
        def tell(kind: str) -> Callable[..., None]:
            def on_progress(seconds: float, usual: float | None = None) -> None:
                usual = None if usual is None else round(usual, 2)
                self._put({"type": kind, "seconds": round(seconds, 2), "usual_seconds": usual})

            return on_progress

        return Watch(self._check, tell("expert_waiting"), tell("expert_running"))

    def _tell_expert(self, record: TurnRecord, call: ExpertCall) -> None:
        result = call.result
        labels = label_rows(result)
        files = {
            name: self._service.store.add_result(path, self._owner, {"labels": labels}).id
            for name, path in (("overlay", result.overlay_path), ("label_map", result.label_map_path))
            if path is not None and path.is_file()
        }
        details = {
            **result.to_record(),
            "overlay": files.get("overlay"),
            "label_map": files.get("label_map"),
            "labels": labels,
            "name": call.trigger.name,
            "argument": call.trigger.argument,
            "is_reused": call.is_reused,
            "seconds": round(record.seconds, 3),
        }
        self._add_tool_messages(call, record.turn.text, details)
        self._put({"type": "expert", "text": record.turn.text, **details})

    def _add_tool_messages(self, call: ExpertCall, text: str, details: dict[str, Any]) -> None:
        """Write the call as OpenAI's tool messages: on the assistant's message, and as an answer to it."""
        number = sum(message["role"] == "tool" for message in self.transcript)
        call_id = f"call_{self.conversation_id.removeprefix('conv-')}_{number}"
        asked = next(message for message in reversed(self.transcript) if message["role"] == "assistant")
        function = {"name": call.trigger.name, "arguments": json.dumps({"argument": call.trigger.argument})}
        asked.setdefault("tool_calls", []).append({"id": call_id, "type": "function", "function": function})
        self.transcript.append({"role": "tool", "tool_call_id": call_id, "content": text, "vila_m3": details})

    @property
    def summary(self) -> dict[str, Any]:
        """What a response holds beside OpenAI's fields, when it is whole."""
        told = {"conversation": self.conversation_id, "study": self.study, "notes": self._told_notes}
        return told if self._request.experts == "hidden" else {**told, "transcript": self.transcript}


def until_stop(pieces: Any, stops: tuple[str, ...]) -> Iterator[str]:
    """Yield text up to the first stop sequence, which is left out."""
    held = ""
    longest = max(map(len, stops)) - 1
    for piece in pieces:
        held += piece
        places = [place for place in (held.find(stop) for stop in stops) if place >= 0]
        if places:
            if min(places):
                yield held[: min(places)]
            return
        ready = held[: len(held) - longest]
        if ready:
            yield ready
            held = held[len(ready) :]
    if held:
        yield held


def _options_of(request: ChatRequest, settings: Settings) -> Options:
    asked = request.max_completion_tokens or request.max_tokens
    if asked and asked > settings.limits.new_tokens:
        message = f"max_tokens {asked} is too large; allowed are 1 to {settings.limits.new_tokens}"
        raise ApiError(400, message, "invalid_value", "max_tokens")
    sampling = Sampling()
    if request.temperature:
        # Without a seed each request draws its own numbers, as OpenAI's API does.
        seed = request.seed if request.seed is not None else time.time_ns()
        sampling = replace(sampling, temperature=request.temperature, top_p=request.top_p or 1.0, seed=seed % 2**63)
    return Options(asked or settings.limits.new_tokens, sampling)


def _stops_of(request: ChatRequest) -> tuple[str, ...]:
    stops = [request.stop] if isinstance(request.stop, str) else list(request.stop or [])
    if len(stops) > MAX_STOPS or any(not 0 < len(stop) <= LONGEST_STOP for stop in stops):
        message = f"stop takes up to {MAX_STOPS} texts of 1 to {LONGEST_STOP} characters"
        raise ApiError(400, message, "invalid_value", "stop")
    return tuple(stops)
