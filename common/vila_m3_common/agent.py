"""The loop that makes a VLM and its experts one system: answer, trigger, expert, feedback, answer."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import prompts
from .conversation import Conversation, Turn, neutralise
from .errors import UserError, find_user_error
from .expert import Expert, ExpertRequest, ExpertResult, ModelCard
from .study import Study, render_images
from .trigger import Trigger, parse_triggers

logger = logging.getLogger(__name__)

Answer = Callable[[Conversation], Iterable[str]]
# (study, expert, argument, slice, axis) -> the question that was asked, and the expert's result.
Results = dict[tuple[object, ...], tuple[str, ExpertResult]]


@dataclass(frozen=True)
class ExpertCall:
    """What happened at one trigger.

    Args:
        trigger: as the model wrote it.
        result: what came back.
        is_reused: whether an earlier result of the same image, expert, argument and slice was taken.
    """

    trigger: Trigger
    result: ExpertResult
    is_reused: bool


@dataclass(frozen=True)
class TurnRecord:
    """A turn with what it took: seconds, and for an expert turn its call."""

    turn: Turn
    seconds: float
    call: ExpertCall | None = None


@dataclass
class Session:
    """One conversation about one study.

    Args:
        study: the images; None for a conversation without images, which no expert can help.
        output_dir: folder that exists, for the files of the experts.
        slice_index: RAS index of the slice that the VLM sees; None takes the middle.
        axis: 0 sagittal, 1 coronal, 2 axial.
        t1c_only: show T1c in all four MRI places, as the reference did.
    """

    study: Study | None
    output_dir: Path
    slice_index: int | None = None
    axis: int = 2
    t1c_only: bool = False
    conversation: Conversation = field(default_factory=Conversation)
    records: list[TurnRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def answer(self) -> str:
        """The last assistant turn."""
        replies = [turn.text for turn in self.conversation.turns if turn.role == "assistant"]
        return replies[-1].strip() if replies else ""

    @property
    def calls(self) -> list[ExpertCall]:
        """Every expert call so far, in order."""
        return [record.call for record in self.records if record.call]

    def add_note(self, note: str) -> None:
        """Add a sentence for the user, once."""
        if note not in self.notes:
            self.notes.append(note)

    def record(self, turn: Turn, seconds: float, call: ExpertCall | None = None) -> TurnRecord:
        """Append a turn to the conversation and its record."""
        self.conversation.turns.append(turn)
        self.records.append(TurnRecord(turn, seconds, call))
        return self.records[-1]


@dataclass(frozen=True)
class Listener:
    """Callbacks for a program that shows a conversation while it happens.

    Args:
        on_piece: gets every piece of an assistant turn as it is generated.
        on_turn: gets every finished turn.
    """

    on_piece: Callable[[str], None] = lambda piece: None
    on_turn: Callable[[TurnRecord], None] = lambda record: None


class Agent:
    """Runs questions through the VLM and the experts.

    Args:
        answer: the VLM's hook, Conversation -> pieces of text.
        experts: card name -> expert.
        cards: the trained model cards; cards of further experts are added.
        variant: ``trained`` or ``served`` form of the opening.
        max_expert_calls: bound on the calls of one question.
        tells_measurements: whether the expert turn holds the measurements too; no released weights
            were trained with them.
        results: earlier results of experts that may be reused; None keeps those of this agent alone. A program
            that gives each request an agent of its own hands on what one conversation has.
    """

    def __init__(
        self,
        answer: Answer,
        experts: Mapping[str, Expert],
        cards: str,
        variant: prompts.Variant = "trained",
        max_expert_calls: int = 4,
        tells_measurements: bool = False,
        results: Results | None = None,
    ) -> None:
        self.answer = answer
        self.experts = dict(experts)
        self.cards = add_cards(cards, [expert.card for expert in experts.values()])
        self.variant = variant
        self.max_expert_calls = max_expert_calls
        self.tells_measurements = tells_measurements
        self._results: Results = {} if results is None else results

    def ask(self, session: Session, question: str, listener: Listener | None = None) -> str:
        """Put a question to a session and return the answer.

        Args:
            session: grows by the turns of this question.
            question: what the user typed; control strings are taken out of it.
            listener: is told of pieces and turns.

        Raises:
            UserError: if the question is empty or the slice does not exist.
        """
        listener = listener or Listener()
        text = neutralise(question).strip()
        if not text:
            raise UserError(
                "the question is empty; ask something, for example --question 'Are there any liver masses?'"
            )
        listener.on_turn(session.record(self.user_turn(session, text), 0.0))
        remaining = self.max_expert_calls
        while True:
            reply = self._reply(session, listener)
            triggers = parse_triggers(reply)
            if not triggers:
                return session.answer
            if remaining <= 0:
                session.add_note(
                    f"The bound of {self.max_expert_calls} expert calls was reached; {triggers[0]} was not run."
                )
                return session.answer
            if self._run_triggers(session, triggers[:remaining], text, listener):
                return session.answer
            remaining -= len(triggers)

    def user_turn(self, session: Session, text: str) -> Turn:
        """Return what the model reads of a question: the first one about a study shows its images.

        Args:
            session: gets the index of the slice that is shown, and notes about the study.
            text: the question, already neutralised.

        Raises:
            UserError: if the slice does not exist.
        """
        if session.conversation.turns or session.study is None:
            return Turn("user", text)
        images, session.slice_index = render_images(session.study, session.slice_index, session.axis, session.t1c_only)
        for note in (*session.study.notes, *self._unread_notes(session.study)):
            session.add_note(note)
        return Turn("user", prompts.opening(session.study.opening_form, text, self.cards, self.variant), tuple(images))

    def _unread_notes(self, study: Study) -> list[str]:
        """Say why no expert reads a study, when none does."""
        reasons = {name: refusal(expert.card, study) for name, expert in self.experts.items()}
        if not reasons or None in reasons.values():
            return []
        return ["No expert was run: " + "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) + "."]

    def _reply(self, session: Session, listener: Listener) -> str:
        start = time.perf_counter()
        pieces = []
        for piece in self.answer(session.conversation):
            pieces.append(piece)
            listener.on_piece(piece)
        for note in getattr(self.answer, "notes", ()):
            session.add_note(note)
        text = neutralise("".join(pieces))
        listener.on_turn(session.record(Turn("assistant", text), time.perf_counter() - start))
        return text

    def _run_triggers(self, session: Session, triggers: list[Trigger], question: str, listener: Listener) -> bool:
        """Run the triggers of one turn in order; return whether the turn is final."""
        calls = []
        for trigger in triggers:
            start = time.perf_counter()
            calls.append((self._call(session, trigger, question), start, time.perf_counter()))
        is_final = all(self._ends_turn(call) for call, _, _ in calls)
        for call, start, end in calls:
            turn = Turn("expert", call.result.text, call.result.images, in_context=not is_final)
            listener.on_turn(session.record(turn, end - start, call))
            for note in call.result.notes:
                session.add_note(note)
        return is_final

    def _ends_turn(self, call: ExpertCall) -> bool:
        if call.result.is_error or not call.trigger.is_report:
            return False
        return self.experts[call.trigger.name].card.report_ends_turn

    def _call(self, session: Session, trigger: Trigger, question: str) -> ExpertCall:
        if trigger.name not in self.experts:
            text = prompts.not_available(trigger.name, tuple(self.experts))
            return ExpertCall(trigger, ExpertResult(text, is_error=True), False)
        expert = self.experts[trigger.name]
        study = session.study
        if study is None:
            return _failed(trigger, "no image was given", question)
        reason = refusal(expert.card, study) or expert.card.unknown_argument_message(trigger.argument)
        if reason:
            return _failed(trigger, reason, question)
        key = (study.fingerprint, trigger.name, trigger.argument, session.slice_index, session.axis)
        if key in self._results:
            asked, result = self._results[key]
            return ExpertCall(trigger, _about(result, asked, question), True)
        try:
            result = expert.run(self._request(session, study, trigger, question))
        except Exception as error:
            cause = find_user_error(error)
            if cause is None:
                logger.exception("expert %s failed", trigger.name)
            return _failed(trigger, str(cause) if cause else f"it failed ({type(error).__name__})", question)
        if self.tells_measurements:
            told = prompts.add_measurements(result.text, result.measurements, question)
            result = dataclasses.replace(result, text=told)
        self._results[key] = (question, result)
        return ExpertCall(trigger, result, False)

    def _request(self, session: Session, study: Study, trigger: Trigger, question: str) -> ExpertRequest:
        number = 1 + sum(not call.is_reused for call in session.calls)
        while any(session.output_dir.glob(f"{number:02d}_*")):
            number += 1
        return ExpertRequest(
            image_paths=tuple(str(path.resolve()) for path in study.paths),
            argument=trigger.argument,
            slice_index=session.slice_index,
            axis=session.axis,
            question=question,
            output_dir=str(session.output_dir),
            stem=f"{number:02d}_{trigger.name.lower()}",
        )


def _failed(trigger: Trigger, reason: str, question: str) -> ExpertCall:
    text = prompts.expert_error(trigger.name, neutralise(reason), question)
    note = f"{trigger} was not run: {reason}."
    return ExpertCall(trigger, ExpertResult(text, notes=[note], is_error=True), False)


def _about(result: ExpertResult, asked: str, question: str) -> ExpertResult:
    """Return a result whose text ends with another question; every expert turn ends with the question."""
    head, found, tail = result.text.rpartition(asked)
    if not found or tail not in ("", "."):
        return result
    return dataclasses.replace(result, text=head + question + tail)


def refusal(card: ModelCard, study: Study) -> str | None:
    """Return why an expert cannot read a study, or None when it can."""
    if study.modality == "unknown":
        return f"it reads {card.input_description or card.modality}, and the modality of the image is not known"
    if card.study_modality and card.study_modality != study.modality:
        return f"it reads {card.input_description or card.modality}, but the image is {study.modality}"
    if card.sequence_count == 4 and not study.has_brain_sequences:
        return f"it needs {card.input_description or 'four sequences'}, but one image was given"
    return None


def add_cards(cards: str, experts: Iterable[ModelCard]) -> str:
    """Add the cards of experts that the trained text does not hold, before its closing instruction."""
    lines = cards.splitlines(keepends=True)
    known = {line.rstrip("\n") for line in lines}
    added = [card.render() + "\n" for card in experts if card.render() not in known]
    place = len(lines) - 1 if lines and lines[-1].startswith("Give the model") else len(lines)
    return "".join(lines[:place] + added + lines[place:])
