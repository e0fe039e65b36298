import numpy as np
import pytest
import torch

from vila_m3.configuration import IGNORED_LABEL, IMAGE_TOKEN_ID
from vila_m3.phantom_conversations import ConversationMaker
from vila_m3.processor import VilaM3Processor
from vila_m3.training import supervised_runs
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError


def one_question() -> Conversation:
    conversation = Conversation()
    conversation.add("user", "<image>What is it?", [np.zeros((8, 8, 3), np.uint8)])
    return conversation


def test_every_visual_token_has_its_place(processor: VilaM3Processor) -> None:
    encoded = processor.encode(one_question())
    assert int((encoded.input_ids == IMAGE_TOKEN_ID).sum()) == processor.tokens_per_image == 4
    assert encoded.pixel_values.shape == (1, 3, 42, 42)


def test_only_assistant_turns_are_supervised_to_their_end(processor: VilaM3Processor) -> None:
    conversation = one_question()
    conversation.add("assistant", "a CT")
    conversation.add("expert", "expert text")
    conversation.add("assistant", "yes")
    encoded = processor.encode(conversation)
    runs = supervised_runs(encoded.labels)
    texts = [
        processor.tokenizer.decode(encoded.labels[start:end].tolist(), skip_special_tokens=False) for start, end in runs
    ]
    assert texts == ["a CT<|eot_id|>", "yes<|end_of_text|>"]
    kept = encoded.labels != IGNORED_LABEL
    assert torch.equal(encoded.labels[kept], encoded.input_ids[kept])


def test_generation_starts_from_the_tokens_of_training(processor: VilaM3Processor, maker: ConversationMaker) -> None:
    """What stands before a reply is tokenized the same with the reply behind it and without."""
    for seed in range(40):
        conversation = maker(seed).conversation
        trained = processor.encode(conversation).input_ids
        while conversation.turns:
            if conversation.turns.pop().role == "assistant":
                asked = processor.encode(conversation).input_ids
                assert torch.equal(asked, trained[: len(asked)])


def test_conversations_of_every_kind_fit_the_model(processor: VilaM3Processor, maker: ConversationMaker) -> None:
    for seed in range(60):
        conversation = maker(seed).conversation
        encoded = processor.encode(conversation)
        assert len(encoded.pixel_values) == len(conversation.images)
        assert len(supervised_runs(encoded.labels)) == sum(turn.role == "assistant" for turn in conversation.context)


def test_a_conversation_beyond_the_context_is_refused(processor: VilaM3Processor) -> None:
    processor.context_length = 20
    with pytest.raises(UserError, match="tokens, the model reads 20; start a new conversation"):
        processor.encode(one_question())


def test_the_fixed_phrases_are_single_tokens(processor: VilaM3Processor, cards: str) -> None:
    assert len(processor.tokenizer(cards).input_ids) == 12
    assert processor.decode(processor.tokenizer("any text: žluť").input_ids) == "any text: žluť"


def test_prompts_and_pictures_make_a_left_padded_batch(processor: VilaM3Processor) -> None:
    pictures = [np.zeros((8, 8, 3), np.uint8)]
    batch = processor(images=pictures, text=["What is this picture of? <image>", "Hi"])
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert batch["attention_mask"][:, 0].tolist() == [1, 0]
    assert batch["attention_mask"][:, -1].tolist() == [1, 1]
    assert batch["pixel_values"].shape == (1, 3, 42, 42)


@pytest.mark.parametrize(("count", "text"), [(2, "<image>one"), (0, "<image>one"), (1, "none")])
def test_images_and_placeholders_must_agree(processor: VilaM3Processor, count: int, text: str) -> None:
    pictures = [np.zeros((8, 8, 3), np.uint8)] * count
    with pytest.raises(UserError, match=rf"{count} images were given for {text.count('<image>')} <image> placeholders"):
        processor(images=pictures, text=text)


def test_an_empty_prompt_is_refused(processor: VilaM3Processor) -> None:
    with pytest.raises(UserError, match="the prompt is empty; ask something"):
        processor(text=" ")
    with pytest.raises(UserError, match="the conversation is empty; add a user turn"):
        processor.encode(Conversation())


def test_a_prompt_beyond_the_context_is_refused(processor: VilaM3Processor) -> None:
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens, the model reads 2048; start a new"):
        processor(text="a b " * 3000)
