"""MONAI Label's real server in a process of its own, from the environment that ``make monailabel-venv`` creates."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx

APP = "bundles/vila_m3_with_experts/monailabel_app"
START_SECONDS = 240


def environment(repository: Path) -> Path:
    """Return the environment, ``$VILA_M3_MONAILABEL_VENV`` or that of the checkout, which is made if need be."""
    named = os.environ.get("VILA_M3_MONAILABEL_VENV")
    if named:
        return Path(named)
    command = ["make", "--no-print-directory", "monailabel-venv", f"PYTHON={sys.executable}"]
    made = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return repository / ".venv-monailabel"


def client_module(venv: Path) -> ModuleType:
    """Load MONAI Label's client out of its environment; it needs nothing else of it."""
    (path,) = venv.glob("lib/python*/site-packages/monailabel/client/client.py")
    spec = importlib.util.spec_from_file_location("monailabel_client", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclass
class MonaiLabel:
    """A running server."""

    process: subprocess.Popen
    url: str
    log: Path
    client: Any

    def post(self, path: str, body: Any = None) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=600)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=600)

    def infer(self, model: str, image: str, **params: Any) -> tuple[Path | None, dict[str, Any]]:
        """Run a model by the client; the answers without a file come back from it as bytes."""
        file, result = self.client.infer(model, image, params)
        return Path(file) if file else None, json.loads(result) if isinstance(result, bytes) else result

    def refusal(self, model: str, image: str, **params: Any) -> tuple[int, str]:
        """Return status and reason of a request that is not answered."""
        response = httpx.post(
            f"{self.url}/infer/{model}", params={"image": image}, data={"params": json.dumps(params)}, timeout=600
        )
        assert response.status_code >= 400, response.text[:500]
        return response.status_code, response.json()["detail"]

    def wait_for(self, is_done: Callable[[], Any], seconds: float = 300) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            found = is_done()
            if found:
                return found
            time.sleep(1)
        raise AssertionError(f"not done in {seconds} s: {self.log.read_text()[-3000:]}")

    def finished(self, kind: str) -> dict[str, Any]:
        """Wait for the background task that was started last (``train``, ``scoring``, ``batch/infer``)."""

        def last() -> dict[str, Any] | None:
            task = self.get(f"/{kind}").json() if kind == "batch/infer" else self.get(f"/{kind}/").json()
            return task if task["status"] not in ("SUBMITTED", "RUNNING") else None

        return self.wait_for(last)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


def start(
    repository: Path,
    venv: Path,
    work: Path,
    studies: str | Path,
    *options: str,
    app: str | Path = APP,
    launcher: tuple[str, ...] = ("-m", "monailabel.main"),
    port: int | None = None,
    **variables: str,
) -> MonaiLabel:
    """Start the server and wait until it answers; it writes to ``work`` and its app's folder only."""
    port = port or free_port()
    command = [str(venv / "bin" / "python"), *launcher, "start_server", "--app", str(app), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    log = work / "server.log"
    settings = {
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"),
        "HOME": str(work),
        "MONAI_LABEL_AUTO_UPDATE_SCORING": "false",
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=repository, env={**os.environ, **settings}, stdout=output, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    server = MonaiLabel(process, url, log, client_module(venv).MONAILabelClient(url, tmpdir=str(work)))
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-5000:]
        try:
            if httpx.get(f"{url}/info/", timeout=60).status_code == 200:
                return server
        except httpx.HTTPError:
            time.sleep(0.5)
    process.kill()
    raise AssertionError(f"the server did not answer: {log.read_text()[-3000:]}")
