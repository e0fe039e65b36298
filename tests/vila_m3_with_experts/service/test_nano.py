"""The service on the nano weights, as ``make serve`` starts it, asked by OpenAI's own client."""

import base64
import resource
from pathlib import Path
from typing import Any

import httpx
import pytest

NANO = "vila-m3-nano"


def upload(nano: Any, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"type": "file", "file": {"file_id": nano.client.files.create(file=file, purpose="user_data").id}}


def ask(nano: Any, text: str, parts: list[dict[str, Any]], **options: Any) -> Any:
    messages = [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]
    return nano.client.chat.completions.create(model=NANO, messages=messages, **options)


def experts(response: Any) -> list[dict[str, Any]]:
    return [
        message["vila_m3"] for message in response.model_extra["vila_m3"]["transcript"] if message["role"] == "tool"
    ]


def test_a_chest_x_ray_is_scored_by_its_expert(nano: Any, cxr_file: Path) -> None:
    url = f"data:image/png;base64,{base64.b64encode(cxr_file.read_bytes()).decode()}"
    response = ask(nano, "Is there a pleural effusion?", [{"type": "image_url", "image_url": {"url": url}}])
    (call,) = experts(response)
    assert call["name"] == "CXR"
    assert call["scores"]["Effusion"] > 0.5
    assert response.choices[0].message.content == "yes"


def test_a_brain_mri_is_segmented_and_a_second_question_uses_the_result(nano: Any, mri_folder: Path) -> None:
    parts = [upload(nano, path) for path in sorted(mri_folder.iterdir())]
    first = ask(nano, "Is there a brain tumor?", parts)
    (call,) = experts(first)
    assert call["name"] == "BRATS"
    assert {row["name"] for row in call["labels"]} <= {row["name"] for row in call["measurements"]}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Is there a brain tumor?"}, *parts]},
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "Segment any tumors in the image"},
    ]
    second = nano.client.chat.completions.create(model=NANO, messages=messages)
    assert [call["is_reused"] for call in experts(second)] == [True]
    assert second.choices[0].message.content == "All tumors were segmented"
    assert second.usage.prompt_tokens_details.cached_tokens > 0


def test_a_ct_is_segmented_and_streamed(nano: Any, ct_file: Path) -> None:
    chunks = list(ask(nano, "Are there any liver masses?", [upload(nano, ct_file)], stream=True))
    events = [chunk.model_extra["vila_m3"] for chunk in chunks if "vila_m3" in chunk.model_extra]
    (call,) = [event for event in events if event["type"] == "expert"]
    assert (call["name"], call["argument"]) == ("VISTA3D", "hepatic tumor")
    assert "liver" in {row["name"] for row in call["measurements"]}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) in ("yes", "no")


def test_nothing_that_users_typed_is_logged(nano: Any, cxr_file: Path) -> None:
    ask(nano, "Does Zebedee have it?", [upload(nano, cxr_file)], max_tokens=1)
    httpx.post(f"{nano.url}/v1/chat/completions/", params={"Prompt": "Does Zebedee have it?"}, timeout=60)
    httpx.get(f"{nano.url}/Zebedee?name=Zebedee")
    log = nano.log.read_text()
    assert "POST /v1/chat/completions 200" in log
    assert "Zebedee" not in log


def test_a_page_of_another_name_is_refused(nano: Any) -> None:
    """A page elsewhere cannot reach the service by giving its own name this machine's address."""
    refused = httpx.get(f"{nano.url}/v1/models", headers={"Host": "attacker.example"})
    assert refused.status_code == 400


def test_a_full_disk_is_told_and_overcome(nano: Any, cxr_file: Path) -> None:
    """The kernel refuses the process every file above 4 KiB, for a while."""
    part = upload(nano, cxr_file)
    pid = nano.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, hard))
    try:
        refused = httpx.post(f"{nano.url}/v1/files", files={"file": ("a.png", cxr_file.read_bytes())}, timeout=60)
        told = ask(nano, "Is there a pneumothorax?", [part])
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "insufficient_storage")
    assert [call["is_error"] for call in experts(told)] == [True]
    assert upload(nano, cxr_file)
    assert [call["is_error"] for call in experts(ask(nano, "Is there a pneumothorax?", [part]))] == [False]


@pytest.mark.parametrize("sampled", [0, 1.0])
def test_a_seed_repeats_an_answer(nano: Any, cxr_file: Path, sampled: float) -> None:
    part = upload(nano, cxr_file)
    answers = {
        ask(nano, "What are the findings?", [part], temperature=sampled, seed=5).choices[0].message.content
        for _ in range(2)
    }
    assert len(answers) == 1
