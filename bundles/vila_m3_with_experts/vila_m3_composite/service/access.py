"""Who a request comes from: the API key, and bounds on what it sends."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Sequence

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, respond
from .metrics import Metrics
from .settings import Limits

logger = logging.getLogger(__name__)


def owner_of(request: Request) -> str:
    """Return who may read what this request makes: a digest of its API key, or ``everyone`` where none is asked for.

    Without keys, what keeps one user's files from another is that nobody can guess their random ids.

    Raises:
        ApiError: if the service asks for a key and the request shows none of them.
    """
    keys: Sequence[str] = request.app.state.service.settings.api_keys
    if not keys:
        return "everyone"
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    # Every key is compared, so that the time tells nothing.
    matches = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
    if kind.lower() == "bearer" and any(matches):
        return hashlib.sha256(given.strip().encode()).hexdigest()
    raise ApiError(401, "the API key is missing or wrong; send it as 'Authorization: Bearer <key>'", "invalid_api_key")


class Gatekeeper:
    """ASGI middleware: bounds the bodies of requests, counts them, and logs each without its text.

    Args:
        app: the application.
        limits: of the service.
        metrics: of the service.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        status = 499  # as other servers count a client that went away

        async def send_counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *_SAFE_HEADERS]
            await send(message)

        allowed_mb = self._allowed_mb(scope["path"])
        try:
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if length.isdigit() and int(length) > allowed_mb * 2**20:
                await respond(_too_large(allowed_mb), {"Connection": "close"})(scope, receive, send_counted)
                return
            await self._app(scope, self._bounded(receive, allowed_mb), send_counted)
        finally:
            self._count(scope, status, time.perf_counter() - start)

    def _allowed_mb(self, path: str) -> float:
        is_upload = path.rstrip("/") in ("/v1/files", "/upload")
        # A form is a little larger than its file.
        return self._limits.upload_mb + 1 if is_upload else self._limits.request_mb

    def _bounded(self, receive: Receive, allowed_mb: float) -> Receive:
        count, is_whole = 0, False

        async def receive_bounded() -> Message:
            nonlocal count, is_whole
            if is_whole:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), self._limits.idle_seconds)
            except TimeoutError:
                raise HTTPException(408, "the request stopped in its middle; send it again") from None
            count += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if count > allowed_mb * 2**20:
                raise HTTPException(413, _too_large(allowed_mb).message)
            return message

        return receive_bounded

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        # The template of the route, since an address may hold what a user typed.
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.requests.labels(route, str(status)).inc()
        self._metrics.request_seconds.labels(route).observe(seconds)
        method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD", "OPTIONS") else "other"
        logger.info("%s %s %d %.0f ms", method, route, status, 1000 * seconds)


# The page loads nothing from elsewhere, and no file of a user is run as a page.
_SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


def _too_large(allowed_mb: float) -> ApiError:
    return ApiError(413, f"the request is larger than {allowed_mb:g} MB", "request_too_large")
