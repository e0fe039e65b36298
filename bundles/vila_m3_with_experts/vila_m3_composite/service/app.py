"""The application: service, routes, page."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from PIL import Image
from starlette.middleware.trustedhost import TrustedHostMiddleware

from . import api, legacy
from .access import Gatekeeper
from .chat import ChatService
from .errors import install_handlers
from .settings import Settings
from .studies import Viewer

logger = logging.getLogger(__name__)

PAGE = Path(__file__).parent / "page"
_SWEEP_SECONDS = 30.0
# The page loads nothing from elsewhere and runs no script but its own.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
}


def create_app(composite: Any, settings: Settings, sweep_seconds: float = _SWEEP_SECONDS) -> FastAPI:
    """Make the application; its threads begin here and end with the server.

    Args:
        composite: an opened :class:`vila_m3_composite.app.Composite`; the caller closes it.
        settings: see :class:`.settings.Settings`.
        sweep_seconds: how often files are looked through for those to erase, and free memory is given back.
    """
    service = ChatService(composite, settings)
    # A picture whose header lies is refused by Pillow at twice this size.
    Image.MAX_IMAGE_PIXELS = settings.limits.image_pixels

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        sweeper = asyncio.create_task(_sweep(service, sweep_seconds))
        yield
        sweeper.cancel()
        service.close()

    app = FastAPI(
        title="VILA-M3 with experts",
        description="OpenAI-compatible service. For research; not for diagnosis.",
        version="1",
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.state.viewer = Viewer(service.builder, service.store)
    app.state.clients = legacy.Clients()
    install_handlers(app)
    app.include_router(api.router)
    app.include_router(legacy.router)
    app.mount("/page", StaticFiles(directory=PAGE), name="page")

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers=_PAGE_HEADERS)

    if settings.host_names:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.host_names))
    app.add_middleware(Gatekeeper, limits=settings.limits, metrics=service.metrics)
    return app


async def _sweep(service: ChatService, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await asyncio.to_thread(service.sweep)
        except Exception:
            logger.exception("old files could not be erased")
        await asyncio.to_thread(_return_memory)


def _return_memory() -> None:
    """Give back what was freed: the C library keeps it for each of many threads, and the process would seem to grow."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
    if trim is not None:
        trim(0)
