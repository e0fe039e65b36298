"""Files: random ids, isolation, erasure, what a restart finds."""

import io
import json
import os
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import nibabel as nib
import numpy as np
import openai
import pytest
from scripted_service import MODEL, Running, running_service

from vila_m3_composite.service.errors import ApiError
from vila_m3_composite.service.store import FileStore, clean_name

KEYS = ("key-of-the-first-user", "key-of-the-second-user")


def about(file_ids: list[str], text: str) -> list[dict[str, Any]]:
    files = [{"type": "file", "file": {"file_id": file_id}} for file_id in file_ids]
    return [{"role": "user", "content": [{"type": "text", "text": text}, *files]}]


def upload(running: Running, path: Path, key: str = "none") -> Any:
    with path.open("rb") as file:
        return running.client(key).files.create(file=file, purpose="user_data")


def test_a_file_has_a_random_id_and_no_name_of_its_users(scripted: Running, ct_file: Path, tmp_path: Path) -> None:
    named = tmp_path / "Doe_Jane_1970.nii.gz"
    named.write_bytes(ct_file.read_bytes())
    stored = upload(scripted, named)
    assert re.fullmatch(r"file-[0-9a-f]{32}", stored.id)
    assert (stored.bytes, stored.filename, stored.kind) == (ct_file.stat().st_size, "Doe_Jane_1970.nii.gz", "volume")
    assert [path.name for path in (scripted.data_dir / "files" / stored.id).iterdir() if path.suffix != ".json"] == [
        "image.nii.gz"
    ]
    assert scripted.client().files.content(stored.id).read() == ct_file.read_bytes()
    assert scripted.client().files.retrieve(stored.id).bytes == stored.bytes
    assert scripted.client().files.delete(stored.id).deleted
    with pytest.raises(openai.NotFoundError, match="it was erased or never uploaded"):
        scripted.client().files.content(stored.id)
    assert not (scripted.data_dir / "files" / stored.id).exists()


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/../../../etc/passwd/content",
        "/v1/files/..%2f..%2f..%2fetc%2fpasswd/content",
        "/v1/files/file-%2e%2e/content",
        "/page/../app.py",
        "/page/%2e%2e/app.py",
        "/page/..%2fapp.py",
        "//etc/passwd",
    ],
)
def test_nothing_outside_the_store_can_be_read(scripted: Running, path: str) -> None:
    import http.client

    connection = http.client.HTTPConnection(scripted.url.removeprefix("http://"))
    connection.request("GET", path)  # httpx would tidy the path
    response = connection.getresponse()
    body = response.read()
    assert response.status in (400, 404)
    assert b"root:" not in body
    assert b"import" not in body


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("../../etc/passwd", "passwd"),
        ("C:\\scans\\a b.nii.gz", "a b.nii.gz"),
        ("a\r\nX: y.png", "a__X_ y.png"),
        ('"; rm -rf.png', "__ rm -rf.png"),
        ("", "file"),
        ("..", "file"),
        ("x" * 300 + ".png", "x" * 116 + ".png"),
    ],
)
def test_file_names_are_cleaned(given: str, kept: str) -> None:
    assert clean_name(given) == kept


def test_a_file_name_that_climbs_stays_in_the_store(scripted: Running, ct_file: Path) -> None:
    files = {"file": ("../../../escaped.nii.gz", ct_file.read_bytes())}
    stored = httpx.post(f"{scripted.url}/v1/files", files=files).json()
    assert stored["filename"] == "escaped.nii.gz"
    assert not list(scripted.data_dir.parent.rglob("escaped*"))


def test_overlay_and_label_map_are_files(scripted: Running, ct_file: Path, tmp_path: Path) -> None:
    stored = upload(scripted, ct_file)
    response = scripted.client().chat.completions.create(model=MODEL, messages=about([stored.id], "CALL it"))
    details = response.model_extra["vila_m3"]["transcript"][1]["vila_m3"]
    overlay = httpx.get(f"{scripted.url}/v1/files/{details['overlay']}/content")
    assert overlay.headers["content-type"] == "image/png"
    path = tmp_path / "labels.nii.gz"
    path.write_bytes(scripted.client().files.content(details["label_map"]).read())
    labels, image = nib.load(path), nib.load(ct_file)
    assert labels.shape == image.shape
    assert np.allclose(labels.affine, image.affine)
    volume_ml = np.count_nonzero(labels.dataobj) * 4.5**3 / 1000
    assert details["measurements"][0]["volume_ml"] == pytest.approx(volume_ml, abs=0.01)


