"""The service under 16 clients for two minutes on nano weights. Run with ``make bench``; figures go to its docs."""

import base64
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from openai import OpenAI

from vila_m3_common import phantoms

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]
CLIENTS = 16
SECONDS = float(os.environ.get("VILA_M3_LOAD_SECONDS", "120"))
CONFIGS = "bundles/vila_m3_with_experts/configs"
NANO = "vila-m3-nano"


@dataclass
class Client:
    """One client with an image of its own; ``facts`` are what it was told while it was alone."""

    number: int
    paths: list[Path]
    questions: tuple[str, str]
    openai: OpenAI
    facts: list[tuple[str, str]] = field(default_factory=list)
    first_token_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    upload_count: int = 0
    faults: list[str] = field(default_factory=list)

    def run_once(self) -> list[tuple[str, str]]:
        """Upload, ask two questions and one without an image; return answers and what the experts measured."""
        messages: list[dict[str, Any]] = []
        found = []
        for question in self.questions:
            content: Any = question if messages else [{"type": "text", "text": question}, *self._parts()]
            messages.append({"role": "user", "content": content})
            answer, measured = self._ask(messages)
            found.append((answer, measured))
            messages.append({"role": "assistant", "content": answer})
        self._ask([{"role": "user", "content": f"Client {self.number} says hello"}], max_tokens=8)
        return found

    def _parts(self) -> list[dict[str, Any]]:
        self.upload_count += len(self.paths)
        if self.paths[0].suffix == ".png" and self.number % 2:
            data = base64.b64encode(self.paths[0].read_bytes()).decode()
            return [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}]
        stored = [self.openai.files.create(file=path.open("rb"), purpose="user_data") for path in self.paths]
        return [{"type": "file", "file": {"file_id": entry.id}} for entry in stored]

    def _ask(self, messages: list[dict[str, Any]], **options: Any) -> tuple[str, str]:
        start, first, answer, measured = time.perf_counter(), None, "", []
        stream = self.openai.chat.completions.create(model=NANO, messages=messages, stream=True, **options)  # type: ignore
        for chunk in stream:
            event = (chunk.model_extra or {}).get("vila_m3", {})
            if event.get("type") == "piece" and first is None:
                first = time.perf_counter() - start
            if event.get("type") == "expert":
                measured.append([event["measurements"], event["scores"], event["is_error"]])
            answer += chunk.choices[0].delta.content or ""
        assert first is not None, "no text came"
        self.first_token_seconds.append(first)
        self.seconds.append(time.perf_counter() - start)
        return answer, json.dumps(measured)


def make_clients(url: str, folder: Path) -> list[Client]:
    clients = []
    for number in range(CLIENTS):
        place = folder / str(number)
        place.mkdir()
        seed = 900 + number
        if number % 4 == 0:
            tumors = ["hepatic tumor"] if number % 8 else []
            volume = phantoms.ct_phantom(seed, tumors, (72, 64, 56), 4.5)
            paths = [phantoms.save_volume(volume.image, volume.affine, place / "ct.nii.gz")]
            questions = ("Are there any liver masses?", "Is there a hepatic tumor?")
        elif number % 4 == 1:
            volume = phantoms.mri_phantom(seed, bool(number % 8 == 1), (48, 56, 40), 4.0)
            paths = sorted(phantoms.save_mri(volume, place / "mri").iterdir())
            questions = ("Is there a brain tumor?", "Segment any tumors in the image")
        else:
            paths = [phantoms.save_radiograph(phantoms.cxr_phantom(seed), place / "cxr.png")]
            questions = ("Is there a pleural effusion?", "What are the findings?")
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
        clients.append(Client(number, paths, questions, client))
    return clients


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


def work(client: Client, end: float) -> None:
    while time.perf_counter() < end and not client.faults:
        try:
            found = client.run_once()
        except Exception as error:
            client.faults.append(f"client {client.number}: {error!r}")
            return
        if found != client.facts:
            client.faults.append(f"client {client.number} was told of {found}, alone it was {client.facts}")


def percentiles(values: list[float]) -> str:
    return " / ".join(f"{value:.2f}" for value in np.percentile(values, (50, 95)))


def test_sixteen_clients_for_two_minutes(repository: Path, tmp_path: Path) -> None:
    configs = f"['{repository / CONFIGS}/inference.json','{repository / CONFIGS}/serve.json']"
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", configs, "--port", "0"]
    command += ["--data_dir", str(tmp_path / "data")]
    log = tmp_path / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        while " on http://" not in log.read_text():
            assert server.poll() is None, log.read_text()
            time.sleep(0.2)
        url = next(line.split(" on ")[1].split()[0] for line in log.read_text().splitlines() if " on http://" in line)
        clients = make_clients(url, tmp_path)
        for client in clients:
            client.facts = client.run_once()
            assert '"is_error": true' not in json.dumps(client.facts)
            client.first_token_seconds.clear()
            client.seconds.clear()
            client.upload_count = 0
        memory = [resident_mib(server.pid)]
        start = time.perf_counter()
        threads = [threading.Thread(target=work, args=(client, start + SECONDS)) for client in clients]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            memory.append(resident_mib(server.pid))
            time.sleep(0.5)
        elapsed = time.perf_counter() - start
        metrics = httpx.get(f"{url}/metrics").text.splitlines()
    finally:
        server.terminate()
        server.wait(timeout=60)
    first = [value for client in clients for value in client.first_token_seconds]
    whole = [value for client in clients for value in client.seconds]
    uploads = sum(client.upload_count for client in clients)

    def figure(name: str) -> str:
        return next(line.split()[1] for line in metrics if line.startswith(f"vila_m3_batch_size_{name}"))

    half = len(memory) // 2
    early, late = float(np.median(memory[half // 2 : half])), float(np.median(memory[-(half // 2) :]))
    print(
        f"\n{len(whole)} answers and {uploads} images in {elapsed:.0f} s: {len(whole) / elapsed:.1f} answers/s, "
        f"{(len(whole) + uploads) / elapsed:.1f} requests/s"
        f"\nfirst token p50 / p95: {percentiles(first)} s; answer p50 / p95: {percentiles(whole)} s"
        f"\nmemory: peak {max(memory):.0f} MiB, second quarter {early:.0f}, last quarter {late:.0f} MiB"
        f"\nturns of the VLM and the runs that answered them: {figure('sum')}, {figure('count')}"
    )
    assert [fault for client in clients for fault in client.faults] == []
    assert all(len(client.seconds) >= 3 for client in clients), "a client starved"
    assert late < 1.1 * early, "memory grows"
