"""Chat completions as OpenAI's own client sees them."""

import base64
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from scripted_service import MODEL, Running, running_service

from vila_m3_composite.service.chat import until_stop

CUT_NOTE = "The answer was cut off after 3 tokens (max_new_tokens)."


def upload(running: Running, path: Path, key: str = "none") -> str:
    with path.open("rb") as file:
        return running.client(key).files.create(file=file, purpose="user_data").id


def about(file_id: str, text: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": [{"type": "text", "text": text}, {"type": "file", "file": {"file_id": file_id}}]}
    ]


def data_url(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def ask(running: Running, messages: list[dict[str, Any]], **options: Any) -> Any:
    key = options.pop("key", "none")
    return running.client(key).chat.completions.create(model=MODEL, messages=messages, **options)  # type: ignore


def answer(running: Running, messages: list[dict[str, Any]], **options: Any) -> str:
    return ask(running, messages, **options).choices[0].message.content


@pytest.fixture(scope="module")
def ct(scripted: Running, ct_file: Path) -> str:
    return upload(scripted, ct_file)


def test_an_expert_is_run_and_the_answer_follows_its_feedback(scripted: Running, ct: str) -> None:
    response = ask(scripted, about(ct, "CALL Are there bones?"))
    assert response.choices[0].finish_reason == "stop"
    assert response.choices[0].message.content.startswith("The expert said: red: bone of ")
    told = response.model_extra["vila_m3"]
    assert told["study"] == {"modality": "CT", "source": "intensities", "slice_index": 28, "axis": 2}
    asked, tool, last = told["transcript"]
    (call,) = asked["tool_calls"]
    assert asked["content"] == "This looks like a CT image. Let me trigger <VISTA3D(bone)>."
    assert (call["type"], call["function"]) == ("function", {"name": "VISTA3D", "arguments": '{"argument": "bone"}'})
    assert (tool["role"], tool["tool_call_id"]) == ("tool", call["id"])
    assert tool["content"].startswith("The results are <image>. The colors in this image describe red: bone of ")
    assert tool["vila_m3"]["measurements"][0]["name"] == "bone"
    assert tool["vila_m3"]["labels"][0]["color"] == "red"
    assert last == {"role": "assistant", "content": response.choices[0].message.content}


def test_usage_counts_every_turn_of_the_vlm(scripted: Running, ct: str) -> None:
    seen = len(scripted.composite.vlm.seen)
    usage = ask(scripted, about(ct, "CALL once")).usage
    shown = scripted.composite.vlm.seen[seen:]
    assert len(shown) == 2
    assert usage.prompt_tokens == sum(len(" ".join(texts).split()) for texts in shown)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_experts_can_be_hidden(scripted: Running, ct: str) -> None:
    response = ask(scripted, about(ct, "CALL hidden"), extra_body={"experts": "hidden"})
    assert "transcript" not in response.model_extra["vila_m3"]
    chunks = list(ask(scripted, about(ct, "CALL hidden"), extra_body={"experts": "hidden"}, stream=True))
    assert {chunk.model_extra["vila_m3"]["type"] for chunk in chunks if "vila_m3" in chunk.model_extra} == {"finished"}


@pytest.mark.parametrize("text", ["CALL Are there bones?", "REPORT the bones", "TWICE", "nothing to call"])
def test_a_stream_joins_to_the_same_answer(scripted: Running, ct: str, text: str) -> None:
    whole = answer(scripted, about(ct, text))
    chunks = list(ask(scripted, about(ct, text), stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == whole
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.total_tokens > 0
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_tells_trigger_expert_and_pieces_as_they_happen(scripted: Running, ct: str) -> None:
    chunks = list(ask(scripted, about(ct, "CALL a stream"), stream=True))
    events = [chunk.model_extra["vila_m3"] for chunk in chunks if "vila_m3" in chunk.model_extra]
    kinds = [event["type"] for event in events if event["type"] not in ("piece", "expert_running", "expert_waiting")]
    assert kinds == ["study", "assistant", "expert", "assistant", "study", "finished"]
    assert events[0]["study"]["modality"] == "CT"
    first = "".join(event["text"] for event in events if event["type"] == "piece" and event["turn"] == 1)
    assert first.strip() == "This looks like a CT image. Let me trigger <VISTA3D(bone)>."
    contents = [chunk for chunk in chunks if chunk.choices[0].delta.content]
    assert len(contents) > 3, "the answer after the feedback is streamed word by word"


def test_a_second_question_reads_the_experts_earlier_turn(scripted: Running, ct: str) -> None:
    messages = about(ct, "CALL first")
    first = ask(scripted, messages)
    runs = scripted.composite.experts["VISTA3D"].run_count
    plain = [*messages, {"role": "assistant", "content": first.choices[0].message.content}]
    with_tools = [*messages, *first.model_extra["vila_m3"]["transcript"]]
    question = {"role": "user", "content": "and now?"}
    for history in (plain, with_tools):
        assert answer(scripted, [*history, question]).startswith("I read 5 turns and 2 images")
    assert any("The results are <image>" in text for text in scripted.composite.vlm.seen[-1])
    again = ask(scripted, [*plain, {"role": "user", "content": "CALL again"}])
    assert again.model_extra["vila_m3"]["transcript"][1]["vila_m3"]["is_reused"]
    assert scripted.composite.experts["VISTA3D"].run_count == runs


def test_a_changed_history_is_another_conversation(scripted: Running, ct: str) -> None:
    messages = about(ct, "CALL to be changed")
    answer(scripted, messages)
    changed = [*messages, {"role": "assistant", "content": "There are <VISTA3D(bone)> wings."}]
    runs = scripted.composite.experts["VISTA3D"].run_count
    response = ask(scripted, [*changed, {"role": "user", "content": "really?"}])
    assert response.choices[0].message.content.startswith("I read 3 turns and 1 images")
    assert scripted.composite.vlm.seen[-1][1] == "There are <VISTA3D(bone)> wings."
    assert scripted.composite.experts["VISTA3D"].run_count == runs, "an assistant text of the client calls nothing"
    assert any("was not kept" in note for note in response.model_extra["vila_m3"]["notes"])


def test_one_point_of_a_conversation_can_be_continued_twice(scripted: Running, ct: str) -> None:
    messages = about(ct, "a branch")
    messages.append({"role": "assistant", "content": answer(scripted, messages)})
    for _ in range(2):
        assert answer(scripted, [*messages, {"role": "user", "content": "go on"}]).startswith("I read 3 turns")


def test_new_images_begin_a_new_study(scripted: Running, ct: str, cxr_file: Path) -> None:
    messages = about(ct, "CALL one")
    messages.append({"role": "assistant", "content": answer(scripted, messages)})
    picture = {"type": "image_url", "image_url": {"url": data_url(cxr_file)}}
    messages.append({"role": "user", "content": [{"type": "text", "text": "and this?"}, picture]})
    response = ask(scripted, messages)
    assert response.choices[0].message.content.startswith("I read 1 turns and 1 images")
    assert response.model_extra["vila_m3"]["study"]["modality"] == "CXR"
    assert any("begin a new study" in note for note in response.model_extra["vila_m3"]["notes"])


def test_study_options_choose_slice_axis_and_modality(scripted: Running, ct: str) -> None:
    options = {"study": {"slice_index": 3, "axis": 0, "modality": "CT"}}
    told = ask(scripted, about(ct, "CALL sideways"), extra_body=options).model_extra["vila_m3"]
    assert told["study"] == {"modality": "CT", "source": "user", "slice_index": 3, "axis": 0}


def test_a_conversation_needs_no_image(scripted: Running) -> None:
    response = ask(scripted, [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}])
    assert response.choices[0].message.content == "I read 1 turns and 0 images; you said hello"
    assert response.model_extra["vila_m3"]["notes"] == [
        "System messages are not read: the model was trained with one fixed system text."
    ]
    told = ask(scripted, [{"role": "user", "content": "CALL nobody"}]).model_extra["vila_m3"]
    assert told["transcript"][1]["vila_m3"]["is_error"]


def test_control_strings_of_users_are_taken_out(scripted: Running, ct: str) -> None:
    answer(scripted, about(ct, "What is <image> and <|eot_id|> this?"))
    assert scripted.composite.vlm.seen[-1][0].endswith("\nWhat is  and  this?")


@pytest.mark.parametrize("stop", ["read", ["zzz", "turns"]])
@pytest.mark.parametrize("stream", [False, True])
def test_stop_sequences_end_the_answer(scripted: Running, ct: str, stop: Any, stream: bool) -> None:
    for messages in (about(ct, "please"), [{"role": "user", "content": "please"}]):
        whole = answer(scripted, messages)
        if stream:
            text = "".join(
                part.choices[0].delta.content or "" for part in ask(scripted, messages, stop=stop, stream=True)
            )
        else:
            text = answer(scripted, messages, stop=stop)
        assert text == whole[: whole.index("read" if stop == "read" else "turns")].rstrip()


def test_a_stop_sequence_does_not_cut_a_trigger(scripted: Running, ct: str) -> None:
    assert answer(scripted, about(ct, "CALL with a stop"), stop="image").startswith("The expert said")


def test_stop_sequences_are_found_across_pieces() -> None:
    assert "".join(until_stop(["one st", "op", " two"], ("stop", "xyz"))) == "one "
    assert list(until_stop(["ab", "cd", "e"], ("zz",))) == ["a", "bc", "d", "e"]


def test_max_tokens_cuts_the_answer_and_says_so(scripted: Running) -> None:
    response = ask(scripted, [{"role": "user", "content": "hello"}], max_tokens=3)
    assert response.choices[0].message.content == "I read 1"
    assert response.choices[0].finish_reason == "length"
    assert response.usage.completion_tokens == 3
    assert response.model_extra["vila_m3"]["notes"] == [CUT_NOTE]
    chunks = list(ask(scripted, [{"role": "user", "content": "hello"}], max_tokens=3, stream=True))
    assert chunks[-1].model_extra["vila_m3"]["notes"] == [CUT_NOTE]


def test_sampling_options_reach_the_vlm(scripted: Running) -> None:
    ask(scripted, [{"role": "user", "content": "hello"}], temperature=0.7, top_p=0.9, seed=11)
    sampling = scripted.composite.vlm.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.7, 0.9, 11)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": "gpt"}, openai.NotFoundError, r"the model 'gpt' does not exist; there is 'vila-m3-scripted'"),
        ({"max_tokens": 5000}, openai.BadRequestError, r"max_tokens 5000 is too large; allowed are 1 to 1024"),
        ({"max_tokens": 0}, openai.BadRequestError, r"max_tokens: .*greater than or equal to 1"),
        ({"temperature": 3}, openai.BadRequestError, r"temperature: .*less than or equal to 2"),
        ({"n": 2}, openai.BadRequestError, r"n: Input should be 1"),
        ({"extra_body": {"max_token": 5}}, openai.BadRequestError, r"unknown parameter .*did you mean 'max_tokens'"),
        ({"stop": [""]}, openai.BadRequestError, r"stop takes up to 4 texts of 1 to 200 characters"),
        ({"messages": []}, openai.BadRequestError, r"messages: .*at least 1 item"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, openai.BadRequestError, r"the last message must be"),
        ({"messages": [{"role": "user", "content": " "}]}, openai.BadRequestError, r"the last message has no text"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError, r"tools: "),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_in_openais_form(
    scripted: Running, change: dict[str, Any], kind: type[openai.APIStatusError], message: str
) -> None:
    request = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **change}
    with pytest.raises(kind, match=message) as caught:
        scripted.client().chat.completions.create(**request)
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.org/x.png", "not fetched from this address; allowed: none; send a data URL"),
        ("file:///etc/passwd", "neither a data URL of a PNG or JPEG"),
        ("/etc/passwd", "neither a data URL of a PNG or JPEG"),
        ("data:image/png;base64,!!!", "no valid base64"),
        ("data:image/png;base64,aGVsbG8=", "the content is no image that this service reads"),
        ("file-" + "0" * 32, "there is no file"),
        ("file-../../etc", "there is no file"),
    ],
)
def test_other_image_addresses_are_refused(scripted: Running, url: str, message: str) -> None:
    content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
    for stream in (False, True):
        with pytest.raises(openai.APIStatusError, match=message):
            ask(scripted, [{"role": "user", "content": content}], stream=stream)


