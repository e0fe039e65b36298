"""Question wordings of expert conversations, from ``questions/expert_questions.json`` and ``questions.json``."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...questions import is_held_out, tables


@cache
def frames() -> dict[str, Any]:
    """Return the frames and what fills them."""
    path = Path(__file__).parents[1] / "questions" / "expert_questions.json"
    data: dict[str, Any] = json.loads(path.read_text())
    return data


def wordings(name: str, what: Sequence[str] = ("",)) -> list[str]:
    """Return every wording of a frame table: frame x view x what."""
    table = frames()
    return [
        frame.format(view=view, what=thing)
        for frame in table[f"{name}_frames"]
        for view in table["views"]
        for thing in what
    ]


def segment_wordings(argument: str) -> list[tuple[str, str, str]]:
    """Return (question, past verb, structures) of every segmentation request for an argument of VISTA3D."""
    data = tables()["ct_segment"]
    found = []
    for frame in data["frames"]:
        for verb, past in data["verbs"]:
            for what in data["objects"][argument]:
                text = frame.format(verb=verb, what=what)
                found.append((text[0].upper() + text[1:], past, what))
    return found


def describe_wordings(argument: str) -> list[str]:
    """Return every question for what a slice shows, of everything or of one group of VISTA3D."""
    if argument == "everything":
        return wordings("describe")
    return wordings("group", [frames()["groups"][argument]])


def tumor_wordings(argument: str) -> list[str]:
    """Return every question for a kind of tumour."""
    table = tables()
    return [
        frame.format(one=one, many=many, bare=bare)
        for frame in table["presence_frames"]
        for one, many, bare in table["ct_tumors"][argument]
    ]


def pick(candidates: Sequence[str], rng: random.Random, held_out: bool) -> str:
    """Choose a wording of one side of the split; training never sees held-out ones."""
    return rng.choice([text for text in candidates if is_held_out(text) == held_out])
