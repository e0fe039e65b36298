"""The held-out patients of released weights must stay the same ones."""

from vila_m3_common.patients import is_held_out

# Of the patients 1 to 30 at a share of 0.2; the shipped chest X-ray classifier was trained without such.
HELD_OUT = ["2", "6", "23", "27"]


def test_the_same_patients_are_held_out_whoever_else_is_there() -> None:
    numbers = [str(number) for number in range(1, 31)]
    assert [name for name in numbers if is_held_out(name, 0.2)] == HELD_OUT
    assert {name for name in numbers if is_held_out(name, 0.1)} <= set(HELD_OUT)


def test_a_share_of_one_holds_out_everybody_and_of_none_nobody() -> None:
    assert all(is_held_out(str(number), 1.0) for number in range(100))
    assert not any(is_held_out(str(number), 0.0) for number in range(100))
