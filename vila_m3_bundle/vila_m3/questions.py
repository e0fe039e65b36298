"""Questions that people ask about a study, from the paraphrase tables in ``questions.json``."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from zlib import crc32

# One question in ten is kept out of training, chosen by its text, to measure unseen wordings.
HELD_OUT_SHARE = 0.1
_BRAIN_WORDS = ("brain", "glioma", "cerebral", "intracranial")
# Findings that no expert looks for on a CT.
_FILM_FINDINGS = ("Edema", "Emphysema", "Fibrosis", "Pneumonia", "Pneumothorax", "Effusion", "Atelectasis")


@dataclass(frozen=True)
class Question:
    """A question and what it is about.

    Args:
        text: the wording.
        kind: ``tumor``, ``describe``, ``group``, ``structure``, ``segment``, ``finding``, ``prediction``, ``grade``
            or ``modality``.
        argument: the trigger's argument, or the finding's name for ``finding`` and ``prediction``.
        target: the structure that decides yes or no; empty where none does.
        reply: the assistant's report for ``segment``.
    """

    text: str
    kind: str
    argument: str = ""
    target: str = ""
    reply: str = ""


@cache
def tables() -> dict[str, Any]:
    """Return the paraphrase tables."""
    data: dict[str, Any] = json.loads((Path(__file__).parent / "questions.json").read_text())
    return data


def is_held_out(text: str) -> bool:
    """Return whether a wording is kept for validation."""
    return crc32(text.encode()) % 100 < 100 * HELD_OUT_SHARE


def draw(make: Any, rng: random.Random, held_out: bool) -> Question:
    """Call ``make(rng)`` until its question lies on the wanted side of the split.

    A table all of whose wordings lie on the other side (that of ``describe`` for X-rays keeps none back) gives one of
    those after 200 draws: who counts unseen wordings asks :func:`is_held_out` of the text.
    """
    for _ in range(200):
        question: Question = make(rng)
        if is_held_out(question.text) == held_out:
            return question
    return question


def presence_question(rng: random.Random, forms: list[str]) -> str:
    """Fill a frame with a noun's forms: with article, plural, bare."""
    one, many, bare = forms
    return rng.choice(tables()["presence_frames"]).format(one=one, many=many, bare=bare)


def ct_tumor(rng: random.Random) -> Question:
    """Ask whether a CT shows tumours of one kind."""
    tumors = tables()["ct_tumors"]
    argument = rng.choice(list(tumors))
    return Question(presence_question(rng, rng.choice(tumors[argument])), "tumor", argument, argument)


def ct_describe(rng: random.Random) -> Question:
    """Ask what a CT shows, as a whole or of one group of structures."""
    groups = tables()["ct_group_questions"]
    if rng.random() < 0.5:
        return Question(rng.choice(tables()["describe"]), "describe", "everything")
    argument = rng.choice(list(groups))
    return Question(rng.choice(groups[argument]), "describe", argument)


def ct_segment(rng: random.Random) -> Question:
    """Ask for a segmentation of one group."""
    data = tables()["ct_segment"]
    argument = rng.choice(list(data["objects"]))
    what = rng.choice(data["objects"][argument])
    verb, past = rng.choice(data["verbs"])
    text = rng.choice(data["frames"]).format(verb=verb, what=what)
    text = text[0].upper() + text[1:] if rng.random() < 0.85 else text
    return Question(text, "segment", argument, reply=f"I {past} {what} using <VISTA3D({argument})>.")


def cxr_finding(rng: random.Random, asked: Sequence[str] | None = None) -> Question:
    """Ask for one of the 18 findings, or of those ``asked``."""
    return _about_finding(rng, asked, "cxr_frames", "finding")


def cxr_prediction(rng: random.Random, asked: Sequence[str] | None = None) -> Question:
    """Ask what the expert says of one of the 18 findings, or of those ``asked``."""
    return _about_finding(rng, asked, "cxr_prediction_frames", "prediction")


def _about_finding(rng: random.Random, asked: Sequence[str] | None, frames: str, kind: str) -> Question:
    findings = tables()["cxr_findings"]
    finding = rng.choice(list(asked or findings))
    text = rng.choice(tables()[frames]).format(what=rng.choice(findings[finding]))
    return Question(text, kind, finding, finding)


def from_table(name: str, kind: str) -> Any:
    """Return a maker that draws from a plain list of wordings."""
    return lambda rng: Question(rng.choice(tables()[name]), kind)


def foreign_questions(rng: random.Random, held_out: bool) -> dict[str, str]:
    """Return, for a radiograph, a CT and a brain MRI, a question that only an expert of another modality could answer.

    Args:
        rng: draws them.
        held_out: whether in wordings that training never sees.
    """
    brain = [text for text in tables()["mri_tumor"] if any(word in text.lower() for word in _BRAIN_WORDS)]
    brain = [text for text in brain if held_out or not is_held_out(text)]

    def on_brain() -> str:
        return rng.choice(brain)

    def on_belly() -> str:
        return _belly_question(rng, held_out)

    def on_film() -> str:
        return draw(lambda generator: cxr_finding(generator, _FILM_FINDINGS), rng, held_out).text

    chosen = [rng.choice(makers) for makers in ((on_brain, on_belly), (on_brain, on_film), (on_belly, on_film))]
    return {modality: make() for modality, make in zip(("CXR", "CT", "MRI"), chosen, strict=True)}


def _belly_question(rng: random.Random, held_out: bool) -> str:
    for _ in range(500):
        question = draw(rng.choice((ct_tumor, ct_segment)), rng, held_out)
        if question.argument in ("hepatic tumor", "pancreatic tumor"):
            return question.text
    raise RuntimeError("no question about liver or pancreas was drawn")
