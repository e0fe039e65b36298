"""A conversation: turns of a user, an assistant and expert models, with the images they show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Role = Literal["user", "assistant", "expert"]

IMAGE_TOKEN = "<image>"
# Control strings of the supported chat templates; none may come from text that somebody typed.
_CONTROL_STRINGS = re.compile(r"<image>|<\|[^<>|]{1,64}\|>|</?s>|\[PAD\]|<pad>|<unk>", re.IGNORECASE)


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Args:
        role: who speaks. An expert turn is rendered as a user turn by every chat template.
        text: the text, with one ``<image>`` placeholder per image.
        images: RGB images in the order of their placeholders, each ``(H, W, 3)`` uint8.
        in_context: whether the model reads this turn. Feedback to a trigger that only reports
            ("I segmented the liver using <VISTA3D(organs)>") is recorded but not read, as trained.

    Raises:
        ValueError: if the number of placeholders differs from the number of images.
    """

    role: Role
    text: str
    images: tuple[np.ndarray, ...] = ()
    in_context: bool = True

    def __post_init__(self) -> None:
        placeholder_count = self.text.count(IMAGE_TOKEN)
        if placeholder_count != len(self.images):
            raise ValueError(
                f"a {self.role} turn has {placeholder_count} {IMAGE_TOKEN} placeholders for {len(self.images)} images"
            )


@dataclass
class Conversation:
    """Turns in order; append with :meth:`add`."""

    turns: list[Turn] = field(default_factory=list)

    def add(self, role: Role, text: str, images: Sequence[np.ndarray] = (), in_context: bool = True) -> Turn:
        """Append a turn and return it."""
        turn = Turn(role, text, tuple(images), in_context)
        self.turns.append(turn)
        return turn

    @property
    def context(self) -> list[Turn]:
        """The turns that the model reads."""
        return [turn for turn in self.turns if turn.in_context]

    @property
    def images(self) -> list[np.ndarray]:
        """All images that the model sees, in placeholder order."""
        return [image for turn in self.context for image in turn.images]


def neutralise(text: str) -> str:
    """Take image placeholders and chat-template control strings out of text that somebody typed.

    A question that holds ``<image>`` or ``<|eot_id|>`` must neither shift the images nor end a turn.
    Repeats until nothing is left, so that ``<im<image>age>`` does not become a placeholder.
    """
    while True:
        cleaned = _CONTROL_STRINGS.sub("", text)
        if cleaned == text:
            return cleaned
        text = cleaned
