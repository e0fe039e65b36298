"""Brain MRI conversations with the BraTS expert: what it is, the glioma's grade, a segmentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vila_m3_common.errors import UserError
from vila_m3_common.prompts import (
    BRATS_LABELS,
    BRATS_REPORT,
    BRATS_REPORTED,
    MRI_DESCRIPTION,
    brats_feedback,
    glioma_grade,
    opening,
    trigger_reply,
)

from ..record import Message, Record

# Colours of a slice in which all three labels are present; the trained text names these.
COLORS: Mapping[int, str] = {1: "red", 2: "blue", 4: "yellow"}


def read_grade(path: str) -> bool:
    """Return whether a BraTS 2018 path is of a low grade glioma (folder ``LGG``), not a high grade one (``HGG``).

    Raises:
        UserError: if the path names neither.
    """
    if "LGG" not in path and "HGG" not in path:
        raise UserError("the path names neither LGG nor HGG; keep the folders of the BraTS release")
    return "LGG" in path


def sequences(images: Sequence[str], contrast_only: bool = False) -> tuple[str, ...]:
    """Return the four images of the opening: T1c, T1, T2, FLAIR, or T1c in all four places."""
    return (images[0],) * 4 if contrast_only else tuple(images[:4])


def describe_record(
    name: str, images: Sequence[str], label_image: str, question: str, cards: str, faithful: bool = False
) -> Record:
    """Ask what the images are.

    Args:
        name: id of the record.
        images: four sequences, see :func:`sequences`.
        label_image: listed only in the faithful form.
        question: the user's question.
        cards: text of the model cards.
        faithful: as the reference, list five images for a question without any placeholder.
    """
    text = question if faithful else opening("MRI", question, cards)
    shown = (*images, label_image) if faithful else tuple(images)
    messages = (Message("user", text), Message("assistant", MRI_DESCRIPTION))
    return Record(name, messages, shown, {"expert": "BRATS", "question_type": "describe"})


def grade_record(
    name: str,
    images: Sequence[str],
    label_image: str,
    question: str,
    is_low: bool,
    cards: str,
    labels: Sequence[int] = BRATS_LABELS,
) -> Record:
    """Ask for the glioma's grade; ``labels`` are those present in the slice."""
    replies = (trigger_reply("MRI"), glioma_grade(is_low))
    return _with_expert(name, images, label_image, question, replies, cards, labels, "grade")


def segment_record(
    name: str,
    images: Sequence[str],
    label_image: str,
    question: str,
    cards: str,
    labels: Sequence[int] = BRATS_LABELS,
) -> Record:
    """Ask for a segmentation; ``labels`` are those present in the slice."""
    replies = (BRATS_REPORT, BRATS_REPORTED)
    return _with_expert(name, images, label_image, question, replies, cards, labels, "segment")


def _with_expert(
    name: str,
    images: Sequence[str],
    label_image: str,
    question: str,
    replies: tuple[str, str],
    cards: str,
    labels: Sequence[int],
    kind: str,
) -> Record:
    messages = (
        Message("user", opening("MRI", question, cards)),
        Message("assistant", replies[0]),
        Message("expert", brats_feedback(labels, COLORS, question, "trained")),
        Message("assistant", replies[1]),
    )
    return Record(name, messages, (*images, label_image), {"expert": "BRATS", "question_type": kind})
