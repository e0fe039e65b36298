"""Checkpoints in the released layout and in one folder: read, written, refused."""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vila_m3.checkpoint import PARTS, load_checkpoint, load_processor, read_config, resolve_checkpoint
from vila_m3.export import convert, save_released
from vila_m3.model import VilaM3ForConditionalGeneration
from vila_m3.processor import VilaM3Processor
from vila_m3.tensor_files import weight_files
from vila_m3_common.chat_template import Rendered
from vila_m3_common.errors import UserError

CHECKPOINTS = ("A_siglip_llama3", "B_clip_vicuna", "D_intern_yi_hermes")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in weight_files(folder) for name, value in load_file(file).items()}


def assert_same_tensors(first: Path, second: Path) -> None:
    for part in PARTS:
        one, other = tensors_of(first / part), tensors_of(second / part)
        assert sorted(one) == sorted(other)
        for name, value in one.items():
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name]), name


def copy_of(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target, copy_function=shutil.copyfile)
    for path in [target, *target.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)
    return target


@pytest.fixture
def checkpoint(golden: Path, tmp_path: Path) -> Path:
    return copy_of(golden / "A_siglip_llama3", tmp_path / "checkpoint")


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("dtype", ["stored", None])
def test_a_round_trip_keeps_every_tensor(golden: Path, tmp_path: Path, name: str, dtype: str | None) -> None:
    model = load_checkpoint(golden / name, dtype=dtype)
    save_released(model, load_processor(golden / name), tmp_path / "written")
    assert_same_tensors(golden / name, tmp_path / "written")
    for file in (golden / name / "llm").glob("*token*"):
        assert (tmp_path / "written/llm" / file.name).read_bytes() == file.read_bytes()
    stored, written = (json.loads((path / "config.json").read_text()) for path in (golden / name, tmp_path / "written"))
    assert {key: written[key] for key in stored} == stored


def test_half_precision_comes_back_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    for part in PARTS:
        halves = {name: value.bfloat16() for name, value in tensors_of(checkpoint / part).items()}
        save_file(halves, checkpoint / part / "model.safetensors")
    model = load_checkpoint(checkpoint)
    assert model.dtype == torch.float32
    save_released(model, None, tmp_path / "written")
    assert_same_tensors(checkpoint, tmp_path / "written")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_both_layouts_convert_into_each_other(golden: Path, tmp_path: Path, name: str) -> None:
    convert(str(golden / name), str(tmp_path / "one"), "one_folder")
    convert(str(tmp_path / "one"), str(tmp_path / "back"), "released")
    assert_same_tensors(golden / name, tmp_path / "back")
    prompt = Rendered(json.loads((golden / "cases.json").read_text())[name]["multi_turn"]["prompt"], ())
    expected = load_processor(golden / name).tokenize_chunks(prompt)
    for layout in ("one", "back"):
        assert load_processor(tmp_path / layout).tokenize_chunks(prompt) == expected


