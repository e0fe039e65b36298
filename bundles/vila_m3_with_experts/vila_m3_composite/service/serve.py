"""The command that starts the service: ``make serve``, or ``monai.bundle run`` with ``configs/serve.json``."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from vila_m3_common.errors import UserError, exits_with_message

from ..app import Composite
from .app import create_app
from .settings import Limits, Settings

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEYS_VARIABLE = "VILA_M3_API_KEYS"


@exits_with_message
def serve(
    host: str,
    port: int,
    data_dir: str,
    model_id: str,
    limits: Mapping[str, Any],
    image_urls: Sequence[str],
    host_names: Sequence[str],
    sequence_order: Sequence[str] | None,
    composite: Mapping[str, Any],
) -> None:
    """Serve until the process is told to end. API keys are read from ``VILA_M3_API_KEYS``, one per line or comma.

    Args:
        host: address to listen on; any but a loopback address needs API keys.
        port: to listen on.
        data_dir: folder of the uploaded files and results.
        model_id: name of the model in the API.
        limits: see :class:`.settings.Limits`.
        image_urls: beginnings of the web addresses that pictures may be fetched from.
        host_names: names under which a browser may reach the service, beside the loopback names.
        sequence_order: of the channels of 4-D brain MRIs; the brain expert is told of it by ``composite``.
        composite: keyword arguments of :class:`vila_m3_composite.app.Composite`.
    """
    host, port = str(host), int(port)
    keys = tuple(os.environ.get(KEYS_VARIABLE, "").replace(",", "\n").split())
    if host not in _LOOPBACK and not keys:
        raise UserError(
            f"{host} can be reached from other machines; set {KEYS_VARIABLE} to one or more API keys, "
            "or listen on 127.0.0.1"
        )
    names = (*_LOOPBACK, "[::1]", *host_names) if host in _LOOPBACK or host_names else ()
    order = None if sequence_order is None else tuple(sequence_order)
    settings = Settings(
        Path(data_dir), str(model_id), Limits.from_config(limits), keys, tuple(map(str, image_urls)), names, order
    )
    listener = _bind(host, port)
    _write_log()
    with Composite(**composite) as members, listener:
        app = create_app(members, settings)
        address = f"[{host}]" if ":" in host else host
        print(f"VILA-M3 with experts on http://{address}:{listener.getsockname()[1]} (research use only)", flush=True)
        # Access lines of uvicorn hold whole addresses, and so what a user typed; the Gatekeeper writes its own.
        config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=10)
        uvicorn.Server(config).run(sockets=[listener])


def _write_log() -> None:
    """Log the service's requests and faults on stderr, whatever the bundle's logging config shows of the models."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log = logging.getLogger(__package__)
    log.setLevel(logging.INFO)
    log.addHandler(handler)
    log.propagate = False


def _bind(host: str, port: int) -> socket.socket:
    """Listen before anything is loaded, so that a port in use is told at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"{host}:{port} cannot be listened on ({error}); give another --port") from error
    return listener
