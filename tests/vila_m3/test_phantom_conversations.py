import random
from collections import Counter

import numpy as np
import pytest

from vila_m3.phantom_conversations import ConversationMaker, random_labels, show_group
from vila_m3.questions import ct_segment, ct_tumor, cxr_finding, draw, is_held_out, tables
from vila_m3_common.anatomy import GROUPS
from vila_m3_common.errors import UserError
from vila_m3_common.prompts import CXR_FINDINGS
from vila_m3_common.trigger import parse_triggers


def test_the_same_seed_gives_the_same_conversation(maker: ConversationMaker) -> None:
    first, second = maker(5).conversation, maker(5).conversation
    assert [turn.text for turn in first.turns] == [turn.text for turn in second.turns]
    assert all(np.array_equal(a, b) for a, b in zip(first.images, second.images, strict=True))


def test_every_trigger_is_followed_by_feedback(maker: ConversationMaker) -> None:
    for seed in range(200):
        turns = maker(seed).conversation.turns
        for turn, following in zip(turns, [*turns[1:], None], strict=True):
            triggers = parse_triggers(turn.text) if turn.role == "assistant" else []
            if triggers and not (triggers[0].is_report and triggers[0].name == "VISTA3D"):
                assert following is not None
                assert following.role == "expert"


def test_all_modalities_occur_and_each_calls_its_own_expert(maker: ConversationMaker) -> None:
    called: Counter[tuple[str, str]] = Counter()
    for seed in range(300):
        sample = maker(seed)
        for turn in sample.conversation.turns:
            for trigger in parse_triggers(turn.text) if turn.role == "assistant" else []:
                called[sample.modality, trigger.name] += 1
    assert set(called) == {("CT", "VISTA3D"), ("CT", "VISTA2D"), ("MRI", "BRATS"), ("CXR", "CXR")}


def test_held_out_wordings_never_occur_in_training() -> None:
    rng = random.Random(0)
    train = {draw(ct_tumor, rng, held_out=False).text for _ in range(300)}
    held_out = {draw(ct_tumor, rng, held_out=True).text for _ in range(300)}
    assert not train & held_out
    assert all(map(is_held_out, held_out))


def test_tables_cover_every_finding_and_argument() -> None:
    assert tuple(tables()["cxr_findings"]) == CXR_FINDINGS
    assert set(tables()["ct_segment"]["objects"]) == set(GROUPS) - {"hepatoma"}
    assert cxr_finding(random.Random(1)).target in CXR_FINDINGS
    question = ct_segment(random.Random(2))
    assert question.reply.endswith(f"using <VISTA3D({question.argument})>.")


@pytest.mark.parametrize("argument", ["organs", "hepatic tumor"])
def test_a_legend_names_only_what_the_group_holds(argument: str) -> None:
    labels = random_labels((64, 64), random.Random(3))
    labels[:4, :4] = 1
    legend, picture = show_group(np.zeros((64, 64), np.uint8), labels, argument)
    assert legend[0] == ("red", "liver")
    assert picture.shape == (64, 64, 3)


def test_what_the_expert_said_of_a_finding_is_told_as_its_line(maker: ConversationMaker) -> None:
    told = 0
    for seed in range(300):
        feedback = ""
        for turn in maker(seed).conversation.turns:
            if turn.role == "expert":
                feedback = turn.text
            elif turn.role == "assistant" and turn.text.endswith((": yes", ": no")):
                assert f"\n{turn.text}\n" in feedback
                told += 1
    assert told > 100


def test_shares_choose_the_kinds_of_questions_about_a_ct(maker: ConversationMaker) -> None:
    only = ConversationMaker(maker.pool, maker.cards, shares={"CT": 1}, ct_kinds={"describe": 2, "structure": 1})
    drawn = Counter(only(seed).kind for seed in range(90))
    assert set(drawn) == {"describe", "structure"}
    assert drawn["describe"] > drawn["structure"]
    with pytest.raises(UserError, match="unknown kind of question 'size'"):
        ConversationMaker(maker.pool, maker.cards, ct_kinds={"size": 1})


def test_shares_choose_what_is_asked_first_about_a_radiograph(maker: ConversationMaker) -> None:
    only = ConversationMaker(maker.pool, maker.cards, shares={"CXR": 1}, cxr_kinds={"describe": 1})
    drawn = [only(seed) for seed in range(40)]
    assert {sample.kind for sample in drawn} == {"describe"}
    assert any(len(sample.conversation.turns) > 4 for sample in drawn), "other questions follow"
    with pytest.raises(UserError, match="unknown kind of question 'structure'"):
        ConversationMaker(maker.pool, maker.cards, cxr_kinds={"structure": 1})


def test_shares_choose_the_kinds_of_images(maker: ConversationMaker) -> None:
    only = ConversationMaker(maker.pool, maker.cards, shares={"CXR": 2})
    assert {only(seed).modality for seed in range(40)} == {"CXR"}
    drawn = Counter(maker(seed).modality for seed in range(400))
    assert drawn["CXR"] > drawn["CT"] > drawn["MRI"]
    with pytest.raises(UserError, match="unknown kind of phantom 'XR'"):
        ConversationMaker(maker.pool, maker.cards, shares={"XR": 1})
    with pytest.raises(UserError, match="draw nothing"):
        ConversationMaker(maker.pool, maker.cards, shares={"CT": 0})
