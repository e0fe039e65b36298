"""Chest X-ray conversations with the classifiers: any conversation, with the predictions before its answer."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from vila_m3_common.conversation import IMAGE_TOKEN, Role
from vila_m3_common.errors import UserError
from vila_m3_common.prompts import cxr_feedback, finding_lines, finding_turns, opening, spoken, trigger_reply

from ..record import Message, Record, resolve_image

# Who speaks in turn before the answer.
ROLES: tuple[Role, ...] = ("user", "assistant", "expert")


def read_scores(root: str | Path, image: str) -> dict[str, float]:
    """Read the saved predictions of an image, ``<root>/<image>.json``: finding -> probability.

    Raises:
        UserError: if the file is missing, or a probability is no number (files of single networks hold strings).
    """
    path = resolve_image(f"{image}.json", root)
    try:
        scores = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"predictions {image}.json cannot be read ({error}); run the expert on the image") from error
    if not isinstance(scores, dict) or any(
        isinstance(v, bool) or not isinstance(v, int | float) for v in scores.values()
    ):
        raise UserError(f"predictions {image}.json are not finding -> number; give those of the ensemble")
    return scores


def finding_messages(
    form: str, findings: Sequence[str], finding: str, scores: Mapping[str, float] | None = None, cards: str = ""
) -> tuple[Message, ...]:
    """Return the turns before the answer to a question for findings, as benchmarks ask it.

    Args:
        form: one of :data:`vila_m3_common.prompts.FINDING_FORMS`.
        findings: names in the order of their letters.
        finding: the name that all forms but ``multi_choice`` ask for.
        scores: an expert's findings; None asks without one.
        cards: text of the model cards.
    """
    lines = finding_lines(scores) if scores is not None else ""
    turns = finding_turns(form, findings, finding, lines, cards)
    return tuple(Message(role, text) for role, text in zip(ROLES, turns, strict=False))


def add_expert(record: Record, scores: dict[str, float], cards: str) -> Record:
    """Put the call of the expert and its predictions between a conversation's first question and answer.

    Args:
        record: a conversation about one image that begins with a question.
        scores: finding -> probability, in the order of the expert's turn.
        cards: text of the model cards.

    Raises:
        UserError: if the conversation has no question or not one image.
    """
    if not record.messages or record.messages[0].role != "user" or len(record.images) != 1:
        raise UserError(f"record {record.id} is no conversation about one image that begins with a question")
    # A placeholder at the end takes its line break along, one at the start leaves it; so were the weights trained.
    question = record.messages[0].text.replace(f"\n{IMAGE_TOKEN}", "").replace(IMAGE_TOKEN, "")
    messages = (
        Message("user", opening("CXR", question, cards)),
        Message("assistant", trigger_reply("CXR")),
        Message("expert", cxr_feedback(scores, question, "trained")),
        *record.messages[1:],
    )
    return replace(record, messages=messages)


def sample_and_split(
    records: Sequence[Record], root: str | Path, cards: str, count: int, test_share: float, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Draw conversations, add the expert to each, shuffle and split them, with the reference's random draws.

    Args:
        records: the conversations.
        root: folder of the saved predictions.
        cards: text of the model cards.
        count: how many to draw; fewer than there are.
        test_share: of the draw, rounded down.
        seed: of the draw.

    Returns:
        Train and test records.

    Raises:
        UserError: if ``count`` is too large, or predictions are missing.
    """
    if not 0 < count < len(records):
        raise UserError(f"{count} conversations cannot be drawn from {len(records)}; give 1..{len(records) - 1}")
    rng = random.Random(seed)
    drawn = [add_expert(record, read_scores(root, record.images[0]), cards) for record in rng.sample(records, count)]
    rng.shuffle(drawn)
    test_count = int(test_share * len(drawn))
    return drawn[test_count:], drawn[:test_count]


def multilabel_answer(findings: Sequence[str]) -> str:
    """Return the answer to which findings are present."""
    return f"Findings: {', '.join(map(spoken, findings))}." if findings else "No findings."
