from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vila_m3.model import IGNORED_LABEL, IMAGE_TOKEN_ID
from vila_m3.phantom_conversations import ConversationMaker
from vila_m3.processor import Processor, to_pixel_values
from vila_m3.training import supervised_runs
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError


@pytest.mark.parametrize(("size", "name"), [(72, "img0"), (72, "img1"), (72, "img2"), (384, "img0")])
def test_resizing_equals_the_recorded_preprocessing(shared: Path, name: str, size: int) -> None:
    recorded = np.load(shared / "golden/vila/preprocess.npz")[f"siglip{size}.resize.{name}"]
    image = np.asarray(Image.open(shared / f"golden/vila/{name}.png"))
    np.testing.assert_allclose(to_pixel_values(image, size).numpy(), recorded, atol=1e-6)


def one_question() -> Conversation:
    conversation = Conversation()
    conversation.add("user", "<image>What is it?", [np.zeros((8, 8, 3), np.uint8)])
    return conversation


def test_every_visual_token_has_its_place(processor: Processor) -> None:
    encoded = processor(one_question())
    assert int((encoded.input_ids == IMAGE_TOKEN_ID).sum()) == processor.tokens_per_image == 4
    assert encoded.pixel_values.shape == (1, 3, 42, 42)


def test_only_assistant_turns_are_supervised_to_their_end(processor: Processor) -> None:
    conversation = one_question()
    conversation.add("assistant", "a CT")
    conversation.add("expert", "expert text")
    conversation.add("assistant", "yes")
    encoded = processor(conversation)
    runs = supervised_runs(encoded.labels)
    texts = [
        processor.tokenizer.decode(encoded.labels[start:end].tolist(), skip_special_tokens=False) for start, end in runs
    ]
    assert texts == ["a CT<|eot_id|>", "yes<|end_of_text|>"]
    kept = encoded.labels != IGNORED_LABEL
    assert torch.equal(encoded.labels[kept], encoded.input_ids[kept])


def test_generation_starts_from_the_tokens_of_training(processor: Processor, maker: ConversationMaker) -> None:
    """What stands before a reply is tokenized the same with the reply behind it and without."""
    for seed in range(40):
        conversation = maker(seed).conversation
        trained = processor(conversation).input_ids
        while conversation.turns:
            if conversation.turns.pop().role == "assistant":
                asked = processor(conversation).input_ids
                assert torch.equal(asked, trained[: len(asked)])


def test_conversations_of_every_kind_fit_the_model(processor: Processor, maker: ConversationMaker) -> None:
    for seed in range(60):
        conversation = maker(seed).conversation
        encoded = processor(conversation)
        assert len(encoded.pixel_values) == len(conversation.images)
        assert len(supervised_runs(encoded.labels)) == sum(turn.role == "assistant" for turn in conversation.context)


def test_a_conversation_beyond_the_context_is_refused(processor: Processor) -> None:
    processor.max_length = 20
    with pytest.raises(UserError, match="tokens, the model reads 20; start a new conversation"):
        processor(one_question())


def test_the_fixed_phrases_are_single_tokens(processor: Processor, cards: str) -> None:
    assert len(processor.tokenizer.encode(cards).ids) == 12
    assert processor.decode(processor.tokenizer.encode("any text: žluť").ids) == "any text: žluť"
