"""Pictures in a message: data URLs, and web addresses that the service allows."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import ApiError, room_checked
from .intake import take_in
from .settings import Limits

_DATA_URL = re.compile(r"data:image/(?:png|jpe?g);base64,", re.IGNORECASE)
_FETCH_SECONDS = 15


def write_picture(url: str, folder: Path, limits: Limits, allowed: Sequence[str]) -> Path:
    """Write the picture behind a URL into an empty folder.

    Args:
        url: ``data:image/png;base64,...``, ``data:image/jpeg;base64,...`` or an allowed web address.
        folder: gets one file.
        limits: of the service.
        allowed: beginnings of web addresses.

    Raises:
        ApiError: if the URL is of another kind, not allowed, or no picture that can be read.
    """
    match = _DATA_URL.match(url)
    if match:
        try:
            data = base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError) as error:
            raise _refused("the data URL is no valid base64") from error
    elif url.startswith(("http://", "https://")):
        data = _fetch(url, limits, allowed)
    else:
        raise _refused("image_url is neither a data URL of a PNG or JPEG, nor the id of a file, nor a web address")
    path = folder / "picture"
    with room_checked():
        path.write_bytes(data)
    path, kind = take_in(path, "", limits)
    if kind != "picture":
        raise _refused("the data are no PNG or JPEG; upload other files with POST /v1/files")
    return path


def _refused(reason: str) -> ApiError:
    return ApiError(400, reason, "invalid_image_url", "messages")


def _fetch(url: str, limits: Limits, allowed: Sequence[str]) -> bytes:
    if not any(url.startswith(beginning) for beginning in allowed):
        listed = ", ".join(allowed) or "none"
        raise _refused(f"pictures are not fetched from this address; allowed: {listed}; send a data URL")
    largest = int(limits.request_mb * 2**20)
    opener = urllib.request.build_opener(_NoRedirect)
    try:
        with opener.open(url, timeout=_FETCH_SECONDS) as response:
            data = response.read(largest + 1)
    except (OSError, ValueError) as error:
        raise _refused(f"the picture could not be fetched ({type(error).__name__})") from error
    if len(data) > largest:
        raise _refused(f"the picture is larger than {limits.request_mb:g} MB")
    return data


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An allowed address may not lead to another one."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        """Follow nothing; the redirection then counts as an error."""
        return None
