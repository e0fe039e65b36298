"""A scripted service in this process, and the real one on nano weights in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

sys.path.insert(0, str(Path(__file__).parent))

from scripted_service import Running, running_service

CONFIGS = "bundles/vila_m3_with_experts/configs"
NANO = "vila-m3-nano"


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running_service(tmp_path_factory.mktemp("scripted"), limits={"expert_seconds": 1.0}) as running:
        yield running


@dataclass
class Served:
    """The service's command in a process of its own."""

    process: subprocess.Popen
    url: str
    data_dir: Path
    log: Path

    @property
    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300)

    def wait(self) -> "Served":
        for _ in range(1200):
            assert self.process.poll() is None, self.log.read_text()
            line = next((line for line in self.log.read_text().splitlines() if "on http://127" in line), "")
            if line:
                self.url = line.split(" on ")[1].split(" ")[0]
                assert httpx.get(f"{self.url}/health", timeout=60).status_code == 200
                return self
            time.sleep(0.1)
        raise AssertionError(f"the server did not start: {self.log.read_text()}")

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


@pytest.fixture(scope="session")
def serve_nano(repository: Path) -> Callable[..., Served]:
    """Start the service as ``make serve`` does, on a free port."""

    def serve(data_dir: Path, *options: str) -> Served:
        configs = f"['{repository / CONFIGS}/inference.json','{repository / CONFIGS}/serve.json']"
        command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", configs]
        command += ["--port", "0", "--data_dir", str(data_dir), *options]
        log = data_dir.parent / f"{data_dir.name}.log"
        with log.open("w") as output:
            environment = {**os.environ, "OMP_NUM_THREADS": "2"}
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        return Served(process, "", data_dir, log)

    return serve


@pytest.fixture(scope="session")
def nano(serve_nano: Callable[..., Served], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The service on nano weights, started once for all tests."""
    served = serve_nano(tmp_path_factory.mktemp("nano") / "data").wait()
    yield served
    served.end()


@pytest.fixture
def serve_scripted() -> Iterator[Callable[[Path], tuple[subprocess.Popen, str]]]:
    """Start the scripted service in a process of its own; gives the process and the address."""
    started = []

    def serve(data_dir: Path) -> tuple[subprocess.Popen, str]:
        code = (
            "import signal, sys, time\n"
            "from scripted_service import running_service\n"
            "from pathlib import Path\n"
            "with running_service(Path(sys.argv[1])) as running:\n"
            "    print(running.url, flush=True)\n"
            "    time.sleep(300)\n"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        command = [sys.executable, "-c", code, str(data_dir)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        assert process.stdout is not None
        url = next((line.strip() for line in process.stdout if line.startswith("http://")), None)
        assert url is not None
        return process, url

    yield serve
    for process in started:
        process.kill()
        process.wait()
