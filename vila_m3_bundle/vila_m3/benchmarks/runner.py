"""The ``evaluate`` command: ask a model the questions of benchmarks, grade, and write tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.standalone import make_output_dir
from vila_m3_common.volumes import load_picture

from ..answer import Answerer
from ..data.record import to_conversation
from .asking import ask_record, prompt_text
from .definition import Benchmark, Question, image_root, load_benchmark, read_questions
from .endpoint import Endpoint, EndpointError
from .grading import grade, majority_predictions, write_items, write_outputs
from .predictions import PredictionFile, read_predictions, read_rows

Ask = Callable[[Sequence[Conversation]], list[dict[str, Any]]]


def asks_model(answerer: Answerer) -> Ask:
    """Return a function that answers a batch with the VLM; an image in several questions is encoded once."""

    def ask(conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
        return [
            {"text": answer.text, "stop_reason": answer.stop_reason, "confidence": answer.confidence}
            for answer in answerer.answer_batch(conversations)
        ]

    return ask


def asks_endpoint(endpoint: Endpoint) -> Ask:
    """Return a function that asks an endpoint; a question that it never answers gets its error and no text."""

    def ask(conversations: Sequence[Conversation]) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for conversation in conversations:
            try:
                rows.append({"text": endpoint.answer(conversation)})
            except EndpointError as error:
                rows.append({"text": "", "error": str(error)})
        return rows

    return ask


def predict(
    benchmark: Benchmark,
    questions: Sequence[Question],
    written: PredictionFile,
    ask: Ask,
    data_root: str,
    batch_size: int,
    is_blank: bool,
    cards: str = "",
) -> None:
    """Ask what is not yet answered, images in turn so that a batch shares them; append every batch."""
    load = lru_cache(maxsize=64)(load_picture)
    shown = (lambda path: np.zeros_like(load(path))) if is_blank else load
    waiting = sorted((q for q in questions if q.id not in written.done), key=lambda q: (q.image, len(q.text)))
    title = f"{benchmark.name}{' (blank)' if is_blank else ''}"
    with tqdm(total=len(questions), initial=len(questions) - len(waiting), desc=title, unit="question") as bar:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            asked = [ask_record(benchmark, question, data_root, cards) for question in batch]
            answers = ask([to_conversation(record, image_root(benchmark, data_root), shown) for record in asked])
            written.append(
                [
                    {"question_id": record.id, "prompt": prompt_text(record), **answer}
                    for record, answer in zip(asked, answers, strict=True)
                ]
            )
            bar.update(len(batch))


def merge_shards(folder: Path, name: str, known: Sequence[str]) -> Path | None:
    """Join the processes' files into ``<name>.jsonl`` in the order of the questions; None while answers are missing."""
    rows = {
        str(row["question_id"]): row
        for path in sorted(folder.glob(f"{name}.shard*.jsonl"))
        for row in read_rows(path)[0]
    }
    if not all(question_id in rows for question_id in known):
        return None
    merged = folder / f"{name}.jsonl"
    merged.unlink(missing_ok=True)
    PredictionFile(merged, {}).append([_without_sum(rows[question_id]) for question_id in known])
    return merged


def _without_sum(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "sha256"}


def _check_names(benchmarks: Any) -> list[str]:
    names = [benchmarks] if isinstance(benchmarks, str) else list(benchmarks or [])
    if not names:
        raise UserError("no benchmark was given; add --benchmarks \"['slake']\"")
    return names


@exits_with_message
def run_benchmarks(
    benchmarks: Any,
    data_root: str,
    output_dir: str,
    benchmarks_dir: str,
    answerer: Answerer | None = None,
    settings: Mapping[str, Any] | None = None,
    batch_size: int = 16,
    blank_baseline: bool = True,
    endpoint: Endpoint | None = None,
    cards: str = "",
) -> None:
    """Run benchmarks and write ``results.json``, ``results.md``, ``report.html`` and ``predictions/``.

    With ``torchrun`` each process answers every n-th question; the one that finishes last grades.

    Args:
        benchmarks: names of YAML files.
        data_root: folder with the data sets' folders.
        output_dir: where to write; a run that was cut off goes on there.
        benchmarks_dir: folder of the YAML files.
        answerer: the VLM; not needed with an endpoint.
        settings: what the answers depend on, such as the checkpoint.
        batch_size: questions at once.
        blank_baseline: whether the same questions are asked of a black image too.
        endpoint: asked in the VLM's place.
        cards: text of the model cards, for prompts that hold them.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is too small; give at least 1")
    definitions = [load_benchmark(name, benchmarks_dir) for name in _check_names(benchmarks)]
    asked = {definition.name: read_questions(definition, data_root) for definition in definitions}
    if endpoint is None and answerer is None:
        raise UserError("neither a model nor an endpoint was given")
    ask = asks_endpoint(endpoint) if endpoint is not None else asks_model(answerer)  # type: ignore[arg-type]
    folder = make_output_dir(output_dir)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    results: dict[str, Any] = {}
    for definition in definitions:
        questions = asked[definition.name]
        has_blank = blank_baseline and definition.prompt != "text_only"
        modes = (("", False), ("_blank", True)) if has_blank else (("", False),)
        for ending, is_blank in modes:
            name = f"{definition.name}{ending}"
            shard = folder / "predictions" / f"{name}.shard{rank}.jsonl"
            written = PredictionFile(shard, {**(settings or {}), "world_size": size})
            predict(definition, questions[rank::size], written, ask, data_root, batch_size, is_blank, cards)
            merged = merge_shards(folder / "predictions", name, [question.id for question in questions])
            if merged is None:
                continue
            read = read_predictions(merged, [question.id for question in questions])
            results[name] = grade(definition, questions, read)
            write_items(folder / "predictions" / f"{name}.items.jsonl", definition, questions, read, data_root)
        results[f"{definition.name}_majority"] = grade(definition, questions, majority_predictions(questions))
    if any(definition.name not in results for definition in definitions):
        print(f"process {rank} of {size} is done; the last one grades")
        return
    write_outputs(folder, definitions, results)
