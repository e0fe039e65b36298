"""Files of long runs: replaced in one step, appended for certain, continued with the settings they began with."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vila_m3_common.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step, so that a kill leaves either the old or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def replace_folder(new: Path, target: Path) -> None:
    """Put a folder in the place of another in one step, so that a kill leaves either the old or the new one there.

    On file systems that cannot exchange two folders the old one stands as ``<target>.old`` for a moment, from where
    :func:`recover_folder` brings it back.

    Args:
        new: a whole folder on the same file system; gone afterwards.
        target: may be missing.
    """
    old = target.with_name(f"{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if not target.exists():
        new.replace(target)
    elif _exchange(new, target):
        shutil.rmtree(new)
    else:
        target.replace(old)
        new.replace(target)
        shutil.rmtree(old)


def recover_folder(target: Path) -> None:
    """Bring back what a kill within :func:`replace_folder` left beside its place."""
    old = target.with_name(f"{target.name}.old")
    if old.exists() and not target.exists():
        old.replace(target)


_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2(2)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two paths in one step; return whether the system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def append_durably(path: Path, text: str) -> None:
    """Append text and make sure that it is on disk."""
    with path.open("a", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def check_settings(path: Path, kept: Path, settings: Mapping[str, Any], option: str) -> None:
    """Keep what a new file depends on, or compare it with what was kept when the file was begun.

    Args:
        path: the file that a run continues.
        kept: JSON file of its settings.
        settings: of this run.
        option: of the command, that names another place to write to.

    Raises:
        UserError: if a setting has changed; the message lists old and new values.
    """
    if not path.is_file() or not kept.is_file():
        kept.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        return
    before = json.loads(kept.read_text())
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        listed = ", ".join(f"{key} {before.get(key)!r} -> {settings[key]!r}" for key in changed)
        raise UserError(f"{path} was begun with other settings ({listed}); give another {option}")
