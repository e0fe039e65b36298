"""The service with a scripted VLM and a small real segmentation in the experts' place, behind a real uvicorn."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI
from openai import OpenAI

from vila_m3.answer import Answered, AnswerReport
from vila_m3_common import prompts
from vila_m3_common.agent import Agent
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest, ExpertResult, ModelCard
from vila_m3_common.segmentation import view_segmentation
from vila_m3_common.slices import window_ct
from vila_m3_common.volumes import load_volume
from vila_m3_composite.service.app import create_app
from vila_m3_composite.service.settings import Limits, Settings

MODEL = "vila-m3-scripted"
CARDS = "Here is a list of experts:\n"
CT_CARD = ModelCard("VISTA3D", "CT", "segmentation", "o", "a", ("everything", "bone"), "CT", "one CT volume")


class ScriptedVlm:
    """Says what the words of the last question ask for, and keeps what it was shown.

    ``CALL`` triggers the expert, ``REPORT`` reports with it, ``TWICE`` triggers again after the first feedback,
    ``SLOW`` writes many words with pauses, ``WAIT`` holds the VLM until it may go on, ``BREAK`` fails.
    """

    def __init__(self) -> None:
        self.max_new_tokens, self.sampling = 0, None
        self.model = SimpleNamespace(context_length=4096)
        self.report = AnswerReport()
        self.seen: list[list[str]] = []
        self.shown: Sequence[np.ndarray] = ()
        self.batches: list[int] = []
        self.abandoned = threading.Event()
        self.go_on = threading.Event()

    @property
    def hook(self) -> "ScriptedVlm":
        return self

    def tokenize(self, conversation: Conversation) -> list[int]:
        words = " ".join(turn.text for turn in conversation.context).split()
        if len(words) > 4096:
            raise UserError(f"the conversation has {len(words)} tokens, the model reads 4096; start a new conversation")
        return list(range(len(words)))

    def __call__(self, conversation: Conversation) -> Iterator[str]:
        count = len(self.tokenize(conversation))
        self.report = AnswerReport(prompt_token_count=count, stop_reason="abandoned")
        words = self._text(conversation).split(" ")
        try:
            for number, word in enumerate(words[: self.max_new_tokens]):
                self.report.new_token_count += 1
                if "SLOW" in conversation.turns[-1].text:
                    time.sleep(0.05)
                yield word if number == 0 else f" {word}"
        except GeneratorExit:
            self.abandoned.set()
            raise
        self.report.stop_reason = "stop token" if len(words) <= self.max_new_tokens else "max_new_tokens"

    def answer_batch(self, conversations: list[Conversation]) -> list[Answered]:
        self.batches.append(len(conversations))
        return [self._answered(self._text(conversation).split(" ")) for conversation in conversations]

    def _answered(self, words: list[str]) -> Answered:
        said = words[: self.max_new_tokens]
        return Answered(" ".join(said), "stop token" if len(said) == len(words) else "max_new_tokens", len(said))

    def _text(self, conversation: Conversation) -> str:
        self.seen.append([turn.text for turn in conversation.context])
        self.shown = conversation.images
        last = conversation.turns[-1]
        question = last.text.rpartition("\n")[2]
        if "WAIT" in question:
            self.go_on.wait(20)
        if "BREAK" in question:
            raise RuntimeError("an internal secret")
        if last.role == "expert":
            first_feedback = [turn.role for turn in conversation.turns].count("expert") == 1
            if "TWICE" in question and first_feedback:
                return "Let me look again: <VISTA3D(everything)>."
            return f"The expert said: {last.text.partition(' Use this')[0].partition(' describe ')[2]}"
        if "CALL" in question or "TWICE" in question:
            return "This looks like a CT image. Let me trigger <VISTA3D(bone)>. "
        if "REPORT" in question:
            return "I segmented the bones using <VISTA3D(bone)>."
        if "SLOW" in question:
            return " ".join(f"word{number}" for number in range(60))
        said = question[:40].replace("<", "(")  # what the VLM writes itself would be a trigger
        return f"I read {len(conversation.context)} turns and {len(conversation.images)} images; you said {said}"


class Thresholder:
    """Labels what is denser than the image's 95th percentile, and measures it; can fail and hang on demand."""

    def __init__(self) -> None:
        self.card = CT_CARD
        self.run_count = 0
        self.go_on = threading.Event()

    def run(self, request: ExpertRequest) -> ExpertResult:
        self.run_count += 1
        if "RAISE" in request.question:
            raise RuntimeError("an internal secret")
        if "HANG" in request.question:
            self.go_on.wait(20)
        volume = load_volume(request.image_paths[0])
        labels = (volume.array > np.percentile(volume.array, 95)).astype(np.uint8)
        view = view_segmentation(labels, volume, window_ct(volume.array), {1: "bone"}, request, "VISTA3D", is_ct=True)
        pairs = [(color, f"bone of {view.measurements[0]['volume_ml']} mL") for color in view.colors.values()]
        return ExpertResult(
            prompts.ct_feedback(pairs, request.question, "trained"),
            (view.picture,),
            view.overlay_path,
            view.label_map_path,
            dict.fromkeys(view.colors.values(), "bone"),
            view.measurements,
        )


@dataclass
class Composite:
    """What the service needs of :class:`vila_m3_composite.app.Composite`."""

    vlm: ScriptedVlm = field(default_factory=ScriptedVlm)
    experts: dict[str, Any] = field(default_factory=lambda: {"VISTA3D": Thresholder()})
    expert_overrides: None = None

    def __post_init__(self) -> None:
        self.agent = Agent(self.vlm, self.experts, CARDS)


@dataclass
class Running:
    """A service that answers at ``url``."""

    url: str
    app: FastAPI
    composite: Composite
    data_dir: Path

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    @property
    def service(self) -> Any:
        return self.app.state.service


@contextlib.contextmanager
def running_service(data_dir: Path, sweep_seconds: float = 30, **options: Any) -> Iterator[Running]:
    """Serve a scripted composite; ``limits`` is a mapping, other options are those of Settings."""
    limits = Limits.from_config(options.pop("limits", {}))
    composite = Composite()
    app = create_app(composite, Settings(data_dir, MODEL, limits, **options), sweep_seconds)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server has ended"
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", app, composite, data_dir)
        composite.experts["VISTA3D"].go_on.set()
        server.should_exit = True
        thread.join(timeout=20)
