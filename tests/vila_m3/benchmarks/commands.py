"""What the tests of the evaluate command share: a small data set, a stub of an endpoint, and the command itself."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from monai.bundle import run
from PIL import Image

from vila_m3_common.hooks import quiet

REPOSITORY = Path(__file__).resolve().parents[3]
EVALUATE = REPOSITORY / "vila_m3_bundle/configs/evaluate.json"
# What the stub does with a question: (status, body), or seconds to wait first.
Reply = tuple[int, bytes]


def write_slake(root: Path, count: int = 12, image_count: int = 3) -> Path:
    """Write questions in SLAKE's layout, all answered ``Yes``, and return ``root``."""
    rows = []
    for number in range(count):
        name = f"xmlab{number % image_count}/source.jpg"
        path = root / "slake/imgs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = np.random.default_rng(number % image_count).integers(0, 255, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(picture).save(path)
        rows.append(
            {
                "img_id": number % image_count, "img_name": name, "question": f"Is this question {number}?",
                "answer": "Yes", "q_lang": "en", "location": "Lung", "modality": "X-Ray", "answer_type": "CLOSED",
                "base_type": "vqa", "content_type": "Abnormality", "triple": ["vhead", "_", "_"], "qid": number,
            }
        )  # fmt: skip
    (root / "slake/test.json").write_text(json.dumps(rows))
    return root


def body(text: Any) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


class StubEndpoint:
    """An OpenAI-compatible server; ``reply`` maps (question, how often it was asked before) to what it answers."""

    def __init__(self, reply: Callable[[str, int], Reply]) -> None:
        self.asked: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        stub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                text = sent["messages"][-1]["content"][-1]["text"].splitlines()[0]
                before = stub.asked[text]
                stub.asked[text] += 1
                stub.bodies.append(sent)
                status, answer = reply(text, before)
                try:
                    self.send_response(status)
                    self.end_headers()
                    self.wfile.write(answer)
                except OSError:
                    pass  # the client has given up

            def log_message(self, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()


def command(data_root: Path, output: Path, *options: str, launcher: tuple[str, ...] = ()) -> list[str]:
    run = ["monai.bundle", "run", "--config_file", str(EVALUATE), "--benchmarks", "['slake']"]
    started = [sys.executable, "-m", *(launcher or ()), *(["-m"] if launcher else []), *run]
    return [*started, "--data_root", str(data_root), "--output_dir", str(output), *options]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("OPENAI_API_KEY", None)
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=REPOSITORY
    )


def finish(arguments: list[str]) -> str:
    """Run to the end and return what was printed."""
    process = start(arguments)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, out + errors
    return out


def run_here(data_root: Path, output: Path, **options: Any) -> None:
    """Run the command's config in this process, which has already imported everything."""
    with quiet():
        run(
            config_file=str(EVALUATE),
            benchmarks=["slake"],
            data_root=str(data_root),
            output_dir=str(output),
            device="cpu",
            **options,
        )


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until a JSONL file has ``count`` lines."""
    limit = time.monotonic() + 240
    while time.monotonic() < limit:
        assert process.poll() is None, "the command ended before it could be killed"
        if path.is_file() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"{path} did not get {count} lines")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
