"""The class table of VISTA3D: names, ids, and the groups that stand on the model card.

The numbers are in ``vila_m3_common.anatomy``, which training and data preparation read too.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from vila_m3_common.anatomy import GROUPS, NAMES, TABLE
from vila_m3_common.errors import UserError, near_match_hint

DEFAULT_GROUP = "everything"


@dataclass(frozen=True)
class LabelTable:
    """The content of ``vila_m3_common/anatomy.json``.

    Args:
        names: class id -> name, 132 of them.
        groups: argument of the model card -> class ids.
        synonyms: other word for a group -> group.
        subclasses: id of a parent class -> ids of its parts. The network answers a parent prompt
            with an empty mask, so the parts are prompted in its place.
        without_class_prompt: ids that the network segments only from points.
        tumors: ids of the four tumour classes of the card.
    """

    names: dict[int, str]
    groups: dict[str, tuple[int, ...]]
    synonyms: dict[str, str]
    subclasses: dict[int, tuple[int, ...]]
    without_class_prompt: tuple[int, ...]
    tumors: tuple[int, ...]

    def ids_by_name(self) -> dict[str, int]:
        """Return lower-case name -> id."""
        return {name.lower(): label for label, name in self.names.items()}

    def promptable(self) -> tuple[int, ...]:
        """Return the ids that the network segments from a class prompt, ascending."""
        left_out = {*self.without_class_prompt, *self.subclasses}
        return tuple(label for label in self.names if label not in left_out)


@functools.cache
def label_table() -> LabelTable:
    """Return the table, made once."""
    raw = TABLE
    return LabelTable(
        names=NAMES,
        groups=GROUPS,
        synonyms=raw["synonyms"],
        subclasses={int(label): tuple(parts) for label, parts in raw["subclasses"].items()},
        without_class_prompt=tuple(raw["without_class_prompt"]),
        tumors=tuple(raw["tumors"]),
    )


def spoken_names() -> dict[int, str]:
    """Return id -> name over all groups; an id in no group has no name in the expert turn."""
    table = label_table()
    grouped = {label for labels in table.groups.values() for label in labels}
    return {label: name for label, name in table.names.items() if label in grouped}


def tumor_names() -> tuple[str, ...]:
    """Return the names of the tumour classes."""
    table = label_table()
    return tuple(table.names[label] for label in table.tumors)


def argument_ids(argument: str) -> list[int]:
    """Return the class prompts of a trigger's argument; an empty one means ``everything``.

    Raises:
        UserError: if the argument is no group of the model card.
    """
    table = label_table()
    given = argument.strip() or DEFAULT_GROUP
    group = table.synonyms.get(given, given)
    if group not in table.groups:
        valid = list(table.groups)
        hint = near_match_hint(given, valid)
        raise UserError(f"unknown VISTA3D argument {given!r}; {hint}Valid: {', '.join(valid)}")
    return expand_subclasses(table.groups[group])


def prompt_ids(label_prompt: Any) -> list[int]:
    """Return the class prompts for what a user may give.

    Args:
        label_prompt: class ids, class names or group names: one of them, a list, or a list written
            as text (``"['liver', 26]"``, ``"liver, spleen"``).

    Returns:
        Class ids without parents and without repetitions, in the order given.

    Raises:
        UserError: if the prompt is empty or holds something that cannot be prompted.
    """
    wanted = [label for entry in _as_list(label_prompt) for label in _entry_ids(entry)]
    if not wanted:
        raise UserError("label_prompt is empty; give class names or ids, such as \"['liver', 'hepatic tumor']\"")
    return expand_subclasses(wanted)


def _as_list(label_prompt: Any) -> list[Any]:
    if isinstance(label_prompt, str):
        return _parse_text(label_prompt)
    if isinstance(label_prompt, Sequence):
        return list(label_prompt)
    return [label_prompt]


def _parse_text(text: str) -> list[Any]:
    if not text.strip().startswith("["):
        return [part.strip() for part in text.split(",") if part.strip()]
    try:
        return list(ast.literal_eval(text.strip()))
    except (ValueError, SyntaxError) as error:
        raise UserError(f"label_prompt {text!r} is no list; write it as \"['liver', 26]\"") from error


def _entry_ids(entry: Any) -> Sequence[int]:
    table = label_table()
    if isinstance(entry, Integral) and not isinstance(entry, bool):
        return [_check_id(int(entry))]
    name = str(entry).strip().lower()
    if name.isdigit():
        return [_check_id(int(name))]
    label = table.ids_by_name().get(name)
    if label is not None:
        return [_check_id(label)]
    group = table.synonyms.get(name, name)
    if group in table.groups:
        return table.groups[group]
    hint = near_match_hint(name, [*table.ids_by_name(), *table.groups, *table.synonyms])
    raise UserError(
        f"unknown VISTA3D class {str(entry)!r}; {hint}Valid: the names and ids (1..{len(table.names)}) of "
        "vila_m3_common/anatomy.json, "
        f"and the groups {', '.join(table.groups)}"
    )


def _check_id(label: int) -> int:
    table = label_table()
    if label not in table.names:
        raise UserError(
            f"unknown VISTA3D class id {label}; Valid: 1..{len(table.names)}, see vila_m3_common/anatomy.json"
        )
    if label in table.without_class_prompt:
        raise UserError(
            f"VISTA3D cannot segment {table.names[label]!r} ({label}) from a class prompt, only from points; "
            "leave it out of label_prompt"
        )
    return label


def expand_subclasses(labels: Sequence[int]) -> list[int]:
    """Replace parent classes by their parts and drop repetitions, keeping the order."""
    subclasses = label_table().subclasses
    expanded = [part for label in labels for part in subclasses.get(label, (label,))]
    return list(dict.fromkeys(expanded))
