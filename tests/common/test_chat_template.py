"""Against the prompts that VILA-1.5's own conversation code rendered (golden/vila/templates.json)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vila_m3_common.chat_template import TEMPLATES, Rendered, get_template, render
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError

IMAGE = np.zeros((2, 2, 3), np.uint8)
NAMES = ("vicuna_v1", "llama_3", "hermes-2")


@pytest.fixture(scope="module")
def recorded(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden/vila/templates.json").read_text())


def conversation_of(texts: list[str]) -> Conversation:
    """User and assistant in turn, with a black image for every placeholder."""
    conversation = Conversation()
    for index, text in enumerate(texts):
        conversation.add("assistant" if index % 2 else "user", text, [IMAGE] * text.count("<image>"))
    return conversation


def supervised(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.spans]


@pytest.mark.parametrize("name", NAMES)
def test_recorded_prompts_are_reproduced(recorded: dict[str, Any], name: str) -> None:
    turns, prompts, template = recorded["turns"], recorded["templates"][name], get_template(name)
    assert render(conversation_of(turns), template).text == prompts["three_turn_full"]
    assert render(conversation_of(turns[:5]), template).text == prompts["three_turn_generate_None"]
    assert render(conversation_of(turns[:5]), template).text == prompts["three_turn_generate_empty"]
    assert render(conversation_of(turns[:1]), template).text == prompts["first_turn_generate"]
    assert render(conversation_of(["<image>\nLook  here"]), template).text == prompts["tuple_first_message"]
    assert template.system == prompts["no_messages"]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("vicuna_v1", ["</s>", "</s>", "</s>"]),
        ("llama_3", ["<|eot_id|>", "<|eot_id|>", "<|end_of_text|>"]),
        ("hermes-2", ["<|im_end|>"] * 3),
    ],
)
def test_only_answers_and_their_ends_are_supervised(recorded: dict[str, Any], name: str, ends: list[str]) -> None:
    rendered = render(conversation_of(recorded["turns"]), get_template(name))
    # The blank behind "ASSISTANT:" is the reply's first token in the recorded labels.
    gap = get_template(name).assistant_gap
    answers = ["Answer one.", "Answer two.", "Answer three."]
    assert supervised(rendered) == [gap + answer + end for answer, end in zip(answers, ends, strict=True)]


def test_plain_keeps_images_and_caption_and_drops_the_question() -> None:
    rendered = render(conversation_of(["<image>\nDescribe it.", "A chest X-ray."]), get_template("plain"))
    assert rendered.text == "<image>A chest X-ray.\n"
    assert supervised(rendered) == ["A chest X-ray.\n"]


def test_an_expert_turn_is_rendered_as_the_users() -> None:
    conversation = conversation_of(["<image>Is there a tumor?", "Let me trigger <VISTA3D(hepatic tumor)>."])
    conversation.add("expert", "The results are <image>.", [IMAGE])
    as_user = conversation_of(
        ["<image>Is there a tumor?", "Let me trigger <VISTA3D(hepatic tumor)>.", "The results are <image>."]
    )
    assert render(conversation, TEMPLATES["llama_3"]) == render(as_user, TEMPLATES["llama_3"])


def test_an_expert_turn_followed_by_a_question_is_one_user_turn() -> None:
    conversation = conversation_of(["Hello", "Hi"])
    conversation.add("expert", "The results are <image>.", [IMAGE])
    conversation.add("user", "And now?")
    assert "USER: The results are <image>.\nAnd now? ASSISTANT:" in render(conversation, TEMPLATES["vicuna_v1"]).text


def test_an_unknown_template_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(UserError, match="unknown chat template 'llama3'; valid: plain, vicuna_v1, llama_3, hermes-2"):
        get_template("llama3")
