"""The corrected reading of answers: one grammar for every benchmark.

An answer is read in this order::

    answer     := [label ":"] core [explanation]
    label      := "answer" | "final answer" | "diagnosis" | "impression" | "a" | up to four words before a colon
    core       := letters | yes | no | phrase
    letters    := a letter of the options alone, before ")" or in brackets: "(B) Cardiomegaly", "(A), (C)", "B."
    yes, no    := the words of POSITIVE and NEGATIVE as whole words; a negated positive ("no evidence of") is a no
    explanation:= what follows a line break, a full stop, or a comma before "this", "because", "as", ...

Refusals ("I cannot answer"), hedges without a word of decision ("cannot exclude"), empty texts and triggers are
*unparsable*: they count as wrong and are counted apart. Nothing here raises on any text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from vila_m3_common.prompts import CXR_FINDINGS, spoken
from vila_m3_common.trigger import parse_triggers

from .published import normalize_word

YesNo = Literal["yes", "no"]

POSITIVE = ("yes", "yeah", "true", "positive", "present", "abnormal", "correct", "y")
NEGATIVE = (
    "no",
    "not",
    "none",
    "nope",
    "false",
    "negative",
    "absent",
    "without",
    "normal",
    "nothing",
    "incorrect",
    "n",
)
# Words that name no side by themselves; a decision after them ("cannot exclude, yes") still counts.
_HEDGES = re.compile(
    r"\b(can\s?not|can't|could not|couldn't|may|might|not)\s+(be\s+)?(fully\s+|entirely\s+)?"
    r"(exclude[d]?|rule[d]? out|certain|sure|determined?|clear whether)\b"
)
_REFUSALS = re.compile(
    r"\b(i('m| am)? (sorry|unable|not able)|i (cannot|can't|can not|do not know|don't know)|as an ai|unable to (answer|"
    r"determine|assess|provide)|cannot (answer|determine|assess|provide)|not possible to (tell|answer|determine))\b"
)
_LABEL = re.compile(r"^\s*(?:[A-Za-z][\w'-]*\s+){0,3}[A-Za-z][\w'-]*\s*:\s*")
_EVIDENCE = re.compile(r"\b(there (is|are)|evidence of|signs? of|shows?|demonstrates?|seen|visible|consistent with)\b")
_ASIDE = re.compile(r"\([^()]*\)")
_EXPLANATION = re.compile(
    r"\n|(?<=\w)\.(?:\s|$)|,\s+(?=(?:this|that|because|as|since|which|it|the|there)\b)", re.IGNORECASE
)


def is_unparsable(text: str) -> bool:
    """Return whether a text decides nothing: empty, only marks, a refusal, or a call of an expert."""
    lowered = text.lower().replace("\u2019", "'")
    if not re.search(r"\w", lowered) or parse_triggers(text):
        return True
    return _REFUSALS.search(lowered) is not None and not _decided_last(lowered)


def _decided_last(lowered: str) -> bool:
    return re.search(r"\b(yes|no)\W*$", lowered) is not None


def drop_label(text: str) -> str:
    """Take ``Answer:``, ``Diagnosis:`` and the like off the front."""
    rest = _LABEL.sub("", text, count=1)
    return rest if rest.strip() else text


def parse_yes_no(text: str) -> YesNo | None:
    """Read an answer to a question that yes or no answers; None if it decides neither.

    A remark in brackets counts only where the rest decides nothing.
    A text that starts with a side is that side ("Yes, but not certain"); else the words *yes* and *no* outweigh
    others, and the last of them counts ("cannot exclude ... yes"); else a negation makes a no, and a positive
    word or a statement ("There is evidence of effusion") a yes.
    """
    if is_unparsable(text):
        return None
    lowered = drop_label(text.lower().replace("\u2019", "'"))
    rest = _ASIDE.sub(" ", lowered)
    return (_decide(rest) if re.search(r"\w", rest) else None) or _decide(lowered)


def _decide(lowered: str) -> YesNo | None:
    lowered = lowered.strip().strip("\"'()[]*. ")
    if lowered.startswith(("no evidence", "no sign")):
        return "no"
    without_hedges = _HEDGES.sub(" ", lowered)
    words = re.findall(r"[^\W\d_]+(?:'[a-z]+)?", without_hedges)
    if not words:
        return None
    if words[0] in ("yes", "no"):
        return "yes" if words[0] == "yes" else "no"
    plain = [word for word in words if word in ("yes", "no")]
    if plain and (plain[-1] == "yes" or words[-1] == "no"):
        return "yes" if plain[-1] == "yes" else "no"
    return _from_polarity(words, without_hedges)


def _from_polarity(words: Sequence[str], text: str) -> YesNo | None:
    if any(word in NEGATIVE or word.endswith("n't") for word in words):
        return "no"
    if any(word in POSITIVE for word in words) or _EVIDENCE.search(text) or "think so" in text:
        return "yes"
    return None


# Names of one finding; longer ones first, so that the short ones are not found inside them.
_SAME_FINDING = {
    "pleural effusion": "effusion",
    "lung opacity": "opacity",
    "airspace opacity": "opacity",
    "enlarged heart": "cardiomegaly",
}
_FINDINGS = {_SAME_FINDING.get(name, name) for name in map(spoken, CXR_FINDINGS)}


def parse_finding(text: str, finding: str) -> YesNo | None:
    """Read an answer to the question whether a finding is present; None if it decides nothing about this one.

    The words *yes* and *no* decide. Otherwise an answer that names other findings and not this one says nothing about
    it ("(B) Cardiomegaly", asked for a fracture), and one that names it says yes ("The patient has cardiomegaly")
    unless it is negated.
    """
    read = parse_yes_no(text)
    words = _spell_findings(drop_label(text))
    if re.search(r"\b(yes|no)\b(?!\s+\w)", words) or is_unparsable(text):
        return read
    asked = _spell_findings(finding).strip()
    if re.search(rf"\b{re.escape(asked)}\b", words):
        return read or "yes"
    names_other = any(re.search(rf"\b{re.escape(name)}\b", words) for name in _FINDINGS - {asked})
    return None if names_other else read


def _spell_findings(text: str) -> str:
    lowered = text.lower().replace("_", " ")
    for name, short in _SAME_FINDING.items():
        lowered = lowered.replace(name, short)
    return lowered


def parse_letters(text: str, options: Sequence[str]) -> tuple[str, ...] | None:
    """Read an answer to a multiple-choice question; None if it names no option.

    Args:
        text: the answer.
        options: names in the order of their letters; the first is (A).

    Returns:
        The letters in order, upper case. "(D) None of the above" is ("D",).
    """
    if is_unparsable(text):
        return None
    letters = [chr(ord("A") + place) for place in range(len(options))]
    span = f"A-{letters[-1]}"
    body = text if re.match(r"\s*[A-Za-z]\s*:", text) is None else text.split(":", 1)[1]
    found = re.findall(rf"\(\s*([{span}{span.lower()}])\s*\)", body)
    found += re.findall(rf"(?<![\w(])([{span}{span.lower()}])(?=\))", body)
    if not found and re.fullmatch(
        rf"[\W_]*(?:[{span}{span.lower()}](?:[\W_]+|$)|and\b[\W_]*)+", drop_label(body).strip() or "-"
    ):
        found = [mark for mark in re.findall(r"[A-Za-z]+", drop_label(body)) if len(mark) == 1]
    if found:
        return tuple(sorted({letter.upper() for letter in found}))
    if body.strip().lower().rstrip(".") == "none" and options[-1].lower().startswith("none"):
        return (letters[-1],)
    lowered = f" {normalize_word(body.lower())} "
    named = [
        letter for letter, name in zip(letters, options, strict=True) if f" {normalize_word(name.lower())} " in lowered
    ]
    return tuple(named) or None


def readings(text: str) -> list[str]:
    """Return the normalised texts that an open answer may be read as: whole, without label, without explanation."""
    candidates = [text, drop_label(text)]
    candidates += [_EXPLANATION.split(candidate.strip(), maxsplit=1)[0] for candidate in list(candidates)]
    phrase = re.match(r"\s*(?:the answer is|it is|this is)\s+(.*)", candidates[-1], re.IGNORECASE | re.DOTALL)
    if phrase:
        candidates.append(phrase.group(1))
    return list(dict.fromkeys(_as_set(candidate) for candidate in candidates))


def _as_set(text: str) -> str:
    """Normalise, and sort the parts of a list, whose order says nothing ("lung, heart")."""
    parts = [normalize_word(part.lower()) for part in re.split(r"[,;]|\band\b", text)]
    return ", ".join(sorted(part for part in parts if part))


def is_right(truth: str, text: str) -> bool | None:
    """Grade an answer, open or closed, against one true answer; None if it is unparsable.

    A yes/no truth takes a yes/no reading; any other truth equality of a normalised reading. The truth's own words are
    right whatever they hold, such as a call of an expert.
    """
    wanted = truth.strip().lower().rstrip(".")
    if wanted and text.strip().lower().rstrip(".") == wanted:
        return True
    if wanted in ("yes", "no"):
        read = parse_yes_no(text)
        return None if read is None else read == wanted
    if is_unparsable(text):
        return None
    return _as_set(truth) in readings(text)
