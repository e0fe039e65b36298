"""CT conversations with VISTA3D: requests to segment, what a slice shows, tumours and how many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vila_m3_common.prompts import ct_description, ct_feedback, opening, trigger_reply, tumor_count

from ..record import Message, Record


def parse_legend(label_colors: str) -> list[tuple[str, str]]:
    """Read ``"liver: red, spleen: blue"`` of a slice's metadata, in the order of its text."""
    pairs = [part.partition(": ") for part in label_colors.split(", ") if part]
    return [(first, second) for first, _, second in pairs]


def segment_record(name: str, image: str, question: str, report: str, cards: str) -> Record:
    """Ask for a segmentation; the reply reports it and ends the conversation."""
    messages = (Message("user", opening("CT", question, cards)), Message("assistant", report))
    return Record(name, messages, (image,), {"expert": "VISTA3D", "question_type": "segment"})


def describe_record(
    name: str,
    image: str,
    label_image: str,
    question: str,
    argument: str,
    legend: Sequence[tuple[str, str]],
    cards: str,
    faithful: bool = False,
) -> Record:
    """Ask what a slice shows.

    Args:
        name: id of the record.
        image: the slice.
        label_image: its overlay.
        question: the user's question.
        argument: the trigger's argument.
        legend: (first, second) as in ``first: second`` of the expert's turn.
        cards: text of the model cards.
        faithful: list one image for the two placeholders, as the reference does.
    """
    described = ", ".join(f"{first}: {second}" for first, second in legend)
    messages = (*_asked(question, argument, legend, cards), Message("assistant", ct_description(described)))
    images = (image,) if faithful else (image, label_image)
    return Record(name, messages, images, {"expert": "VISTA3D", "question_type": "describe"})


def tumor_record(
    name: str,
    image: str,
    label_image: str,
    question: str,
    argument: str,
    legend: Sequence[tuple[str, str]],
    counts: Mapping[str, int],
    count_question: str,
    cards: str,
) -> Record:
    """Ask whether there are tumours, and if so how many.

    Args:
        name: id of the record.
        image: the slice.
        label_image: its overlay.
        question: the first question.
        argument: the trigger's argument.
        legend: (first, second) as in ``first: second`` of the expert's turn.
        counts: kind of tumour -> number; empty when there are none.
        count_question: the second question, asked of a positive slice.
        cards: text of the model cards.
    """
    messages = [*_asked(question, argument, legend, cards), Message("assistant", "yes" if counts else "no")]
    if counts:
        messages += [Message("user", count_question), Message("assistant", tumor_count(counts))]
    metadata = {"expert": "VISTA3D", "question_type": "tumor"}
    return Record(name, tuple(messages), (image, label_image), metadata)


def _asked(question: str, argument: str, legend: Sequence[tuple[str, str]], cards: str) -> tuple[Message, ...]:
    return (
        Message("user", opening("CT", question, cards)),
        Message("assistant", trigger_reply("CT", argument)),
        Message("expert", ct_feedback(legend, question, "trained")),
    )
