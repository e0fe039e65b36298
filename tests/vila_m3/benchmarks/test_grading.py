import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from vila_m3.benchmarks import answers, grading, statistics
from vila_m3.benchmarks.definition import Benchmark, Question, load_benchmark
from vila_m3.benchmarks.endpoint import Endpoint, EndpointError
from vila_m3.benchmarks.predictions import PredictionFile, read_predictions, read_rows
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError

SLAKE = Benchmark("toy", "Toy", "toy.read", "toy", "imgs", "exact", "equality")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Diagnosis: yes", "yes"), ("abnormal", "yes"), ("cannot exclude an effusion, yes", "yes"), ("No.", "no"),
        ("There is evidence of effusion", "yes"), ("There is no evidence of effusion", "no"), ("", None),
        ("I cannot answer this question.", None), ("cannot exclude", None), ("eyes", None), ("<CXR()>", None),
    ],
)  # fmt: skip
def test_yes_and_no_are_read_by_the_grammar(text: str, read: str | None) -> None:
    assert answers.parse_yes_no(text) == read


def test_letters_are_read_by_the_grammar() -> None:
    options = ["Atelectasis", "Cardiomegaly", "None of the above"]
    assert answers.parse_letters("(B) Cardiomegaly", options) == ("B",)
    assert answers.parse_letters("(A), (B)", options) == ("A", "B")
    assert answers.parse_letters("effusion", options) is None


def test_grading_counts_unknown_missing_repeated_and_cut_lines(tmp_path: Path) -> None:
    questions = [Question(str(n), "is it?", "yes", "a.png", f"p{n % 2}", "CLOSED") for n in range(4)]
    path = tmp_path / "predictions.jsonl"
    rows = [("0", "Yes"), ("1", "no"), ("1", "yes"), ("9", "yes"), ("2", "")]
    path.write_text(
        "".join(json.dumps({"question_id": i, "text": t}) + "\n" for i, t in rows) + '{"question_id": "3", "te'
    )
    read = read_predictions(path, [question.id for question in questions])
    results = grading.grade(SLAKE, questions, read)
    assert results["accuracy"]["value"] == 0.5
    assert results["unparsable"] == 1
    assert len(read.notes) == 4
    assert "not valid JSON" in read.notes[0]


def test_a_misspelt_key_is_refused_with_the_near_match(tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(
        "title: t\nsource: s.r\nfolder: f\nimages: i\ngrader: exact\ncounts: c\nsufix: x\n"
    )
    with pytest.raises(UserError, match="unknown key 'sufix'; did you mean 'suffix'"):
        load_benchmark("toy", tmp_path)


@pytest.mark.parametrize("name", ["slake", "vqa_rad", "vqa_rad_all"])
def test_shipped_benchmarks_are_valid(repository: Path, name: str) -> None:
    assert load_benchmark(name, repository / "vila_m3_bundle/configs/benchmarks").options["split"] == "test"


def test_predictions_continue_after_a_cut_and_drop_a_changed_line(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    PredictionFile(path, {"a": 1}).append([{"question_id": "1", "text": "yes"}, {"question_id": "2", "text": "no"}])
    path.write_text(path.read_text().replace('"no"', '"yes"') + '{"question_id": "3"')
    assert list(PredictionFile(path, {"a": 1}).done) == ["1"]
    assert len(read_rows(path)[0]) == 1
    with pytest.raises(UserError, match="other settings"):
        PredictionFile(path, {"a": 2})


def test_intervals_hold_the_mean_and_widen_with_groups() -> None:
    values = [0.0] * 50 + [1.0] * 50
    low, high = statistics.bootstrap_interval(values, [str(n) for n in range(100)])
    assert low < 0.5 < high
    wide = statistics.bootstrap_interval(values, [str(n // 25) for n in range(100)])
    assert wide[1] - wide[0] > high - low
    with pytest.raises(ValueError, match="not finite"):
        statistics.bootstrap_interval([float("nan")], ["a"])


def test_the_permutation_test_sees_a_difference_and_none() -> None:
    ids = [str(n) for n in range(60)]
    assert statistics.permutation_p_value([1.0] * 60, [0.0] * 60, ids) < 0.001
    assert statistics.permutation_p_value([1.0] * 60, [1.0] * 60, ids) == 1.0


class Stub(http.server.BaseHTTPRequestHandler):
    statuses: list[int] = []

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.statuses.pop(0))
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode())

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_an_endpoint_is_asked_again_after_a_500_and_gives_up(stub: str) -> None:
    conversation = Conversation()
    conversation.add("user", "<image>\nis it?", [np.zeros((4, 4, 3), np.uint8)])
    Stub.statuses = [500, 200]
    assert Endpoint(stub, "m", retries=1, wait_seconds=0.01).answer(conversation) == "yes"
    Stub.statuses = [500, 500]
    with pytest.raises(EndpointError, match="status 500"):
        Endpoint(stub, "m", retries=1, wait_seconds=0.01).answer(conversation)
