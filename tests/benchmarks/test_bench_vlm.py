"""Speed and memory of the VLM, as ratios within one run, on a model of about 100 million random weights.

196 tokens an image, fp32, two threads. Every ratio is the median over pairs measured in turn, so that a slower
minute of the machine slows both sides. Run with ``make bench``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.generation import BaseStreamer

from vila_m3.answer import Answerer
from vila_m3.checkpoint import load_checkpoint, load_processor
from vila_m3.configuration import VilaM3Config
from vila_m3.export import save_released
from vila_m3.model import VilaM3ForConditionalGeneration
from vila_m3.processor import VilaM3Processor, build_processor
from vila_m3_common import prompts
from vila_m3_common.conversation import Conversation

pytestmark = pytest.mark.bench
THREADS = 2

CONFIG = {
    "drops_chunk_starts": False,
    "text_config": {
        "vocab_size": 32000,
        "hidden_size": 640,
        "intermediate_size": 1728,
        "num_hidden_layers": 12,
        "num_attention_heads": 10,
        "max_position_embeddings": 4096,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
        "image_size": 384,
        "patch_size": 14,
    },
}


@pytest.fixture(scope="module")
def model() -> VilaM3ForConditionalGeneration:
    torch.manual_seed(0)
    made = VilaM3ForConditionalGeneration(VilaM3Config(**CONFIG)).eval()
    assert made.tokens_per_image == 196
    assert 90e6 < sum(value.numel() for value in made.parameters()) < 120e6
    return made


@pytest.fixture(scope="module")
def processor(repository: Path, model: VilaM3ForConditionalGeneration) -> VilaM3Processor:
    tokenizer = load_processor(repository / "vila_m3_bundle/models/nano").tokenizer
    return build_processor(tokenizer, model.config)


@pytest.fixture(scope="module")
def cards(repository: Path) -> str:
    """Model cards that the nano tokenizer reads in ordinary pieces, as another model's tokenizer would."""
    return (repository / "vila_m3_bundle/configs/model_cards.txt").read_text().lower()


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (384, 384, 3), dtype=np.uint8)


def opening(cards: str, seed: int, modality: str = "CT") -> Conversation:
    conversation = Conversation()
    pictures = [picture(seed + number) for number in range(4 if modality == "MRI" else 1)]
    conversation.add("user", prompts.opening(modality, f"Is there a mass, case {seed}?", cards), pictures)
    return conversation


def feedback(modality: str) -> tuple[str, list[np.ndarray]]:
    """The expert's turn, as trained, with its overlay where it has one."""
    question = "Is there a mass?"
    if modality == "CXR":
        return prompts.cxr_feedback(dict.fromkeys(prompts.CXR_TRAINED_ORDER, 0.2), question, "trained"), []
    if modality == "MRI":
        colors = {1: "red", 2: "blue", 4: "yellow"}
        return prompts.brats_feedback([1, 2, 4], colors, question, "trained"), [picture(90)]
    return prompts.ct_feedback([("red", "liver"), ("blue", "hepatic tumor")], question, "trained"), [picture(90)]


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def endless(model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, count: int, kept: int = 1) -> Answerer:
    """An answerer that always writes ``count`` tokens."""
    answerer = Answerer(model, processor, count, kept_conversations=kept)
    answerer.stop_ids = frozenset()
    return answerer


def test_the_turn_after_feedback_starts_three_times_sooner(
    model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, cards: str
) -> None:
    """Seconds to the first token of the answer to an expert's feedback, against encoding the conversation anew.

    The aim is three times, in the middle of the three modalities; how much there is to save depends on how much
    stands before the feedback (four images in MRI) and in it (an overlay of 196 tokens, or 18 lines of text).
    """
    ratios = {modality: _first_token_ratio(model, processor, cards, modality) for modality in ("CT", "MRI", "CXR")}
    assert sorted(ratios.values())[1] >= 3
    assert min(ratios.values()) > 2