def test_conversion_overwrites_nothing(golden: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is not empty; give an --output_dir that does not exist yet"):
        convert(str(golden / CHECKPOINTS[0]), str(tmp_path), "released")
    with pytest.raises(SystemExit, match="unknown layout 'flat'; valid: one_folder, released"):
        convert(str(golden / CHECKPOINTS[0]), str(tmp_path / "x"), "flat")


def test_shards_are_read_and_written(golden: Path, tmp_path: Path) -> None:
    model = load_checkpoint(golden / "A_siglip_llama3")
    save_released(model, None, tmp_path, max_shard_size="100KB")
    assert len(weight_files(tmp_path / "llm")) > 2
    assert_same_tensors(golden / "A_siglip_llama3", tmp_path)
    again = load_checkpoint(tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def as_pickles(checkpoint: Path) -> None:
    """Rewrite the LLM as two pickled shards with what older writers stored besides."""
    state = tensors_of(checkpoint / "llm")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(8.0)
    names = sorted(state)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in shards.items():
        torch.save({name: state[name] for name in part}, checkpoint / "llm" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (checkpoint / "llm/pytorch_model.bin.index.json").write_text(json.dumps(index))
    (checkpoint / "llm/model.safetensors").unlink()


def test_pickled_shards_are_read_and_computed_tensors_kept(golden: Path, checkpoint: Path, tmp_path: Path) -> None:
    as_pickles(checkpoint)
    model = load_checkpoint(checkpoint)
    expected = load_checkpoint(golden / "A_siglip_llama3").state_dict()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in expected.items())
    save_released(model, None, tmp_path / "written")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in tensors_of(tmp_path / "written/llm")


class Harmful:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("harm",)


def test_a_pickle_that_runs_code_is_refused(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (checkpoint / "llm/model.safetensors").unlink()
    torch.save({"model.embed_tokens.weight": Harmful()}, checkpoint / "llm/pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin are damaged, cut off or no state dict"):
        load_checkpoint(checkpoint)
    assert not (tmp_path / "harm").exists()


def missing_tensor(checkpoint: Path) -> None:
    state = tensors_of(checkpoint / "llm")
    del state["model.norm.weight"]
    save_file(state, checkpoint / "llm/model.safetensors")


def extra_tensor(checkpoint: Path) -> None:
    state = tensors_of(checkpoint / "mm_projector")
    save_file({**state, "layers.9.weight": torch.zeros(2)}, checkpoint / "mm_projector/model.safetensors")


def other_vocabulary(checkpoint: Path) -> None:
    path = checkpoint / "llm/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "vocab_size": 400}))


def cut_file(checkpoint: Path) -> None:
    path = checkpoint / "vision_tower/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_pickle(checkpoint: Path) -> None:
    as_pickles(checkpoint)
    path = checkpoint / "llm/pytorch_model-00002-of-00002.bin"
    path.write_bytes(path.read_bytes()[:-5000])


def missing_shard(checkpoint: Path) -> None:
    as_pickles(checkpoint)
    (checkpoint / "llm/pytorch_model-00002-of-00002.bin").unlink()


def no_weights(checkpoint: Path) -> None:
    (checkpoint / "mm_projector/model.safetensors").unlink()


def no_tower_config(checkpoint: Path) -> None:
    (checkpoint / "vision_tower/config.json").unlink()


def broken_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("{")


def set_in_config(key: str, value: object) -> Callable[[Path], None]:
    def change(checkpoint: Path) -> None:
        path = checkpoint / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))

    return change


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (missing_tensor, r"llm/model.safetensors do not fit .*llm/config.json: missing llm.model.norm.weight"),
    (extra_tensor, r"mm_projector/model.safetensors do not fit .*: unexpected mm_projector.layers.9.weight"),
    (other_vocabulary, r"llm.model.embed_tokens.weight is \(426, 64\), needed \(400, 64\)"),
    (cut_file, r"vision_tower/model.safetensors are damaged or cut off .*; get the file again"),
    (cut_pickle, r"pytorch_model-00002-of-00002.bin are damaged, cut off or no state dict"),
    (missing_shard, r"index.json names shards that are missing: pytorch_model-00002-of-00002.bin"),
    (no_weights, r"mm_projector holds no weights \(model.safetensors, .*\); the checkpoint is incomplete"),
    (no_tower_config, r"vision_tower/config.json is missing; a checkpoint is a folder with config.json, llm/"),
    (broken_config, r"config.json is not valid JSON"),
    (set_in_config("model_type", "llava"), r"has model_type 'llava'; read are llava_llama \(released layout\)"),
    (set_in_config("s2", True), r"config.json sets s2, which VILA-M3 does not use"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message[:40] for _, message in DAMAGES])
