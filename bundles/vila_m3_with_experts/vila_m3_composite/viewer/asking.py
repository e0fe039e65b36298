"""Questions to the VLM about an image of the viewer, with experts; conversations go on from what was said."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from vila_m3_common.agent import ExpertCall, Results, Session
from vila_m3_common.errors import UserError
from vila_m3_common.study import open_study

from ..outputs import describe_turn
from ..service.conversations import (
    FORGOTTEN_NOTE,
    Kept,
    Memory,
    check_messages,
    digest,
    fork,
    new_id,
    replay,
)
from ..service.errors import ApiError
from ..service.schemas import Message, StudyOptions
from ..service.settings import Settings
from .models import ViewerModels
from .running import describe_result, whole_number

KEPT_CONVERSATIONS = 64
KEPT_SECONDS = 24 * 3600.0


class _Asked(BaseModel):
    """The parameters of a request that the VLM takes; others are MONAI Label's own."""

    question: str = ""
    history: list[Message] = Field(default_factory=list)


@dataclass(frozen=True)
class Answered:
    """What came of a question.

    Args:
        label_map: of the last expert that made one for this question.
        params: what the viewer is told, ready for JSON.
    """

    label_map: Path | None
    params: dict[str, Any]


class Asker:
    """Answers questions.

    The conversation comes with each request, as in OpenAI's API; the experts' results and the VLM's context of it are
    kept here, for the same image only.

    Args:
        models: of the app.
    """

    def __init__(self, models: ViewerModels) -> None:
        self.models = models
        # Erased with the process too, unless a signal other than Ctrl+C ends it.
        self._temporary = tempfile.TemporaryDirectory(prefix="vila_m3_viewer_", ignore_cleanup_errors=True)
        self._folder = Path(self._temporary.name)
        self._settings = Settings(self._folder)
        self._memory = Memory(KEPT_CONVERSATIONS, _drop)

    def ask(self, image: str, params: Mapping[str, Any]) -> Answered:
        """Put a question about an image to the VLM.

        Args:
            image: file, or folder of a DICOM series.
            params: ``question``; ``history``, the messages so far (``role`` ``user`` or ``assistant``, ``content``);
                ``slice_index``, ``axis``, ``modality``.

        Raises:
            UserError: if image or parameters cannot be used.
        """
        options = _options(params)
        said = self._read_messages(params)
        with self.models.lock:
            study = open_study(image, options.modality)
            owner = "\n".join(study.fingerprint)
            kept = self._memory.find(digest(said[:-1], options, owner)) if len(said) > 1 else None
            results: Results = kept.results if kept else {}
            agent = self.models.agent(results)
            if kept:
                session = fork(kept.session)
            else:
                session = replay(study, said, options, agent, Path(tempfile.mkdtemp(dir=self._folder)))
                if len(said) > 1:
                    session.add_note(FORGOTTEN_NOTE)
            start = len(session.records)
            try:
                answer = agent.ask(session, said[-1].text)
            except BaseException:
                if not kept:
                    _drop(session.output_dir)
                raise
            messages = [*said, Message(role="assistant", content=answer)]
            self._memory.sweep()
            expires_at = time.time() + KEPT_SECONDS
            self._memory.keep(digest(messages, options, owner), Kept(new_id(), owner, session, results, expires_at))
        return _describe(session, start, messages, agent.cards)

    def _read_messages(self, params: Mapping[str, Any]) -> list[Message]:
        try:
            asked = _Asked.model_validate({name: params[name] for name in _Asked.model_fields if params.get(name)})
            return check_messages([*asked.history, Message(role="user", content=asked.question)], self._settings)
        except ValidationError as error:
            place = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise UserError(
                f"{place} cannot be read; question is a text, and history a list of "
                '{"role": "user" or "assistant", "content": "..."}'
            ) from error
        except ApiError as error:
            raise UserError(error.message) from error

    def close(self) -> None:
        """Erase the files of all conversations."""
        self._temporary.cleanup()


def _drop(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def _options(params: Mapping[str, Any]) -> StudyOptions:
    modality = params.get("modality")
    given = {
        "modality": None if isinstance(modality, list) or not modality else modality,
        "slice_index": whole_number(params, "slice_index"),
        "axis": 2 if (axis := whole_number(params, "axis")) is None else axis,
    }
    try:
        return StudyOptions.model_validate(given)
    except ValidationError as error:
        name = str(error.errors()[0]["loc"][0])
        raise UserError(f"{name} is {given[name]!r}; {error.errors()[0]['msg']}") from error


def _describe(session: Session, start: int, messages: list[Message], cards: str) -> Answered:
    calls = [record.call for record in session.records[start:] if record.call]
    shown = next((call for call in reversed(calls) if call.result.label_map_path and not call.result.is_error), None)
    study = session.study
    assert study is not None
    params = {
        "answer": session.answer,
        "history": [{"role": message.role, "content": message.text} for message in messages],
        "triggers": [_describe_call(call) for call in calls],
        "turns": [describe_turn(record, cards) for record in session.records[start:]],
        "study": {
            "modality": study.modality,
            "source": study.source,
            "slice_index": session.slice_index,
            "axis": session.axis,
        },
    }
    if shown:
        params |= describe_result(shown.result, shown.trigger.name)
    return Answered(shown.result.label_map_path if shown else None, {**params, "notes": list(session.notes)})


def _describe_call(call: ExpertCall) -> dict[str, Any]:
    return {
        "trigger": str(call.trigger),
        "expert": call.trigger.name,
        "argument": call.trigger.argument,
        "is_reused": call.is_reused,
        "is_error": call.result.is_error,
    }
