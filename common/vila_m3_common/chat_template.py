"""Conversation -> prompt text, with the spans of it that training supervises.

The templates are VILA-1.5's (llava/conversation.py): ``plain`` for alignment, ``vicuna_v1`` for the
3B and 13B models, ``llama_3`` for the 8B and the nano model, ``hermes-2`` for the 40B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .conversation import IMAGE_TOKEN, Conversation, Turn
from .errors import UserError

_HELPFUL = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


@dataclass(frozen=True)
class ChatTemplate:
    """How turns become text.

    Args:
        name: the template's name in checkpoints and configs.
        system: the text before the first turn, with its separator.
        user_prefix: text before a user turn.
        user_end: text after a user turn.
        assistant_prefix: text before an assistant turn.
        assistant_gap: what stands between the prefix and the answer's first character.
        assistant_end: text after an assistant turn.
        final_end: text after the last assistant turn of a conversation.
        stop: the string that ends a generated turn.
    """

    name: str
    system: str
    user_prefix: str
    user_end: str
    assistant_prefix: str
    assistant_gap: str
    assistant_end: str
    final_end: str
    stop: str


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation: ``text[start:end]`` of every span is supervised in training."""

    text: str
    spans: tuple[tuple[int, int], ...]


TEMPLATES = {
    template.name: template
    for template in (
        ChatTemplate("plain", "", "", "", "", "", "\n", "\n", "\n"),
        ChatTemplate("vicuna_v1", _VICUNA + " ", "USER: ", " ", "ASSISTANT:", " ", "</s>", "</s>", "</s>"),
        ChatTemplate(
            "llama_3",
            f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{_HELPFUL}<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|>",
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            "",
            "<|eot_id|>",
            "<|end_of_text|>",
            "<|eot_id|>",
        ),
        ChatTemplate(
            "hermes-2",
            "<|im_start|>system\nAnswer the questions.<|im_end|>",
            "<|im_start|>user\n",
            "<|im_end|>",
            "<|im_start|>assistant\n",
            "",
            "<|im_end|>",
            "<|im_end|>",
            "<|im_end|>",
        ),
    )
}


def get_template(name: str) -> ChatTemplate:
    """Return a template by name.

    Raises:
        UserError: for an unknown name; the message lists the valid ones.
    """
    if name not in TEMPLATES:
        raise UserError(f"unknown chat template {name!r}; valid: {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def merge_speakers(turns: Sequence[Turn]) -> list[Turn]:
    """Render expert turns as user turns and join neighbours of one side with a line break.

    The released weights only saw strictly alternating turns; two experts in a row, or a question
    after an expert's text, become one user turn.
    """
    merged: list[Turn] = []
    for turn in turns:
        role = "assistant" if turn.role == "assistant" else "user"
        if merged and merged[-1].role == role:
            last = merged.pop()
            merged.append(Turn(last.role, f"{last.text}\n{turn.text}", last.images + turn.images))
        else:
            merged.append(Turn(role, turn.text, turn.images))  # type: ignore[arg-type]
    return merged


def render(conversation: Conversation, template: ChatTemplate) -> Rendered:
    """Render a conversation for training (last turn is the assistant's) or generation (otherwise).

    For generation the text ends with the assistant's prefix. The end of every assistant turn belongs
    to its span, so that the model learns to stop.
    """
    turns = merge_speakers(conversation.context)
    if template.name == "plain":
        return _render_plain(turns, template)
    text = template.system
    spans: list[tuple[int, int]] = []
    for index, turn in enumerate(turns):
        if turn.role == "user":
            text += template.user_prefix + turn.text + template.user_end
            continue
        text += template.assistant_prefix
        # The gap is the reply's: a prompt ends without it, so the model has to write it.
        start = len(text)
        is_last = index == len(turns) - 1
        text += template.assistant_gap + turn.text + (template.final_end if is_last else template.assistant_end)
        spans.append((start, len(text)))
    if not turns or turns[-1].role == "user":
        text += template.assistant_prefix
    return Rendered(text, tuple(spans))


def _render_plain(turns: Sequence[Turn], template: ChatTemplate) -> Rendered:
    """Alignment stage: the image placeholders alone, then the caption; the question is dropped."""
    images = IMAGE_TOKEN * sum(len(turn.images) for turn in turns)
    captions = [turn.text for turn in turns if turn.role == "assistant"]
    text = images
    spans = []
    for caption in captions:
        spans.append((len(text), len(text) + len(caption) + len(template.assistant_end)))
        text += caption + template.assistant_end
    return Rendered(text, tuple(spans))
