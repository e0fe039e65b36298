"""RadCoPilot's routes, as recorded in the notes on its requests."""

import json
from pathlib import Path

import httpx
from scripted_service import Running, running_service


def text_of(answer: dict) -> str:
    return answer["choices"][0]["message"]["content"]["content"][0]["text"]


def ask(running: Running, prompt: str, **options: str) -> httpx.Response:
    return httpx.post(f"{running.url}/v1/chat/completions/", params={"Prompt": prompt, **options}, timeout=30)


def test_the_plug_in_uploads_asks_and_reads_the_answer(tmp_path: Path, ct_file: Path) -> None:
    with running_service(tmp_path / "legacy") as running:
        assert "VILA-M3" in httpx.get(f"{running.url}/info/").text
        assert text_of(ask(running, "hello").json()) == "I read 1 turns and 0 images; you said hello"
        uploaded = httpx.post(f"{running.url}/upload/", files={"file": ("scan.nii.gz", ct_file.read_bytes())})
        assert uploaded.status_code == 200
        assert text_of(ask(running, "CALL the expert").json()).startswith("The expert said")
        assert text_of(ask(running, "and now?").json()).startswith("I read 5 turns and 2 images"), "history is kept"
        streamed = ask(running, "go on", stream="true")
        lines = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
        assert lines[-1] == "[DONE]"
        assert "".join(text_of(json.loads(line)) for line in lines[:-1]).startswith("I read 7 turns and 2 images")


def test_a_new_upload_begins_anew(tmp_path: Path, ct_file: Path, cxr_file: Path) -> None:
    with running_service(tmp_path / "again") as running:
        for path in (ct_file, cxr_file):
            httpx.post(f"{running.url}/upload/", files={"file": (path.name, path.read_bytes())})
            assert text_of(ask(running, "what?").json()).startswith("I read 1 turns and 1 images")
        assert "CXR" in running.composite.vlm.seen[-1][0]


def test_errors_have_openais_form(scripted: Running) -> None:
    refused = httpx.post(f"{scripted.url}/upload/", files={"file": ("a", b"no image")})
    assert refused.status_code == 400
    assert "no image that this service reads" in refused.json()["error"]["message"]
    missing = httpx.post(f"{scripted.url}/v1/chat/completions/")
    assert missing.json()["error"]["message"] == "Prompt: Field required"


def test_users_with_keys_do_not_share_the_last_file(tmp_path: Path, ct_file: Path) -> None:
    keys = ("key-of-the-first-user", "key-of-the-second-user")
    with running_service(tmp_path / "keys", api_keys=keys) as running:
        headers = [{"Authorization": f"Bearer {key}"} for key in keys]
        files = {"file": ("scan.nii.gz", ct_file.read_bytes())}
        assert httpx.post(f"{running.url}/upload/", files=files, headers=headers[0]).status_code == 200
        address = f"{running.url}/v1/chat/completions/?Prompt=what"
        answers = [text_of(httpx.post(address, headers=header, timeout=30).json()) for header in headers]
        assert [answer[:27] for answer in answers] == ["I read 1 turns and 1 images", "I read 1 turns and 0 images"]
        assert httpx.post(address).status_code == 401