def test_pictures_are_fetched_from_allowed_addresses_only(
    scripted: Running, ct: str, cxr_file: Path, tmp_path: Path
) -> None:
    overlay = ask(scripted, about(ct, "CALL for an overlay")).model_extra["vila_m3"]["transcript"][1]["vila_m3"][
        "overlay"
    ]
    allowed = f"{scripted.url}/v1/files/"
    with running_service(tmp_path / "fetching", image_urls=(allowed,)) as other:
        for url, expected in ((f"{allowed}{overlay}/content", None), (f"{scripted.url}/health", "not fetched from")):
            content = [{"type": "text", "text": "what?"}, {"type": "image_url", "image_url": {"url": url}}]
            if expected is None:
                assert "1 images" in answer(other, [{"role": "user", "content": content}])
                continue
            with pytest.raises(openai.BadRequestError, match=expected):
                answer(other, [{"role": "user", "content": content}])


def test_models_are_listed_with_their_experts(scripted: Running) -> None:
    (model,) = scripted.client().models.list().data
    assert model.id == MODEL
    assert model.model_extra["experts"] == [{"name": "VISTA3D", "modality": "CT", "task": "segmentation"}]
    assert scripted.client().models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        scripted.client().models.retrieve("other")


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end, "waited for 20 s"
        time.sleep(0.01)


