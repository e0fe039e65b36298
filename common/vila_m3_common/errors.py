"""Errors that a user can mend, and the one place that turns them into an exit code."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from types import TracebackType
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
            raise SystemExit(_one_line(cause)) from None

    return wrapper


def report_user_errors() -> None:
    """Print an uncaught :class:`UserError` as ``error: ...`` without a traceback, until the process ends.

    The first ``run`` expression of a bundle's configs: MONAI builds what the next one refers to before it
    calls it, so nothing that ``run`` calls can catch, say, missing weights. (``initialize`` would be too
    early: the bundle's root is not on ``sys.path`` yet.)
    """
    if sys.excepthook is not _excepthook:
        global _previous_excepthook
        _previous_excepthook, sys.excepthook = sys.excepthook, _excepthook


_previous_excepthook = sys.__excepthook__


def _excepthook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    cause = find_user_error(error)
    if cause is None:
        _previous_excepthook(kind, error, traceback)
    else:
        print(_one_line(cause), file=sys.stderr)


def _one_line(error: UserError) -> str:
    return f"error: {' '.join(str(error).split())}"


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError behind an exception; MONAI wraps what a config component or transform raises."""
    while error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__cause__ or error.__context__
    return None


def check_choice(value: str, valid: Sequence[str], what: str) -> str:
    """Return ``value`` when it is one of ``valid``.

    Raises:
        UserError: naming ``what`` and its valid values.
    """
    if value not in valid:
        raise UserError(f"unknown {what} {value!r}; {near_match_hint(str(value), valid)}valid: {', '.join(valid)}")
    return value


def near_match_hint(given: str, valid: Sequence[str]) -> str:
    """Return ``"did you mean 'x'? "`` when ``given`` is close to a valid name, else an empty string."""
    close = get_close_matches(given, valid, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}? " if close else ""
