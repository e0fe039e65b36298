"""Report cleaning of the original: sentences without headings, numbers, questions and repetitions."""

from __future__ import annotations

import re

# A blank after a stop ends a sentence, but not in "p.m." or "Dr."; so does a stop before a letter ("contour.Lungs").
_SENTENCE_END = re.compile(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=[.!?])\s+|(?<=\.)(?=[^\s\d])")
_LEADING = re.compile(r"^[\W\d_]+")
# The original drops sentences of six characters or fewer: "Ok.", "Large."
_SHORTEST = 7


def split_sentences(text: str) -> list[str]:
    """Return the sentences of a report, stripped."""
    return [sentence for part in _SENTENCE_END.split(text) if (sentence := part.strip())]


def clean_report(text: str, joins_lines: bool = True) -> str:
    r"""Return a report as the original cleans it (130 recorded cases); empty when nothing is left.

    Args:
        text: the report.
        joins_lines: whether a line break is deleted, as in the original, where "congestion\nFINDINGS:" becomes
            "congestionFINDINGS:"; False makes it a blank.
    """
    text = re.sub(r"\s+", " ", text.replace("\n", "" if joins_lines else " ")).replace(" .", ".")
    kept: list[str] = []
    for part in split_sentences(text):
        sentence = _clean_sentence(part)
        if len(sentence) < _SHORTEST or "?" in sentence:
            continue
        if sentence[-1] not in ".!?":
            sentence += "."
        if sentence not in kept:
            kept.append(sentence)
    return " ".join(kept)


def _clean_sentence(sentence: str) -> str:
    head, colon, rest = sentence.partition(": ")
    sentence = _LEADING.sub("", rest if colon else head)
    return sentence[:1].upper() + sentence[1:]
