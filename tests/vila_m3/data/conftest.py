"""A running server of rewrites, and an import path to helper modules of this folder and of common's tests."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2] / "common"))

from answering_server import Server


@pytest.fixture
def answering_server() -> Iterator[Server]:
    """A server of rewrites, running."""
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
