"""Grading of the trigger benchmark: who was called, with which argument, too often, wrongly, or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vila_m3_common.trigger import Trigger, parse_triggers

from .definition import Question
from .predictions import Predictions
from .statistics import score

OUTCOMES = ("right", "wrong argument", "wrong expert", "double", "missed", "spurious")
NOBODY = "none"


@dataclass(frozen=True)
class Graded:
    """One case: what was wanted, what was called, and what that is."""

    question: Question
    wanted: tuple[Trigger, ...]
    called: tuple[Trigger, ...]
    outcome: str

    @property
    def names_right(self) -> bool:
        """Whether the experts called are those wanted, arguments aside."""
        return [call.name for call in self.called] == [call.name for call in self.wanted]

    @property
    def asked(self) -> str:
        """What the user asked last, without the model cards before it."""
        messages = self.question.record.messages if self.question.record else ()
        said = [message.text for message in messages if message.role == "user"]
        return said[-1].rpartition("\n")[2] if said else self.question.text

    def meta(self, name: str) -> str:
        """Return what the case's record says of it."""
        return str(self.question.record.metadata.get(name, "")) if self.question.record else ""


def judge(wanted: Sequence[Trigger], called: Sequence[Trigger]) -> str:
    """Return the outcome of a turn.

    ``missed`` and ``spurious`` are calls where there are none and none wanted; ``double`` calls the wanted expert
    and somebody (or it) once more.
    """
    if not called:
        return "missed" if wanted else "right"
    if not wanted:
        return "spurious"
    names, wanted_names = [call.name for call in called], [call.name for call in wanted]
    if len(called) > len(wanted) and set(wanted_names) <= set(names):
        return "double"
    if names != wanted_names:
        return "wrong expert"
    return "right" if list(map(_argument, called)) == list(map(_argument, wanted)) else "wrong argument"


def _argument(call: Trigger) -> str:
    """An empty argument of VISTA3D means everything, as the composite runs it."""
    return call.argument or ("everything" if call.name == "VISTA3D" else "")


def judge_all(questions: Sequence[Question], predictions: Predictions) -> Iterator[Graded]:
    """Grade every case; one without an answer has called nobody."""
    for question in questions:
        wanted = tuple(parse_triggers(question.answer))
        called = tuple(parse_triggers(predictions.texts.get(question.id, "")))
        yield Graded(question, wanted, called, judge(wanted, called))


def _share(rows: Sequence[Graded], values: Sequence[bool]) -> dict[str, Any]:
    return score([float(value) for value in values], [row.question.group for row in rows])


def _by(rows: Sequence[Graded], name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for value in sorted({row.meta(name) for row in rows}):
        found[value] = _both([row for row in rows if row.meta(name) == value])
    return found


def _both(rows: Sequence[Graded]) -> dict[str, Any]:
    return {
        "right_expert": _share(rows, [row.names_right for row in rows]),
        "right": _share(rows, [row.outcome == "right" for row in rows]),
    }


def confusion(rows: Sequence[Graded]) -> dict[str, Any]:
    """Count wanted (rows) against called (columns) experts; several calls of one turn are one name, ``CXR+CXR``."""
    pairs = [(_names(row.wanted), _names(row.called)) for row in rows]
    labels = sorted({name for pair in pairs for name in pair})
    matrix = [[sum(pair == (wanted, called) for pair in pairs) for called in labels] for wanted in labels]
    return {"labels": labels, "matrix": matrix}


def _names(calls: Sequence[Trigger]) -> str:
    return "+".join(call.name for call in calls) or NOBODY


def describe_triggers(questions: Sequence[Question], predictions: Predictions) -> dict[str, Any]:
    """Tell the calls apart.

    Returns:
        ``outcomes`` with the share and number of each, with intervals by patient; ``per_expert`` for the cases that
        want it, ``per_kind`` and ``per_modality``; ``confusion`` of experts.
    """
    rows = list(judge_all(questions, predictions))
    outcomes = {
        name: _share(rows, [row.outcome == name for row in rows]) | {"cases": sum(row.outcome == name for row in rows)}
        for name in OUTCOMES
    }
    experts = sorted({_names(row.wanted) for row in rows if row.wanted})
    return {
        "outcomes": outcomes,
        "per_expert": {name: _both([row for row in rows if _names(row.wanted) == name]) for name in experts},
        "per_kind": _by(rows, "kind"),
        "per_modality": _by(rows, "modality"),
        "confusion": confusion(rows),
    }


def trigger_items(questions: Sequence[Question], predictions: Predictions) -> Iterator[Mapping[str, Any]]:
    """Yield what is told of each case beside its grades."""
    for row in judge_all(questions, predictions):
        yield {
            "question_id": row.question.id,
            "question": row.asked,
            "outcome": row.outcome,
            "kind": row.meta("kind"),
            "wanted": list(map(str, row.wanted)),
            "called": list(map(str, row.called)),
        }