def test_four_mri_files_make_one_study(scripted: Running, mri_folder: Path) -> None:
    ids = [upload(scripted, path).id for path in sorted(mri_folder.iterdir())]
    response = scripted.client().chat.completions.create(model=MODEL, messages=about(ids, "what?"))
    assert response.choices[0].message.content.startswith("I read 1 turns and 4 images")
    assert response.model_extra["vila_m3"]["study"]["modality"] == "MRI"
    with pytest.raises(openai.BadRequestError, match="3 of 4 MRI sequences found"):
        scripted.client().chat.completions.create(model=MODEL, messages=about(ids[:3], "what?"))


def test_a_four_d_mri_is_shown_and_drawn_in_the_given_order(tmp_path: Path, mri_folder: Path, ct_file: Path) -> None:
    """As the four files with names are; images without sequences do not care."""
    stored = [mri_folder / f"{name}.nii.gz" for name in ("t2f", "t1n", "t1c", "t2w")]
    first = nib.load(stored[0])
    channels = np.stack([nib.load(path).get_fdata(dtype=np.float32) for path in stored], axis=-1)
    nib.save(nib.Nifti1Image(channels, first.affine), tmp_path / "brain.nii.gz")

    def look(running: Running, *paths: Path) -> tuple[list[Any], list[bytes]]:
        ids = [upload(running, path).id for path in paths]
        running.client().chat.completions.create(model=MODEL, messages=about(ids, "what?"))
        study = httpx.post(f"{running.url}/v1/studies", json={"files": ids}).json()
        place = f"{running.url}/v1/studies/{study['id']}/slices/2/20"
        pictures = [httpx.get(place, params={"sequence": number}).content for number in range(4)]
        return list(running.composite.vlm.shown), pictures

    order = ("flair", "t1", "t1c", "t2")
    with running_service(tmp_path / "ordered", sequence_order=order) as ordered:
        shown, drawn = look(ordered, tmp_path / "brain.nii.gz")
        expected, expected_drawn = look(ordered, *sorted(mri_folder.iterdir()))
        assert len(shown) == 4
        assert all(np.array_equal(one, other) for one, other in zip(shown, expected, strict=True))
        assert drawn == expected_drawn
        assert len(set(drawn)) == 4
        (ct,) = look(ordered, ct_file)[0]
        assert ct.shape[2] == 3


def test_a_zip_of_four_sequences_is_one_file(scripted: Running, mri_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "study.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "a phantom")
        for entry in mri_folder.iterdir():
            archive.write(entry, f"../up/{entry.name}")
    stored = upload(scripted, path)
    assert stored.kind == "sequences"
    response = scripted.client().chat.completions.create(model=MODEL, messages=about([stored.id], "what?"))
    assert response.choices[0].message.content.startswith("I read 1 turns and 4 images")
    with zipfile.ZipFile(io.BytesIO(scripted.client().files.content(stored.id).read())) as archive:
        assert len(archive.namelist()) == 4


def test_users_with_keys_do_not_see_each_other(tmp_path: Path, ct_file: Path) -> None:
    with running_service(tmp_path / "keys", api_keys=KEYS) as running:
        with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
            running.client("no key at all").models.list()
        assert httpx.get(f"{running.url}/v1/models").status_code == 401
        assert httpx.get(f"{running.url}/metrics").status_code == 401
        assert httpx.get(f"{running.url}/health").status_code == 200
        first, second = (running.client(key) for key in KEYS)
        stored = upload(running, ct_file, KEYS[0])
        messages = about([stored.id], "CALL mine")
        response = first.chat.completions.create(model=MODEL, messages=messages)
        told = response.model_extra["vila_m3"]
        overlay = told["transcript"][1]["vila_m3"]["overlay"]
        for file_id in (stored.id, overlay):
            with pytest.raises(openai.NotFoundError, match="there is no file"):
                second.files.content(file_id)
            with pytest.raises(openai.NotFoundError, match="there is no file"):
                second.files.delete(file_id)
        messages += [
            {"role": "assistant", "content": response.choices[0].message.content},
            {"role": "user", "content": "and?"},
        ]
        with pytest.raises(openai.NotFoundError, match="there is no file"):
            second.chat.completions.create(model=MODEL, messages=messages)
        assert (
            first.chat.completions.create(model=MODEL, messages=messages)
            .choices[0]
            .message.content.startswith("I read 5 turns")
        )
        address = f"{running.url}/v1/conversations/{told['conversation']}/results"
        statuses = [httpx.get(address, headers={"Authorization": f"Bearer {key}"}).status_code for key in KEYS]
        assert statuses == [200, 404]


def test_files_and_conversations_are_erased_after_their_time(tmp_path: Path, ct_file: Path) -> None:
    limits = {"file_minutes": 2 / 60}
    with running_service(tmp_path / "short", sweep_seconds=0.2, limits=limits) as running:
        stored = upload(running, ct_file)
        messages = about([stored.id], "CALL it")
        response = running.client().chat.completions.create(model=MODEL, messages=messages)
        conversation = response.model_extra["vila_m3"]["conversation"]
        assert httpx.get(f"{running.url}/v1/conversations/{conversation}/results").status_code == 200
        time.sleep(4.5)
        with pytest.raises(openai.NotFoundError, match="it was erased or never uploaded"):
            running.client().chat.completions.create(model=MODEL, messages=messages)
        assert httpx.get(f"{running.url}/v1/conversations/{conversation}/results").status_code == 404
        assert list((running.data_dir / "files").iterdir()) == []
        assert list((running.data_dir / "conversations").iterdir()) == []


def test_results_are_downloaded_as_one_zip(scripted: Running, ct_file: Path) -> None:
    stored = upload(scripted, ct_file)
    response = scripted.client().chat.completions.create(model=MODEL, messages=about([stored.id], "CALL it"))
    conversation = response.model_extra["vila_m3"]["conversation"]
    packed = httpx.get(f"{scripted.url}/v1/conversations/{conversation}/results")
    with zipfile.ZipFile(io.BytesIO(packed.content)) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("conversation.json"))
    assert {"01_vista3d_labels.nii.gz", "01_vista3d_overlay.png", "answer.txt", "report.html"} <= set(names)
    assert record["answer"] == response.choices[0].message.content


