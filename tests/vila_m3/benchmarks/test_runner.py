"""The evaluate command as a command: an endpoint in the model's place, a kill, several processes."""

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vila_m3.answer import Answerer
from vila_m3.benchmarks import runner
from vila_m3.benchmarks.definition import Benchmark, load_benchmark, read_questions
from vila_m3.benchmarks.endpoint import make_endpoint
from vila_m3.benchmarks.predictions import PredictionFile, merge_shards, read_rows, read_shards, shard_path
from vila_m3_common.errors import UserError

from .commands import Reply, StubEndpoint, body, command, finish, rows_of, run_here, start, wait_for_rows, write_slake

Serve = Callable[[Callable[[str, int], Reply]], StubEndpoint]


@pytest.fixture
def serve() -> Iterator[Serve]:
    stubs: list[StubEndpoint] = []

    def start_stub(reply: Callable[[str, int], Reply]) -> StubEndpoint:
        stubs.append(StubEndpoint(reply))
        return stubs[-1]

    yield start_stub
    for stub in stubs:
        stub.close()


@pytest.fixture
def slake(repository: Path) -> Benchmark:
    return load_benchmark("slake", repository / "vila_m3_bundle/configs/benchmarks")


def troubled(question: str, before: int) -> Reply:
    """Fail once, time out, break off, fail for ever; else answer."""
    number = int(question.split()[-1].rstrip("?"))
    if number == 1 and not before:
        return 500, b"later"
    if number == 2:
        return 500, b"never"
    if number == 3 and not before:
        return 200, b'{"choices": [{"mess'
    if number == 4 and not before:
        time.sleep(3)
    if number == 5:
        return 400, b"a question that it refuses"
    return 200, body("Yes" if number % 2 else "No")


def test_an_endpoint_stands_in_for_the_model(tmp_path: Path, serve: Serve) -> None:
    data, output, stub = write_slake(tmp_path / "data", 8), tmp_path / "out", serve(troubled)
    options = ["--endpoint_url", stub.url, "--endpoint_model", "m", "--endpoint_retries", "1"]
    options += ["--endpoint_timeout", "1.5", "--blank_baseline", "False", "--batch_size", "4"]
    printed = finish(command(data, output, *options))
    rows = {row["question_id"]: row for row in rows_of(output / "predictions/slake.jsonl")}
    errors = {key: row["error"].rsplit("gave ", 1)[-1] for key, row in rows.items() if "error" in row}
    names = list(rows)
    assert errors == {names[2]: "status 500", names[5]: "status 400"}
    assert [stub.asked[f"Is this question {number}?"] for number in range(8)] == [1, 2, 2, 2, 2, 1, 1, 1]
    results = json.loads((output / "results.json").read_text())
    assert results["slake"]["accuracy"]["value"] == 3 / 8
    assert any("2 questions could not be asked; wrong" in note for note in results["slake"]["notes"])
    assert "2 questions could not be asked" in printed
    content = stub.bodies[0]["messages"][0]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,")

    changes = {"endpoint_url": stub.url, "endpoint_model": "m", "endpoint_retries": 1, "blank_baseline": False}
    run_here(data, output, **changes)
    again = [stub.asked[f"Is this question {number}?"] for number in range(8)]
    assert again == [1, 2, 4, 2, 2, 2, 1, 1], "only what has failed is asked again"


def test_a_killed_run_goes_on_and_loses_and_repeats_nothing(tmp_path: Path, serve: Serve) -> None:
    def slow(question: str, before: int) -> Reply:
        time.sleep(0.05)
        return 200, body("Yes" if int(question.split()[-1].rstrip("?")) % 3 else "No")

    data, stub = write_slake(tmp_path / "data", 60), serve(slow)
    options = ["--endpoint_url", stub.url, "--endpoint_model", "m", "--blank_baseline", "False", "--batch_size", "2"]
    killed = start(command(data, tmp_path / "killed", *options))
    shard = tmp_path / "killed/predictions/slake.shard0.jsonl"
    wait_for_rows(shard, 10, killed)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    kept = len(read_rows(shard)[0])
    assert 10 <= kept < 60
    with shard.open("a") as file:
        file.write('{"question_id": "cut of')
    changes = {"endpoint_url": stub.url, "endpoint_model": "m", "blank_baseline": False}
    run_here(data, tmp_path / "killed", **changes)
    assert sum(stub.asked.values()) <= 60 + 2, "at most the batch that was being asked is asked again"
    assert all(count in (1, 2) for count in stub.asked.values())
    assert len(rows_of(shard)) == 60

    run_here(data, tmp_path / "whole", **changes)
    for name in ("results.json", "predictions/slake.jsonl", "predictions/slake.items.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()


CONFIDENCE = re.compile(r'"(?:confidence|expected_calibration_error)": ([\d.e-]+)|"sha256": "\w+"')


def confidences(text: str) -> list[float]:
    """Return every confidence of a file, in order."""
    return [float(value) for value in CONFIDENCE.findall(text) if value]


def test_two_processes_give_the_results_of_one(tmp_path: Path) -> None:
    data = write_slake(tmp_path / "data", 13)
    run_here(data, tmp_path / "one", max_new_tokens=6, batch_size=4)
    options = ["--max_new_tokens", "6", "--batch_size", "4"]
    launcher = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    finish(command(data, tmp_path / "two", *options, launcher=launcher))
    shards = sorted((tmp_path / "two/predictions").glob("slake.shard*.jsonl"))
    assert [len(rows_of(shard)) for shard in shards] == [7, 6]
    for name in ("results.json", "predictions/slake.jsonl", "predictions/slake_blank.jsonl"):
        one, two = ((tmp_path / folder / name).read_text() for folder in ("one", "two"))
        # Other batches have other paddings, so confidences differ in their last digits, and rows' hashes with them.
        assert CONFIDENCE.sub("", one) == CONFIDENCE.sub("", two)
        assert confidences(one) == pytest.approx(confidences(two), abs=1e-5)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, slake: Benchmark) -> None:
    data, folder = write_slake(tmp_path, 9), tmp_path / "predictions"
    questions = read_questions(slake, data)
    asked: list[int] = []

    def ask(conversations: Any) -> list[dict[str, Any]]:
        asked.append(len(conversations))
        return [{"text": "Yes"} for _ in conversations]

    questioner = runner.Questioner(slake, ask, str(data), 4)
    three = runner.Processes(1, 3)
    runner._ask_share(questioner, questions, {}, folder, three)
    with pytest.raises(UserError, match="6 questions of slake have no row in .*run the same command again"):
        merge_shards(folder, "slake", [question.id for question in questions])
    runner._ask_share(questioner, questions, {}, folder, runner.Processes(0, 1))
    assert sum(asked) == 9
    merged = merge_shards(folder, "slake", [question.id for question in questions])
    assert [row["question_id"] for row in rows_of(merged)] == [question.id for question in questions]


