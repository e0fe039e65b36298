"""Errors that a user can mend, and the one place that turns them into an exit code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what, what is allowed, and what to do."""


def exits_with_message(function: Callable[P, R]) -> Callable[P, R]:
    """Make ``function`` the outermost callable of a command: a :class:`UserError` ends the process.

    The process then ends with status 1 and ``error: ...`` as the last line on stderr. Every other
    exception is a fault of the program and keeps its traceback.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            cause = find_user_error(error)
            if cause is None:
                raise
            raise SystemExit(f"error: {' '.join(str(cause).split())}") from None

    return wrapper


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError behind an exception; MONAI wraps what a config component or transform raises."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


def near_match_hint(given: str, valid: Sequence[str]) -> str:
    """Return ``"did you mean 'x'? "`` when ``given`` is close to a valid name, else an empty string."""
    close = get_close_matches(given, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""