def test_a_study_is_described_and_drawn(scripted: Running, ct_file: Path) -> None:
    from PIL import Image

    stored = upload(scripted, ct_file)
    study = httpx.post(f"{scripted.url}/v1/studies", json={"files": [stored.id]}).json()
    assert (study["modality"], study["shape"], study["spacing"]) == ("CT", [72, 64, 56], [4.5, 4.5, 4.5])
    address = f"{scripted.url}/v1/studies/{study['id']}/slices/2/28"
    picture = Image.open(io.BytesIO(httpx.get(address).content))
    assert (picture.size, picture.mode) == ((72, 64), "L")
    lung = Image.open(io.BytesIO(httpx.get(address, params={"centre": -600, "width": 1500}).content))
    assert np.asarray(lung).mean() > np.asarray(picture).mean()
    assert httpx.get(address.replace("/28", "/56")).json()["error"]["message"].startswith("slice_index 56 is out of")
    response = scripted.client().chat.completions.create(model=MODEL, messages=about([stored.id], "CALL it"))
    details = response.model_extra["vila_m3"]["transcript"][1]["vila_m3"]
    drawn = httpx.get(f"{scripted.url}/v1/files/{details['label_map']}/labels/2/28")
    shown = np.asarray(Image.open(io.BytesIO(drawn.content)))
    assert shown.shape == (64, 72, 4)
    assert [tuple(color) for color in np.unique(shown.reshape(-1, 4), axis=0)] == [(0, 0, 0, 0), (255, 0, 0, 255)]
    assert httpx.get(f"{scripted.url}/v1/files/{stored.id}/labels/2/28").status_code == 400


def test_the_store_finds_its_files_after_a_restart_and_erases_what_is_not_whole(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 1e9, 60)
    with store.incoming() as folder:
        (folder / "image.nii").write_bytes(b"x")
        stored = store.add(folder / "image.nii", "volume", "a.nii", "me")
    (tmp_path / "incoming" / "half").mkdir()
    (tmp_path / "incoming" / "half" / "upload").write_bytes(b"half of a file")
    (tmp_path / "files" / "file-damaged").mkdir()
    again = FileStore(tmp_path, 1e9, 60)
    assert again.get(stored.id, "me") == stored
    assert list((tmp_path / "incoming").iterdir()) == []
    assert [path.name for path in (tmp_path / "files").iterdir()] == [stored.id]


def test_the_store_takes_no_more_than_it_may(tmp_path: Path) -> None:
    store = FileStore(tmp_path, 10, 60)
    with store.incoming() as folder:
        (folder / "image.nii").write_bytes(b"x" * 11)
        with pytest.raises(ApiError, match="the store of the server is full"):
            store.add(folder / "image.nii", "volume", "a.nii", "me")
    assert store.byte_count == 0
    assert os.listdir(tmp_path / "files") == []


def test_the_clock_decides_when_a_file_is_gone(tmp_path: Path) -> None:
    now = [1000.0]
    clock: Callable[[], float] = lambda: now[0]  # noqa: E731
    store = FileStore(tmp_path, 1e9, 60, clock)
    with store.incoming() as folder:
        (folder / "image.nii").write_bytes(b"x")
        stored = store.add(folder / "image.nii", "volume", "a.nii", "me")
    now[0] = 1059
    assert store.sweep() == 0
    assert store.get(stored.id, "me") == stored
    now[0] = 1060
    with pytest.raises(ApiError, match="there is no file"):
        store.get(stored.id, "me")
    assert store.sweep() == 1