def test_an_answer_outweighs_an_error_of_another_process(tmp_path: Path) -> None:
    PredictionFile(shard_path(tmp_path, "toy", 0), {}).append([{"question_id": "1", "text": "yes"}])
    PredictionFile(shard_path(tmp_path, "toy", 1), {}).append([{"question_id": "1", "text": "", "error": "gone"}])
    assert read_shards(tmp_path, "toy")["1"]["text"] == "yes"


def test_answers_to_other_prompts_are_not_taken(tmp_path: Path, slake: Benchmark) -> None:
    questioner = runner.Questioner(slake, lambda talks: [{"text": "Yes"} for _ in talks], str(tmp_path), 4)
    folder, alone = tmp_path / "predictions", runner.Processes(0, 1)
    runner._ask_share(questioner, read_questions(slake, write_slake(tmp_path, 4)), {}, folder, alone)
    with pytest.raises(UserError, match="was begun with other settings .questions .*give another --output_dir"):
        runner._ask_share(questioner, read_questions(slake, write_slake(tmp_path, 5)), {}, folder, alone)


def test_a_missing_image_and_a_long_question_cost_no_other_answer(
    tmp_path: Path, slake: Benchmark, model: Any, processor: Any
) -> None:
    data = write_slake(tmp_path, 4, image_count=4)
    (data / "slake/imgs/xmlab1/source.jpg").unlink()
    rows = json.loads((data / "slake/test.json").read_text())
    rows[2]["question"] = "why " * 4000
    (data / "slake/test.json").write_text(json.dumps(rows))
    questions = read_questions(slake, data)
    answerer = Answerer(model, processor, 3)
    found = runner.Questioner(slake, runner.asks_model(answerer), str(data), 4).answer(questions)
    assert ["error" in row for row in found] == [False, True, True, False]
    assert "the conversation has" in found[2]["error"]
    assert found[0]["text"]


def test_each_image_is_encoded_once_and_blank_ones_are_one(
    tmp_path: Path, slake: Benchmark, model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_slake(tmp_path, 12, image_count=3)
    encoded: list[int] = []
    encode = model.encode_images
    monkeypatch.setattr(model, "encode_images", lambda pixels: encoded.append(len(pixels)) or encode(pixels))
    questions = read_questions(slake, data)
    for is_blank, expected in ((False, 3), (True, 1)):
        encoded.clear()
        ask = runner.asks_model(Answerer(model, processor, 3, kept_conversations=0))
        questioner = runner.Questioner(slake, ask, str(data), 5, is_blank)
        written = PredictionFile(tmp_path / f"{is_blank}.jsonl", {})
        questioner.run(questions, written, set())
        assert sum(encoded) == expected
        assert len(written.done) == 12


def test_a_blank_picture_shows_nothing(tmp_path: Path, slake: Benchmark) -> None:
    shown: list[np.ndarray] = []

    def ask(talks: Any) -> list[dict[str, Any]]:
        shown.extend(talk.images[0] for talk in talks)
        return [{"text": ""} for _ in talks]

    questions = read_questions(slake, write_slake(tmp_path, 1))
    for is_blank in (True, False):
        runner.Questioner(slake, ask, str(tmp_path), 1, is_blank).answer(questions)
    assert [image.any() for image in shown] == [False, True]


def test_an_address_without_a_model_is_refused() -> None:
    with pytest.raises(UserError, match="--endpoint_url needs --endpoint_model"):
        make_endpoint("http://localhost:1/v1", None)
    assert make_endpoint(None, None) is None