def test_a_damaged_checkpoint_is_named(checkpoint: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(checkpoint)
    with pytest.raises(UserError, match=message):
        load_checkpoint(checkpoint)


def test_a_missing_tokenizer_is_named(checkpoint: Path) -> None:
    (checkpoint / "llm/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"llm holds neither tokenizer.json nor tokenizer.model"):
        load_processor(checkpoint)


@pytest.mark.parametrize(
    ("name", "template"), list(zip(CHECKPOINTS, ["llama_3", "vicuna_v1", "hermes-2"], strict=True))
)
def test_the_tokenizer_tells_the_template(golden: Path, name: str, template: str) -> None:
    assert read_config(golden / name).chat_template == template
    assert read_config(golden / name, "plain").chat_template == "plain"


def test_the_sentencepiece_model_goes_first(golden: Path, tmp_path: Path) -> None:
    """The reference asked for the slow tokenizer wherever there was one."""
    folder = copy_of(golden / "D_intern_yi_hermes", tmp_path / "checkpoint")
    shutil.copyfile(golden / "A_siglip_llama3/llm/tokenizer.json", folder / "llm/tokenizer.json")
    ids = load_processor(folder).tokenizer("<|im_end|>Hi")["input_ids"]
    assert ids == load_processor(golden / "D_intern_yi_hermes").tokenizer("<|im_end|>Hi")["input_ids"] == [400, 75, 352]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int3"}, "unknown dtype 'int3'; valid: float32, bfloat16, float16, stored"),
        ({"device_map": "balanced"}, "unknown device_map 'balanced'; valid: auto, or a table"),
        ({"quantization": "int2"}, "unknown quantization 'int2'; valid: int8, int4"),
    ],
)
def test_unknown_options_are_refused(golden: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_checkpoint(golden / CHECKPOINTS[0], **options)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_cast_while_they_are_read(golden: Path, dtype: str) -> None:
    model = load_checkpoint(golden / CHECKPOINTS[0], dtype=dtype)
    assert {value.dtype for value in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("device_map", ["auto", {"llm": "cpu", "vision_tower": "cpu", "mm_projector": "cpu"}])
def test_a_device_map_places_the_parts(golden: Path, device_map: str | dict[str, str]) -> None:
    model = load_checkpoint(golden / CHECKPOINTS[0], device_map=device_map)
    assert {value.device.type for value in model.parameters()} == {"cpu"}


def test_a_replaced_file_does_not_reach_a_loaded_model(checkpoint: Path) -> None:
    model = load_checkpoint(checkpoint)
    before = model.mm_projector.layers[2].weight.clone()
    zeros = {name: torch.zeros_like(value) for name, value in tensors_of(checkpoint / "mm_projector").items()}
    save_file(zeros, checkpoint / "mm_projector/model.safetensors")
    assert torch.equal(model.mm_projector.layers[2].weight, before)


MEASURE_PEAK = """
import sys
from vila_m3.checkpoint import load_checkpoint, load_processor
def rss(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key + ":"))
load_checkpoint(sys.argv[1])
open("/proc/self/clear_refs", "w").write("5")
before = rss("VmRSS")
model = load_checkpoint(sys.argv[2])
size = sum(value.numel() * value.element_size() for value in model.parameters()) / 1024
print((rss("VmHWM") - before) / size)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux' /proc")
def test_memory_never_holds_the_weights_twice(
    model: VilaM3ForConditionalGeneration, golden: Path, tmp_path: Path
) -> None:
    """Peak resident memory while 0.4 GB of weights are read from shards, as a multiple of their size."""
    config = json.loads(json.dumps(model.config.to_dict()))
    wide = VilaM3ForConditionalGeneration(
        type(model.config)(
            text_config={
                **config["text_config"],
                "hidden_size": 1024,
                "intermediate_size": 4096,
                "num_hidden_layers": 6,
            },
            vision_config=config["vision_config"],
        )
    )
    save_released(wide, None, tmp_path, max_shard_size="64MB")
    command = [sys.executable, "-c", MEASURE_PEAK, str(golden / CHECKPOINTS[0]), str(tmp_path)]
    ratio = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.4


def test_a_wrong_name_says_what_a_checkpoint_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint .*nowhere does not exist; give a folder, or a Hugging Face id"):
        resolve_checkpoint(tmp_path / "nowhere")


def hub_environment(cache: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}


RESOLVE = """
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 10_000  # so that something of a small file arrives before it breaks off
from vila_m3.checkpoint import load_checkpoint, resolve_checkpoint
from vila_m3_common.errors import UserError
try:
    folder = resolve_checkpoint("MONAI/Llama3-VILA-M3-8B")
    load_checkpoint("MONAI/Llama3-VILA-M3-8B")
    print(folder)
except UserError as error:
    print(error)
"""


def resolve_in_process(environment: dict[str, str]) -> str:
    finished = subprocess.run(
        [sys.executable, "-c", RESOLVE], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return finished.stdout.strip()


class Hub(http.server.BaseHTTPRequestHandler):
    """The few answers of a Hugging Face hub that a download needs; the first large transfer breaks off."""

    folder: Path
    ranges: list[str]
    broken: set[str]

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, has_body: bool) -> None:
        if "/api/models/" in self.path:
            self._send(json.dumps(self._listing()).encode(), has_body)
            return
        if "/resolve/" not in self.path:
            self.send_error(404)
            return
        name = re.sub(r"^/MONAI/Llama3-VILA-M3-8B/resolve/[^/]+/", "", self.path)
        self._send_file(name, (self.folder / name).read_bytes(), has_body)

    def _listing(self) -> object:
        files = {path.relative_to(self.folder).as_posix(): path for path in self.folder.rglob("*") if path.is_file()}
        if "/tree/" in self.path:
            return [
                {"type": "file", "path": name, "size": path.stat().st_size, "oid": "b" * 40}
                for name, path in files.items()
            ]
        return {"id": "MONAI/x", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}

    def _send_file(self, name: str, content: bytes, has_body: bool) -> None:
        asked = self.headers.get("Range")
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked and has_body else 0
        if start:
            self.ranges.append(name)
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{len(content)}"')
        self.send_header("X-Repo-Commit", "a" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not has_body:
            return
        if name == "llm/model.safetensors" and name not in self.broken:
            self.broken.add(name)
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(content[start:])

    def _send(self, content: bytes, has_body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if has_body:
            self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(golden: Path) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"folder": golden / "A_siglip_llama3", "ranges": [], "broken": set()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    handler.address = f"http://127.0.0.1:{server.server_port}"
    yield handler
    server.shutdown()
    server.server_close()


def test_an_id_is_downloaded_resumed_and_then_found_offline(hub: type[Hub], tmp_path: Path) -> None:
    online = hub_environment(tmp_path / "cache", HF_ENDPOINT=hub.address)
    folder = resolve_in_process(online)
    assert Path(folder).is_relative_to(tmp_path / "cache")
    assert hub.broken == {"llm/model.safetensors"}
    assert hub.ranges == ["llm/model.safetensors"], "the broken transfer went on where it had stopped"
    assert resolve_in_process(hub_environment(tmp_path / "cache", HF_HUB_OFFLINE="1")) == folder


def test_an_id_that_cannot_be_had_is_an_error(tmp_path: Path) -> None:
    said = resolve_in_process(hub_environment(tmp_path / "cache", HF_HUB_OFFLINE="1"))
    assert said.startswith(
        "checkpoint MONAI/Llama3-VILA-M3-8B is no folder here and could not be had from Hugging Face"
    )


def test_the_nano_weights_are_a_released_checkpoint(repository: Path) -> None:
    folder = repository / "vila_m3_bundle/models/nano"
    model, processor = load_checkpoint(folder), load_processor(folder)
    assert isinstance(processor, VilaM3Processor)
    assert model.tokens_per_image == processor.tokens_per_image == 36
    assert not processor.drops_chunk_starts
    assert model.llm.lm_head.weight is model.get_input_embeddings().weight
