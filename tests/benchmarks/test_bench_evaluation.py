"""Speed of the benchmark runner on SLAKE with the nano weights, as a ratio within one run. Run with ``make bench``.

Against the way of the reference: one question at a time by `generate` of transformers, with the image and the whole
prompt encoded for each. Two threads, fp32, greedy, at most 64 new tokens; blocks of questions in turn, so that a slower
minute of the machine slows both sides.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
import torch

from vila_m3.answer import Answerer
from vila_m3.benchmarks.asking import ask_record
from vila_m3.benchmarks.definition import image_root, load_benchmark, read_questions
from vila_m3.benchmarks.predictions import PredictionFile
from vila_m3.benchmarks.runner import Questioner, asks_model
from vila_m3.checkpoint import load_checkpoint, load_processor
from vila_m3.data.record import to_conversation

pytestmark = pytest.mark.bench
THREADS = 2
BLOCK, BLOCKS = 320, 3


def test_the_runner_is_four_times_as_fast_as_the_references_way(repository: Path, shared: Path, tmp_path: Path) -> None:
    """The aim is four times; answers must be the same, apart from ties that rounding decides."""
    checkpoint = repository / "vila_m3_bundle/models/nano"
    model, processor = load_checkpoint(checkpoint), load_processor(checkpoint)
    benchmark = load_benchmark("slake", repository / "vila_m3_bundle/configs/benchmarks")
    data_root = str(shared / "data/vqa")
    questions = sorted(read_questions(benchmark, data_root), key=lambda q: q.image)[: BLOCK * BLOCKS]
    answerer = Answerer(model, processor, 64, kept_conversations=0)
    written = PredictionFile(tmp_path / "slake.jsonl", {})

    def one_by_one(start: int) -> list[str]:
        texts = []
        for question in questions[start : start + BLOCK]:
            talk = to_conversation(ask_record(benchmark, question, data_root), image_root(benchmark, data_root))
            encoded = processor.encode(talk)
            ids = model.generate(
                encoded.input_ids[None],
                encoded.pixel_values,
                attention_mask=torch.ones_like(encoded.input_ids)[None],
                max_new_tokens=64,
                do_sample=False,
                eos_token_id=sorted(answerer.stop_ids),
                pad_token_id=processor.pad_id,
            )
            texts.append(processor.decode([token for token in ids[0].tolist() if token not in answerer.stop_ids]))
        return texts

    ratios, same = [], 0
    for start in range(0, BLOCK * BLOCKS, BLOCK):
        clock = time.perf_counter()
        texts = one_by_one(start)
        alone = time.perf_counter() - clock
        questioner = Questioner(benchmark, asks_model(answerer), data_root, 16)
        clock = time.perf_counter()
        block = questions[start : start + BLOCK]
        questioner.run(block, written, set())
        batched = time.perf_counter() - clock
        ratios.append(alone / batched)
        same += sum(written.done[question.id]["text"] == text for question, text in zip(block, texts, strict=True))
        print(f"\n{BLOCK} questions: {alone:.1f} s one by one, {batched:.1f} s batched, ratio {ratios[-1]:.1f}")
    print(f"ratio {statistics.median(ratios):.1f}; {same} of {len(questions)} answers are the same")
    assert same >= 0.97 * len(questions)
    assert statistics.median(ratios) >= 4