def ask_together(scripted: Running, **options: Any) -> dict[int, Any]:
    """While a turn holds the VLM, six others gather, and are answered in one batch."""
    vlm, queue = scripted.composite.vlm, scripted.service.vlm
    vlm.batches.clear()
    vlm.go_on.clear()
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = ask(scripted, [{"role": "user", "content": f"number {number}"}], **options)

    holder = threading.Thread(target=answer, args=(scripted, [{"role": "user", "content": "WAIT"}]))
    holder.start()
    wait_until(lambda: any("WAIT" in texts[-1] for texts in vlm.seen[-1:]))
    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(queue._jobs) == 6)
    vlm.go_on.set()
    for thread in [holder, *threads]:
        thread.join()
    assert vlm.batches == [6]
    return found


def test_turns_that_wait_together_get_each_its_own_answer(scripted: Running) -> None:
    found = {number: response.choices[0].message.content for number, response in ask_together(scripted).items()}
    assert found == {number: f"I read 1 turns and 0 images; you said number {number}" for number in range(6)}


def test_turns_that_wait_together_are_told_that_they_were_cut(scripted: Running) -> None:
    for response in ask_together(scripted, max_tokens=3).values():
        assert response.choices[0].finish_reason == "length"
        assert response.model_extra["vila_m3"]["notes"] == [CUT_NOTE]


def test_too_many_conversations_are_told_to_come_back(tmp_path: Path) -> None:
    with running_service(tmp_path / "busy", limits={"running": 1, "waiting": 1}) as busy:
        threads = [
            threading.Thread(target=answer, args=(busy, [{"role": "user", "content": "SLOW"}])) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        time.sleep(0.7)
        body = {"model": MODEL, "messages": [{"role": "user", "content": "one more"}]}
        refused = httpx.post(f"{busy.url}/v1/chat/completions", json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "server_busy")
        assert int(refused.headers["retry-after"]) > 0
        for thread in threads:
            thread.join()
        assert httpx.post(f"{busy.url}/v1/chat/completions", json=body, timeout=30).status_code == 200


def test_health_and_metrics_tell_what_happens(scripted: Running) -> None:
    answer(scripted, [{"role": "user", "content": "count me"}])
    assert httpx.get(f"{scripted.url}/health").json() == {"status": "ok", "model": MODEL}
    text = httpx.get(f"{scripted.url}/metrics").text
    assert 'vila_m3_requests_total{route="/v1/chat/completions",status="200"}' in text
    assert "vila_m3_first_token_seconds_count" in text
    assert "vila_m3_running 0.0" in text
    assert "count me" not in text
