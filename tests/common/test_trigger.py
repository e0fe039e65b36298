import pytest

from vila_m3_common.trigger import Trigger, parse_triggers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Let me trigger <VISTA3D(hepatic tumor)>. ", Trigger("VISTA3D", "hepatic tumor")),
        ("Let me first trigger <CXR()>.", Trigger("CXR")),
        ("<BRATS>", Trigger("BRATS")),
        ("<VISTA3D('organs')>", Trigger("VISTA3D", "organs")),
        ('<VISTA3D( "organs" )>', Trigger("VISTA3D", "organs")),
        ("I segmented the skeleton using <VISTA3D(skeleton)>.", Trigger("VISTA3D", "skeleton", is_report=True)),
        ("I segmented any brain tumors using <BRATS()>.", Trigger("BRATS", is_report=True)),
        ("By reusing <BRATS()>", Trigger("BRATS")),
    ],
)
def test_one_trigger_is_read(text: str, expected: Trigger) -> None:
    assert parse_triggers(text) == [expected]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "VISTA3D",
        "<image>",
        "<vista3d()>",
        "<segmented VISTA3D>",
        "<|eot_id|>",
        "</s>",
        "a < b > c",
        "<VISTA3D(a<b)>",
    ],
)
def test_other_text_in_angle_brackets_calls_nothing(text: str) -> None:
    assert parse_triggers(text) == []


def test_several_triggers_are_read_in_order() -> None:
    triggers = parse_triggers("First <VISTA3D(organs)>, then <CXR()>; I looked using <BRATS()>.")
    assert [str(trigger) for trigger in triggers] == ["<VISTA3D(organs)>", "<CXR()>", "<BRATS()>"]
    assert [trigger.is_report for trigger in triggers] == [False, False, True]
