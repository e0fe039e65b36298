"""The class table of VISTA3D: names, ids, the groups that stand on the model card, and other words for them.

The numbers are in ``vila_m3_common.anatomy``, which training and data preparation read too; the other words are in
``synonyms.json`` beside this file.
"""

from __future__ import annotations

import ast
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

from vila_m3_common.anatomy import GROUPS, NAMES, TABLE
from vila_m3_common.errors import UserError, near_match_hint

NewClasses = Mapping[Any, str] | None

DEFAULT_GROUP = "everything"
# The Model Zoo's bundle leaves the ids above 132 up to this one to classes that a user adds.
LAST_NEW_CLASS = 254
# The id in a label map of what was marked by points without a class; no class can have it.
MARKED_OBJECT = 255
MARKED_NAME = "marked object"
# Classes without a class prompt whose place another class has taken (the Model Zoo bundle's page on inference).
REPLACEMENTS = {16: 118, 130: 26}


@dataclass(frozen=True)
class LabelTable:
    """The content of ``vila_m3_common/anatomy.json`` and ``synonyms.json``.

    Args:
        names: class id -> name, 132 of them.
        groups: argument of the model card -> class ids.
        argument_synonyms: other word for a group -> group.
        class_synonyms: other word for classes -> their names.
        subclasses: id of a parent class -> ids of its parts. The network answers a parent prompt
            with an empty mask, so the parts are prompted in its place.
        without_class_prompt: ids that the network segments only from points.
        tumors: ids of the four tumour classes of the card.
    """

    names: dict[int, str]
    groups: dict[str, tuple[int, ...]]
    argument_synonyms: dict[str, str]
    class_synonyms: dict[str, list[str]]
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
    synonyms = json.loads((Path(__file__).parent / "synonyms.json").read_text())
    return LabelTable(
        names=NAMES,
        groups=GROUPS,
        argument_synonyms=synonyms["arguments"],
        class_synonyms=synonyms["classes"],
        subclasses={int(label): tuple(parts) for label, parts in raw["subclasses"].items()},
        without_class_prompt=tuple(raw["without_class_prompt"]),
        tumors=tuple(raw["tumors"]),
    )


def spoken_names(prompted: Iterable[int] = (), new_classes: NewClasses = None) -> dict[int, str]:
    """Return id -> name over all groups; an id in no group has no name in the expert turn.

    Args:
        prompted: ids that a user asked for; they get a name whatever group they are in.
        new_classes: see :func:`read_new_classes`.
    """
    table = label_table()
    grouped = {label for labels in table.groups.values() for label in labels}
    names = {label: name for label, name in table.names.items() if label in grouped}
    known = {**table.names, **read_new_classes(new_classes)}
    return {**names, **{label: known.get(label, MARKED_NAME) for label in prompted}}


def read_new_classes(new_classes: NewClasses) -> dict[int, str]:
    """Return id -> name of classes that a network was fine-tuned for and that VISTA3D does not have.

    Args:
        new_classes: id (in JSON a text) -> name; None for no classes.

    Raises:
        UserError: if an id is not free.
    """
    read = {}
    for label, name in (new_classes or {}).items():
        number = _as_number(label)
        if number is None or not len(NAMES) < number <= LAST_NEW_CLASS:
            raise UserError(
                f"new class {name!r} cannot have the id {label!r}; free are {len(NAMES) + 1} to {LAST_NEW_CLASS}"
            )
        read[number] = str(name)
    return read


def argument_synonyms() -> dict[str, str]:
    """Return other word -> argument of the model card."""
    return label_table().argument_synonyms


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
    group = table.argument_synonyms.get(given.lower(), given)
    if group not in table.groups:
        valid = list(table.groups)
        hint = near_match_hint(given, valid)
        raise UserError(f"unknown VISTA3D argument {given!r}; {hint}Valid: {', '.join(valid)}")
    return expand_subclasses(table.groups[group])


def prompt_ids(label_prompt: Any, new_classes: NewClasses = None) -> list[int]:
    """Return the class prompts for what a user may give.

    Args:
        label_prompt: class ids, class names or group names: one of them, a list, or a list written
            as text (``"['liver', 26]"``, ``"liver, spleen"``).
        new_classes: see :func:`read_new_classes`.

    Returns:
        Class ids without parents and without repetitions, in the order given.

    Raises:
        UserError: if the prompt is empty or holds something that cannot be prompted.
    """
    added = read_new_classes(new_classes)
    wanted = [label for entry in _as_list(label_prompt) for label in _entry_ids(entry, added)]
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


