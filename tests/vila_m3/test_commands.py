"""The bundle's commands, as ``python -m monai.bundle run`` calls them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.bundle import run

from vila_m3_common.hooks import quiet


def call(repository: Path, *configs: str, **options: Any) -> None:
    with quiet():
        run(config_file=[str(repository / f"vila_m3_bundle/configs/{name}.json") for name in configs], **options)


@pytest.fixture
def recording(golden: Path, tmp_path: Path) -> Path:
    path = tmp_path / "A_siglip_llama3.npz"
    shutil.copyfile(golden / "A_siglip_llama3.npz", path)
    return path


def compare(repository: Path, golden: Path, recording: Path, **options: Any) -> None:
    call(
        repository,
        "parity",
        checkpoint=str(golden / "A_siglip_llama3"),
        recorded=str(recording),
        cases=str(golden / "cases.json"),
        **options,
    )


def change(recording: Path, name: str, values: np.ndarray) -> None:
    np.savez(recording, **{**dict(np.load(recording)), name: values})


def test_parity_prints_a_verdict_for_every_quantity(
    repository: Path, golden: Path, recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(repository, golden, recording, images=str(golden))
    lines = capsys.readouterr().out.splitlines()
    names = {line.split()[0] for line in lines if line.endswith("equal")}
    inputs = {"batch.input_ids", "batch.attention_mask", "batch.labels", "batch.image_index"}
    assert set(np.load(recording).files) - inputs <= names
    assert lines[-1].startswith("all ")


@pytest.mark.parametrize(
    ("name", "shift"),
    [("single.logits", 3e-5), ("projector_out", 2e-5), ("multi_turn.generated_ids", 1), ("batch_right.loss", 2e-5)],
)
def test_parity_ends_with_an_error_beyond_the_tolerance(
    repository: Path, golden: Path, recording: Path, name: str, shift: float
) -> None:
    values = np.load(recording)[name]
    change(recording, name, values + np.asarray(shift, values.dtype))
    with pytest.raises(SystemExit, match=rf"1 of \d+ recorded quantities differ: {name}") as raised:
        compare(repository, golden, recording)
    assert raised.value.code not in (0, None)


def test_parity_counts_nan_as_different(repository: Path, golden: Path, recording: Path) -> None:
    change(recording, "single.logits", np.load(recording)["single.logits"] * np.nan)
    with pytest.raises(SystemExit, match="recorded quantities differ: single.logits"):
        compare(repository, golden, recording)


def test_parity_takes_wider_tolerances_and_names_what_it_does_not_know(
    repository: Path, golden: Path, recording: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(recording, "single.logits", np.load(recording)["single.logits"] + np.float32(1e-3))
    change(recording, "something.else", np.zeros(3))
    compare(repository, golden, recording, **{"tolerances#logits": 0.01})
    assert "something.else" in next(line for line in capsys.readouterr().out.splitlines() if "not compared" in line)


def test_parity_names_unusable_files(repository: Path, golden: Path, recording: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    shutil.copyfile(recording, other)
    with pytest.raises(SystemExit, match=r"do not know 'other', the recording's name; known: A_siglip_llama3, B_clip"):
        compare(repository, golden, other)
    recording.write_bytes(recording.read_bytes()[:1000])
    with pytest.raises(
        SystemExit, match=r"A_siglip_llama3.npz cannot be read .*; give the .npz file of the checkpoint"
    ):
        compare(repository, golden, recording)


def test_inference_prints_the_turn(repository: Path, cxr_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(repository, "inference", image=str(cxr_file), question="Is there a pleural effusion?", device="cpu")
    assert "assistant: This looks like an chest x-ray. Let me first trigger <CXR()>." in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"quantization": "int8"}, {"dtype": "bfloat16"}, {"device_map": "auto"}])
def test_inference_takes_options_of_loading(
    repository: Path, cxr_file: Path, capsys: pytest.CaptureFixture[str], options: dict[str, str]
) -> None:
    call(repository, "inference", image=str(cxr_file), question="Is there a pleural effusion?", device="cpu", **options)
    assert "assistant: This looks like an chest x-ray." in capsys.readouterr().out


def test_inference_says_that_an_answer_was_cut(
    repository: Path, cxr_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call(repository, "inference", image=str(cxr_file), question="Any effusion?", device="cpu", max_new_tokens=2)
    assert "note: The answer was cut off after 2 tokens (max_new_tokens)." in capsys.readouterr().out


def test_inference_without_question_is_refused(repository: Path, cxr_file: Path) -> None:
    with pytest.raises(SystemExit, match="no question was given; add --question"):
        call(repository, "inference", image=str(cxr_file), device="cpu")


def test_evaluation_runs_alone(repository: Path, tmp_path: Path) -> None:
    options = {"conversation_count": 4, "phantom_count": 1, "device": "cpu", "output_dir": str(tmp_path)}
    call(repository, "evaluate_replies", "size_nano", **options)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["all"]["count"] == 4
    assert 0 <= metrics["all"]["first_reply"] <= 1


def test_conversion_is_a_command(repository: Path, tmp_path: Path) -> None:
    call(repository, "convert", output_dir=str(tmp_path / "one"), layout="one_folder")
    assert json.loads((tmp_path / "one/config.json").read_text())["model_type"] == "vila_m3"


@pytest.mark.parametrize("size", ["3b", "8b", "13b", "40b"])
def test_a_size_without_its_weights_says_how_to_get_them(
    repository: Path, cxr_file: Path, tmp_path: Path, size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(Exception, match="Failed to instantiate") as raised:
        call(repository, "inference", f"size_{size}", image=str(cxr_file), question="Any effusion?", device="cpu")
    causes = []
    error: BaseException | None = raised.value
    while error:
        causes.append(str(error))
        error = error.__cause__ or error.__context__
    assert any("download it elsewhere and give its folder" in text or "does not exist" in text for text in causes)