def _first_token_ratio(
    model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, cards: str, modality: str
) -> float:
    talk = opening(cards, 1, modality)
    first, second = endless(model, processor, 16), endless(model, processor, 1, kept=0)
    ratios = []
    for _ in range(5):
        first._kept.clear()
        reply = "".join(first(talk))
        longer = Conversation([*talk.turns])
        longer.add("assistant", reply)
        longer.add("expert", *feedback(modality))
        list(first(longer))
        list(second(longer))
        ratios.append(second.report.first_token_seconds / first.report.first_token_seconds)
    report, ratio = first.report, statistics.median(ratios)
    print(
        f"\nfirst token after feedback, {modality}: {report.prompt_token_count} tokens, {report.reused_token_count} "
        f"reused, {report.first_token_seconds:.2f} s against {second.report.first_token_seconds:.2f} s, "
        f"ratio {ratio:.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
    )
    return ratio


def test_a_batch_of_eight_has_twice_the_throughput(
    model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, cards: str
) -> None:
    """Tokens per second of eight conversations at once, against one after the other."""
    talks = [Conversation() for _ in range(8)]
    for index, talk in enumerate(talks):
        talk.add("user", f"<image>\nIs there a mass, case {index}?", [picture(index)])
    answerer = endless(model, processor, 48, kept=0)
    ratios = []
    for _ in range(3):
        alone = timed(lambda: [list(answerer.generate(talk)) for talk in talks])
        together = timed(lambda: answerer.answer_batch(talks))
        ratios.append(alone / together)
    ratio = statistics.median(ratios)
    print(f"\nbatch of 8: {8 * 48 / together:.1f} tokens/s, alone {8 * 48 / alone:.1f}, ratio {ratio:.2f}")
    assert ratio >= 2


def test_decoding_is_as_fast_as_the_bare_llm(
    model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, cards: str
) -> None:
    """Seconds per token behind the first, text decoded and streamed, against ``generate`` of the Llama inside."""
    talk, count = opening(cards, 3), 64
    answerer = endless(model, processor, count, kept=0)
    encoded = processor.encode(talk)
    with torch.no_grad():
        embeddings = model.embed(encoded.input_ids[None], model.encode_images(encoded.pixel_values))
    mask = torch.ones(embeddings.shape[:2], dtype=torch.long)

    ratios = []
    for _ in range(7):
        list(answerer(talk))
        ours = answerer.report.seconds - answerer.report.first_token_seconds
        clock = TokenClock()
        options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        model.llm.generate(inputs_embeds=embeddings, attention_mask=mask, streamer=clock, **options)
        theirs = clock.times[-1] - clock.times[-count]
        ratios.append(theirs / ours)
    ratio = statistics.median(ratios)
    print(
        f"\ndecoding: {(count - 1) / ours:.1f} tokens/s, bare LLM {(count - 1) / theirs:.1f}, "
        f"ratio {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    )
    assert ratio >= 0.95


class TokenClock(BaseStreamer):
    """Notes when each token comes out of transformers' loop."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def weight_bytes(module: torch.nn.Module) -> int:
    total = 0
    for value in module.parameters():
        inner = getattr(value, "__tensor_flatten__", None)
        parts = [getattr(value, name) for name in inner()[0]] if inner else [value]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantised_weights_against_float32(
    model: VilaM3ForConditionalGeneration,
    processor: VilaM3Processor,
    cards: str,
    tmp_path: Path,
    quantization: str,
) -> None:
    """Memory of the weights and tokens per second; nothing is asserted about speed, which is the kernels'."""
    save_released(model, None, tmp_path)
    small = load_checkpoint(tmp_path, quantization=quantization)
    talk, ratios = Conversation(), []
    talk.add("user", "<image>\nIs there a mass?", [picture(5)])
    answerers = [endless(each, processor, 24, kept=0) for each in (model, small)]
    for _ in range(3):
        speeds = []
        for answerer in answerers:
            list(answerer.generate(talk))
            speeds.append(23 / (answerer.report.seconds - answerer.report.first_token_seconds))
        ratios.append(speeds[1] / speeds[0])
    layers = weight_bytes(small.llm.model.layers) / weight_bytes(model.llm.model.layers)
    whole = weight_bytes(small) / weight_bytes(model)
    print(
        f"\n{quantization}: {speeds[1]:.1f} tokens/s, float32 {speeds[0]:.1f}, ratio {statistics.median(ratios):.2f}; "
        f"memory of the decoder layers {layers:.2f}, of the whole model {whole:.2f}"
    )
    assert layers < {"int8": 0.27, "int4": 0.19}[quantization]
