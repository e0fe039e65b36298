import sys

import pytest

from vila_m3_common.errors import (
    UserError,
    exits_with_message,
    find_user_error,
    near_match_hint,
    report_user_errors,
)


def fail_with(error: Exception) -> None:
    raise error


def fail_inside_a_wrapper() -> None:
    try:
        raise UserError("x.nii is\n  empty")
    except UserError as error:
        raise RuntimeError("applying transform LoadImaged") from error


def test_a_users_error_ends_the_command_with_one_line() -> None:
    with pytest.raises(SystemExit, match="^error: x.nii is empty; give the image$"):
        exits_with_message(fail_with)(UserError("x.nii is empty;\n give the image"))


def test_a_users_error_is_found_behind_what_monai_raises() -> None:
    with pytest.raises(SystemExit, match="^error: x.nii is empty$"):
        exits_with_message(fail_inside_a_wrapper)()


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(KeyError, match="no user"):
        exits_with_message(fail_with)(KeyError("no user's fault"))


def test_the_result_passes_through() -> None:
    assert exits_with_message(lambda: 7)() == 7
    assert find_user_error(None) is None


@pytest.mark.parametrize(
    ("given", "hint"), [("hepatic tumour", "did you mean 'hepatic tumor'? "), ("xyz", ""), ("", "")]
)
def test_a_near_match_is_offered(given: str, hint: str) -> None:
    assert near_match_hint(given, ["everything", "hepatic tumor", "organs"]) == hint


def test_an_uncaught_users_error_is_printed_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: print("traceback", file=sys.stderr))
    report_user_errors()
    report_user_errors()
    wrapped = RuntimeError("Failed to instantiate")
    wrapped.__cause__ = UserError("weights x.pt do not exist;\n give others")
    sys.excepthook(RuntimeError, wrapped, None)
    sys.excepthook(KeyError, KeyError("no user's fault"), None)
    assert capsys.readouterr().err == "error: weights x.pt do not exist; give others\ntraceback\n"
