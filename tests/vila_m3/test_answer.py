"""Generation: streaming, the cache that lives on, stopping, sampling, batches."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from vila_m3.answer import Answerer, Sampling
from vila_m3.model import VilaM3ForConditionalGeneration
from vila_m3.processor import VilaM3Processor
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8)


def conversation(*turns: tuple[str, str, Sequence[int]]) -> Conversation:
    made = Conversation()
    for role, text, seeds in turns:
        made.add(role, text, [picture(seed) for seed in seeds])  # type: ignore[arg-type]
    return made


FIRST = ("user", "<image>What is it? <image>", (1, 2))


@pytest.fixture
def answerer(model: VilaM3ForConditionalGeneration, processor: VilaM3Processor) -> Answerer:
    return Answerer(model, processor, max_new_tokens=12)


def test_pieces_join_to_the_text_of_all_tokens(answerer: Answerer) -> None:
    pieces = list(answerer(conversation(FIRST)))
    assert len(pieces) > 1
    assert "".join(pieces) == answerer.processor.decode(list(answerer.generate(conversation(FIRST))))


def test_the_next_turn_encodes_only_what_is_new(answerer: Answerer) -> None:
    talk = conversation(FIRST)
    talk.add("assistant", "".join(answerer(talk)))
    assert answerer.report.encoded_image_count == 2
    before = answerer.report.prompt_token_count
    talk.add("expert", "The results are <image>.", [picture(3)])
    list(answerer(talk))
    report = answerer.report
    assert report.encoded_image_count == 1
    assert report.reused_token_count >= before
    assert report.prompt_token_count - report.reused_token_count < 40


def test_without_kept_conversations_everything_is_encoded_anew(model: Any, processor: Any) -> None:
    answerer = Answerer(model, processor, 2, kept_conversations=0)
    for _ in range(3):
        list(answerer.generate(conversation(FIRST)))
        assert answerer.report.reused_token_count == 0
        assert answerer.report.encoded_image_count == 2


def test_an_image_shown_twice_is_encoded_once(answerer: Answerer) -> None:
    list(answerer(conversation(("user", "<image> <image> <image>", (1, 2, 1)))))
    assert answerer.report.encoded_image_count == 2


def test_another_image_in_the_same_place_is_noticed(answerer: Answerer, model: Any, processor: Any) -> None:
    list(answerer(conversation(FIRST)))
    other = conversation(("user", FIRST[1], (1, 9)))
    assert list(answerer.generate(other)) == list(Answerer(model, processor, 12).generate(other))
    assert answerer.report.encoded_image_count == 1


def test_an_abandoned_answer_leaves_a_sound_cache(answerer: Answerer, model: Any, processor: Any) -> None:
    stream = answerer.generate(conversation(FIRST))
    next(stream)
    next(stream)
    stream.close()
    assert answerer.report.stop_reason == "abandoned"
    longer = conversation(FIRST, ("assistant", "something else", ()), ("user", "and now?", ()))
    assert list(answerer.generate(longer)) == list(Answerer(model, processor, 12).generate(longer))


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_interleaved_conversations_do_not_mix(model: Any, processor: Any, kept: int) -> None:
    answerer = Answerer(model, processor, 6, kept_conversations=kept)
    talks = [conversation(("user", f"<image>question {index}", (index,))) for index in range(3)]
    for question in ("and why?", "and then?"):
        for talk in talks:
            expected = list(Answerer(model, processor, 6, kept_conversations=0).generate(talk))
            assert list(answerer.generate(talk)) == expected
            talk.add("assistant", processor.decode(expected))
            talk.add("user", question)
    assert len(answerer._kept) <= kept


def test_every_template_end_and_eos_stops(model: Any, processor: Any) -> None:
    answerer = Answerer(model, processor, 12)
    names = processor.tokenizer.convert_ids_to_tokens(sorted(answerer.stop_ids))
    assert {"<|eot_id|>", "<|end_of_text|>"} <= set(names)
    free = list(answerer.generate(conversation(FIRST)))
    answerer.stop_ids |= {free[2]}
    stopped = list(answerer.generate(conversation(FIRST)))
    assert stopped == free[: free.index(free[2])]
    assert answerer.report.stop_reason == "stop token"
    assert answerer.notes == []


def test_a_cut_answer_is_announced(answerer: Answerer, caplog: pytest.LogCaptureFixture) -> None:
    list(answerer(conversation(FIRST)))
    assert answerer.report.stop_reason == "max_new_tokens"
    assert answerer.notes == ["The answer was cut off after 12 tokens (max_new_tokens)."]
    assert answerer.notes[0] in caplog.text


def test_the_end_of_the_context_is_announced(answerer: Answerer) -> None:
    length = len(answerer.tokenize(conversation(FIRST)))
    answerer.model.config.context_length = length + 5
    assert len(list(answerer.generate(conversation(FIRST)))) == 5
    assert answerer.notes == [f"The answer was cut off: the model reads {length + 5} tokens in all."]


def test_a_conversation_beyond_the_context_is_never_cut_silently(answerer: Answerer) -> None:
    answerer.processor.context_length = 9
    with pytest.raises(UserError, match=r"the conversation has \d+ tokens, the model reads 9; start a new"):
        list(answerer(conversation(FIRST)))


def test_a_conversation_that_ends_with_the_assistant_is_refused(answerer: Answerer) -> None:
    with pytest.raises(UserError, match="ends with an assistant turn; add a user turn for the model to answer"):
        list(answerer(conversation(FIRST, ("assistant", "yes", ()))))


def test_no_conversation_is_refused(answerer: Answerer) -> None:
    with pytest.raises(UserError, match="the conversation is empty; add a user turn"):
        list(answerer(Conversation()))


def test_sampling_follows_its_seed(model: Any, processor: Any) -> None:
    def ids(**options: Any) -> list[int]:
        return list(Answerer(model, processor, 12, Sampling(**options)).generate(conversation(FIRST)))

    greedy = ids()
    assert ids(temperature=1.5, seed=1) == ids(temperature=1.5, seed=1)
    assert ids(temperature=1.5, seed=1) != ids(temperature=1.5, seed=2)
    assert ids(temperature=1.5, top_k=1) == greedy
    assert ids(temperature=1.5, top_p=1e-6) == greedy


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature -1 is negative; 0 is greedy"),
        ({"top_p": 0}, "top_p 0 is out of range; give more than 0 and at most 1"),
        ({"top_k": -2}, "top_k -2 is negative; 0 keeps all tokens"),
    ],
)
def test_sampling_out_of_range_is_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**options)  # type: ignore[arg-type]


def test_a_batch_equals_its_conversations_alone(answerer: Answerer) -> None:
    talks = [
        conversation(FIRST),
        conversation(("user", "no image at all", ())),
        conversation(("user", "<image>", (2,)), ("assistant", "a CT", ()), ("user", "where? <image> <image>", (2, 5))),
    ]
    alone = [answerer.processor.decode(list(answerer.generate(talk))) for talk in talks]
    answers = answerer.answer_batch(talks)
    assert [answer.text for answer in answers] == alone
    assert answerer.report.encoded_image_count == 3
    assert answerer.answer_batch([]) == []


def test_a_batch_row_ends_at_its_own_stop(answerer: Answerer) -> None:
    talks = [conversation(FIRST), conversation(("user", "no image at all", ()))]
    first = list(answerer.generate(talks[0]))
    answerer.stop_ids |= {first[3]}
    alone = [list(answerer.generate(talk)) for talk in talks]
    answers = answerer.answer_batch(talks)
    assert [answer.new_token_count for answer in answers] == [len(ids) for ids in alone]
    assert answers[0].stop_reason == "stop token"


def test_batches_read_a_common_beginning_and_an_image_once(answerer: Answerer, model: Any, processor: Any) -> None:
    cards = "CT: liver. MRI: brain. " * 12
    talks = [conversation(("user", f"{cards}<image>question {n}", (n // 3,))) for n in range(6)]
    fed: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, keywords: fed.append(keywords["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    first = answerer.answer_batch(talks[:4])
    assert answerer.report.reused_token_count > 4 * 16
    assert answerer.report.encoded_image_count == 2
    fed.clear()
    second = answerer.answer_batch(talks[4:])
    assert answerer.report.encoded_image_count == 0
    assert answerer.report.reused_token_count + fed[0] >= answerer.report.prompt_token_count
    assert fed[0] < answerer.report.prompt_token_count / 2
    alone = [processor.decode(list(Answerer(model, processor, 12).generate(talk))) for talk in talks]
    assert [answer.text for answer in first + second] == alone


def test_a_longer_and_a_shorter_common_beginning_follow_each_other(answerer: Answerer) -> None:
    cards = "CT: liver. MRI: brain. " * 12
    shown = [conversation(("user", f"{cards}<image>{'where is it and why ' * 5}{n}?", (1,))) for n in range(3)]
    other = [conversation(("user", f"{cards}{n}?", ())) for n in range(3)]
    for talks in (shown, other, shown):
        alone = [answerer.processor.decode(list(answerer.generate(talk))) for talk in talks]
        assert [answer.text for answer in answerer.answer_batch(talks)] == alone


def test_confidence_is_the_probability_of_the_very_answer(answerer: Answerer, model: Any, processor: Any) -> None:
    talks = [conversation(FIRST), conversation(("user", "no image at all", ()))]
    for talk, answer in zip(talks, answerer.answer_batch(talks), strict=True):
        encoded = processor.encode(talk)
        ids = torch.tensor(list(answerer.generate(talk)))
        whole = torch.cat([encoded.input_ids, ids])[None]
        logits = model(whole, encoded.pixel_values).logits[0, len(encoded.input_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, ids[:, None]).sum().exp().detach()
        assert answer.confidence == pytest.approx(float(expected), rel=1e-3)
    sampled = Answerer(model, processor, 4, Sampling(temperature=1)).answer_batch(talks)
    assert sampled[0].confidence is None


def test_a_sampled_batch_equals_its_conversations_alone(model: Any, processor: Any) -> None:
    answerer = Answerer(model, processor, 8, Sampling(temperature=1.5, top_k=20, seed=3))
    talks = [conversation(FIRST), conversation(("user", "no image at all", ()))]
    alone = [processor.decode(list(answerer.generate(talk))) for talk in talks]
    assert [answer.text for answer in answerer.answer_batch(talks)] == alone


def test_a_batch_row_at_the_end_of_the_context_is_cut_alone(answerer: Answerer) -> None:
    talks = [conversation(FIRST), conversation(("user", "short", ()))]
    answerer.model.config.context_length = len(answerer.tokenize(talks[0])) + 5
    answers = answerer.answer_batch(talks)
    assert [(answer.new_token_count, answer.stop_reason) for answer in answers] == [
        (5, "context"),
        (12, "max_new_tokens"),
    ]


def test_room_for_no_token_is_refused(model: Any, processor: Any) -> None:
    with pytest.raises(UserError, match="max_new_tokens 0 leaves no room for an answer"):
        Answerer(model, processor, 0)


def test_half_precision_answers(model: VilaM3ForConditionalGeneration, processor: VilaM3Processor) -> None:
    answerer = Answerer(model.to(torch.bfloat16), processor, 4)
    assert len(list(answerer.generate(conversation(FIRST)))) <= 4
