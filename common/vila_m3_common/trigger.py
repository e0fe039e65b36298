"""Triggers: how the VLM calls an expert, ``<NAME(argument)>`` in a turn that it generated itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

_TRIGGER = re.compile(r"<([A-Z][A-Za-z0-9_-]*)(?:\(([^<>()]*)\))?>")
_REPORT_BEFORE = re.compile(r"\busing\s*$")


@dataclass(frozen=True)
class Trigger:
    """A call of one expert.

    Args:
        name: the expert's name as on its card, for example ``VISTA3D``.
        argument: the text between the brackets without quotes and outer blanks; empty when none was given.
        is_report: whether the turn reports a result ("I outlined the organs using <VISTA3D(organs)>")
            instead of asking for one ("Let me trigger <VISTA3D(organs)>.").
    """

    name: str
    argument: str = ""
    is_report: bool = False

    def __str__(self) -> str:
        return f"<{self.name}({self.argument})>"


def parse_triggers(assistant_text: str) -> list[Trigger]:
    """Find the triggers of one assistant turn, in order.

    Only pass text that the model generated: the same characters in a question, a file name, a DICOM
    tag or an expert's text call nothing, and the agent never parses those.
    """
    return [
        Trigger(
            name=match.group(1),
            argument=(match.group(2) or "").strip().strip("'\"").strip(),
            is_report=_REPORT_BEFORE.search(assistant_text[: match.start()]) is not None,
        )
        for match in _TRIGGER.finditer(assistant_text)
    ]