def point_class(label_prompt: Any) -> int | None:
    """Return the class that points are clicked for; None when the prompt names none.

    Args:
        label_prompt: one class name or id, or an id from 133 to 254 for a structure that VISTA3D does not know.

    Raises:
        UserError: if it is unknown, more than one class, or a parent class.
    """
    entries = [] if label_prompt is None else _as_list(label_prompt)
    if not entries:
        return None
    number = _as_number(entries[0])
    is_new = number is not None and len(label_table().names) < number <= LAST_NEW_CLASS
    labels = (number,) if is_new else _named_ids(entries[0])
    if len(entries) > 1 or len(labels) > 1:
        raise UserError(f"points mark one structure, but label_prompt is {label_prompt!r}; give one class, or none")
    label = int(labels[0] or 0)
    parts = label_table().subclasses.get(label)
    if parts:
        names = ", ".join(label_table().names[part] for part in parts[:5])
        raise UserError(
            f"points cannot mark {label_table().names[label]!r} ({label}), which VISTA3D segments in parts; "
            f"give the part under the points ({names}{', ...' if len(parts) > 5 else ''})"
        )
    return label


def has_class_prompt(label: int) -> bool:
    """Return whether the network segments the class without points."""
    return label in label_table().promptable()


def _entry_ids(entry: Any, added: Mapping[int, str]) -> Sequence[int]:
    number, name = _as_number(entry), str(entry).strip().lower()
    new = [label for label, called in added.items() if label == number or called.lower() == name]
    return new or [_check_promptable(label) for label in _named_ids(entry)]


def _as_number(entry: Any) -> int | None:
    if isinstance(entry, Integral) and not isinstance(entry, bool):
        return int(entry)
    text = str(entry).strip()
    return int(text) if text.isdigit() else None


def _named_ids(entry: Any) -> Sequence[int]:
    """Return the ids of a class id, a class name, a group or another word for one of them."""
    table = label_table()
    number = _as_number(entry)
    if number is not None:
        return [_check_known(number)]
    name, ids = str(entry).strip().lower(), table.ids_by_name()
    names = [name] if name in ids else table.class_synonyms.get(name)
    if names:
        return [ids[known] for known in names]
    group = table.argument_synonyms.get(name, name)
    if group in table.groups:
        return table.groups[group]
    hint = near_match_hint(name, [*ids, *table.class_synonyms, *table.groups, *table.argument_synonyms])
    raise UserError(
        f"unknown VISTA3D class {str(entry)!r}; {hint}Valid: the names and ids (1..{len(table.names)}) of "
        "vila_m3_common/anatomy.json, "
        f"and the groups {', '.join(table.groups)}"
    )


def _check_known(label: int) -> int:
    table = label_table()
    if label not in table.names:
        raise UserError(
            f"unknown VISTA3D class id {label}; Valid: 1..{len(table.names)}, see vila_m3_common/anatomy.json"
        )
    return label


def _check_promptable(label: int) -> int:
    table = label_table()
    if label in table.without_class_prompt:
        other = REPLACEMENTS.get(label)
        raise UserError(
            f"VISTA3D cannot segment {table.names[label]!r} ({label}) from a class prompt, only from points; "
            + (f"ask for {table.names[other]!r} ({other}) instead" if other else "leave it out of label_prompt")
        )
    return label


def expand_subclasses(labels: Sequence[int]) -> list[int]:
    """Replace parent classes by their parts and drop repetitions, keeping the order."""
    subclasses = label_table().subclasses
    expanded = [part for label in labels for part in subclasses.get(label, (label,))]
    return list(dict.fromkeys(expanded))


def mapped_classes(label_mappings: Mapping[str, Sequence[Sequence[int]]]) -> list[int]:
    """Return the VISTA3D ids that class mappings lead to, ascending: what a fine-tuned network is asked for.

    Raises:
        UserError: if nothing is mapped.
    """
    targets = sorted({int(target) for pairs in label_mappings.values() for _, target in pairs})
    if not targets:
        raise UserError(
            "label_mappings is empty; say which class of the data set is which of VISTA3D, such as "
            f'{{"default": [[1, 3]]}}, with ids from 133 to {LAST_NEW_CLASS} for classes that VISTA3D does not have'
        )
    return targets
