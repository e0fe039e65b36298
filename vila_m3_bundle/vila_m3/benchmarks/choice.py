"""Multiple choice of questions that list their options as lines ``A. ...``: the letter of the answer is graded."""

from __future__ import annotations

import re

from .answers import drop_label, parse_letters

_OPTION = re.compile(r"^([A-Z])[.)] +(.+)$", re.MULTILINE)

_LEADING = re.compile(r"\W*(?:(?i:the (?:correct )?answer is)\s+)?\(?([A-Z])(?:[.):]|\s*$)")
_BRACKETED = re.compile(r"\(([A-Z])\)")


def options_of(question: str) -> dict[str, str]:
    """Return letter -> text of the options that a question lists."""
    return dict(_OPTION.findall(question))


def is_choice_right(question: str, truth: str, text: str) -> bool | None:
    """Grade an answer to a multiple-choice question; None if it names no option, or several.

    Args:
        question: with its options.
        truth: the true answer, ``B. Aspirin``.
        text: the answer: ``B``, ``(B)``, ``B. Aspirin``, ``The answer is B.`` or ``Aspirin``.
    """
    options = options_of(question)
    wanted = truth.strip()[:1]
    leading = _LEADING.match(drop_label(text).strip())
    if leading and len(set(_BRACKETED.findall(text))) < 2 and leading.group(1) in options:
        return leading.group(1) == wanted
    letters = parse_letters(text, list(options.values()))
    if letters is None or len(letters) != 1:
        return None
    return list(options)[ord(letters[0]) - ord("A")] == wanted
