"""The ``evaluate`` command: ask a model the questions of benchmarks, grade, and write tables."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.standalone import make_output_dir
from vila_m3_common.volumes import load_picture

from ..answer import Answered, Answerer
from ..data.record import Record, to_conversation
from .asking import ask_record, prompt_text
from .definition import (
    Benchmark,
    Question,
    image_root,
    load_benchmark,
    read_questions,
    read_training_questions,
)
from .endpoint import Endpoint, EndpointError
from .grading import grade, grade_to_file, majority_predictions, prior_predictions, write_outputs
from .predictions import PredictionFile, merge_shards, read_predictions, read_shards, shard_path, write_predictions
from .tables import BLANK_ENDING, MAJORITY_ENDING, PRIOR_ENDING

Row = dict[str, Any]
Ask = Callable[[Sequence[Conversation]], list[Row]]
Load = Callable[[Path], np.ndarray]
# One picture for every blank question, so that a model reads it once.
BLANK = np.zeros((384, 384, 3), np.uint8)


def show_blank(path: Path) -> np.ndarray:
    """Return a black picture in place of a file."""
    return BLANK


@dataclass(frozen=True)
class Processes:
    """This process among those of ``torchrun``."""

    rank: int
    count: int

    def wait(self) -> None:
        """Wait until all have come here."""
        if self.count > 1:
            dist.barrier()


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes of ``torchrun``, over the CPU; one that is started alone joins nobody."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    is_mine = count > 1 and not dist.is_initialized()
    if is_mine:
        # Processes wait for the slowest one, which may have hours of questions left.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Processes(rank, count)
    finally:
        if is_mine:
            dist.destroy_process_group()


def asks_model(answerer: Answerer) -> Ask:
    """Return a function that answers a batch with the VLM; a question that it cannot read gets its error."""

    def ask(conversations: Sequence[Conversation]) -> list[Row]:
        try:
            return [_answer_row(answer) for answer in answerer.answer_batch(conversations)]
        except UserError:
            problems = [problem_of(conversation) for conversation in conversations]
        ready = [conversation for conversation, problem in zip(conversations, problems, strict=True) if not problem]
        answers = iter(answerer.answer_batch(ready))
        return [{"text": "", "error": problem} if problem else _answer_row(next(answers)) for problem in problems]

    def problem_of(conversation: Conversation) -> str:
        try:
            answerer.tokenize(conversation)
        except UserError as error:
            return str(error)
        return ""

    return ask


def _answer_row(answer: Answered) -> Row:
    return {"text": answer.text, "stop_reason": answer.stop_reason, "confidence": answer.confidence}


def asks_endpoint(endpoint: Endpoint) -> Ask:
    """Return a function that asks an endpoint; a question that it never answers gets its error and no text."""

    def ask_one(conversation: Conversation) -> Row:
        try:
            return {"text": endpoint.answer(conversation)}
        except EndpointError as error:
            return {"text": "", "error": str(error)}

    def ask(conversations: Sequence[Conversation]) -> list[Row]:
        with ThreadPoolExecutor(endpoint.parallel_count) as pool:
            return list(pool.map(ask_one, conversations))

    return ask


class Questioner:
    """Asks the questions of one benchmark that have no answer yet.

    Args:
        benchmark: what is asked.
        ask: answers a batch.
        data_root: folder with the data sets' folders.
        batch_size: questions at once.
        is_blank: whether black pictures are shown.
        cards: text of the model cards, for prompts that hold them.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        ask: Ask,
        data_root: str,
        batch_size: int,
        is_blank: bool = False,
        cards: str = "",
    ) -> None:
        self.benchmark, self.ask, self.data_root = benchmark, ask, data_root
        self.batch_size, self.is_blank, self.cards = batch_size, is_blank, cards
        self.load: Load = show_blank if is_blank else lru_cache(maxsize=64)(load_picture)

    def record(self, question: Question) -> Record:
        """Return the turns of a question before its answer."""
        return ask_record(self.benchmark, question, self.data_root, self.cards)

    def run(self, questions: Sequence[Question], written: PredictionFile, done: set[str], rank: int = 0) -> None:
        """Append the answers of ``questions`` but those ``done``, batch by batch, questions of one image together."""
        waiting = sorted((q for q in questions if q.id not in done), key=lambda q: (q.image, len(q.text)))
        title = f"{self.benchmark.name}{' (blank)' if self.is_blank else ''}"
        bar = tqdm(
            total=len(questions), initial=len(questions) - len(waiting), desc=title, unit="question", position=rank
        )
        with bar:
            for start in range(0, len(waiting), self.batch_size):
                batch = waiting[start : start + self.batch_size]
                written.append(self.answer(batch))
                bar.update(len(batch))

    def answer(self, batch: Sequence[Question]) -> list[Row]:
        """Return a row for each question: its turns, the answer or the error."""
        rows: dict[str, Row] = {}
        ready: dict[str, Conversation] = {}
        records = {question.id: self.record(question) for question in batch}
        for name, record in records.items():
            try:
                ready[name] = to_conversation(record, image_root(self.benchmark, self.data_root), self.load)
            except (UserError, OSError) as error:
                rows[name] = {"text": "", "error": str(error)}
        if ready:
            rows |= dict(zip(ready, self.ask(list(ready.values())), strict=True))
        return [{"question_id": name, "prompt": prompt_text(record), **rows[name]} for name, record in records.items()]

    def fingerprint(self, questions: Sequence[Question]) -> str:
        """Tell one set of prompts from another, so that answers to an older one are not taken for these."""
        texts = [(question.id, prompt_text(self.record(question))) for question in questions]
        return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def benchmark_names(benchmarks: Any) -> list[str]:
    """Return the names that a command was given, one or several.

    Raises:
        UserError: if there are none.
    """
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

    With ``torchrun`` each process answers every n-th question; the first one grades when all are done. A run that
    was cut off goes on, with any number of processes.

    Args:
        benchmarks: names of YAML files.
        data_root: folder with the data sets' folders.
        output_dir: where to write; a run that was cut off goes on there.
        benchmarks_dir: folder of the YAML files.
        answerer: the VLM; not needed with an endpoint.
        settings: what the VLM's answers depend on, such as the checkpoint.
        batch_size: questions at once.
        blank_baseline: whether the same questions are asked of a black image too.
        endpoint: asked in the VLM's place.
        cards: text of the model cards, for prompts that hold them.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is too small; give at least 1")
    definitions = [load_benchmark(name, benchmarks_dir) for name in benchmark_names(benchmarks)]
    asked = {definition.name: read_questions(definition, data_root) for definition in definitions}
    if endpoint is None and answerer is None:
        raise UserError("neither a model nor an endpoint was given")
    ask = asks_endpoint(endpoint) if endpoint is not None else asks_model(answerer)  # type: ignore[arg-type]
    settings = endpoint.settings if endpoint is not None else settings or {}
    folder = make_output_dir(output_dir) / "predictions"
    with joined_processes() as processes:
        for definition in definitions:
            for is_blank in _shown_blank(definition, asked[definition.name], blank_baseline):
                questioner = Questioner(definition, ask, data_root, batch_size, is_blank, cards)
                _ask_share(questioner, asked[definition.name], settings, folder, processes)
        processes.wait()
        if processes.rank == 0:
            _grade_all(definitions, asked, folder, data_root, blank_baseline)
        processes.wait()


def run_name(definition: Benchmark, is_blank: bool) -> str:
    """Return the name of a benchmark's predictions and scores."""
    return f"{definition.name}{BLANK_ENDING}" if is_blank else definition.name


def _ask_share(
    questioner: Questioner,
    questions: Sequence[Question],
    settings: Mapping[str, Any],
    folder: Path,
    processes: Processes,
) -> None:
    """Ask this process's share of the questions."""
    name = run_name(questioner.benchmark, questioner.is_blank)
    told = {**settings, "questions": questioner.fingerprint(questions)}
    written = PredictionFile(shard_path(folder, name, processes.rank), told)
    done = {question_id for question_id, row in read_shards(folder, name).items() if not row.get("error")}
    questioner.run(questions[processes.rank :: processes.count], written, done, processes.rank)


def _grade_all(
    definitions: Sequence[Benchmark],
    asked: Mapping[str, Sequence[Question]],
    folder: Path,
    data_root: str,
    blank_baseline: bool,
) -> None:
    results: dict[str, Any] = {}
    for definition in definitions:
        questions = asked[definition.name]
        known = [question.id for question in questions]
        for is_blank in _shown_blank(definition, questions, blank_baseline):
            name = run_name(definition, is_blank)
            read = read_predictions(merge_shards(folder, name, known), known)
            results[name] = grade_to_file(folder / f"{name}.items.jsonl", definition, questions, read, data_root)
        try:
            training = read_training_questions(definition, data_root)
        except UserError as error:
            results[definition.name]["notes"].append(f"no majority answer in training: {error}")
            training = []
        if training:
            prior = prior_predictions(questions, training)
            name = f"{definition.name}{PRIOR_ENDING}"
            write_predictions(folder / f"{name}.jsonl", prior)
            results[name] = grade(definition, questions, prior)
        results[f"{definition.name}{MAJORITY_ENDING}"] = grade(definition, questions, majority_predictions(questions))
    write_outputs(folder.parent, definitions, results)


def _shown_blank(definition: Benchmark, questions: Sequence[Question], blank_baseline: bool) -> tuple[bool, ...]:
    """Return whether pictures are blank in each run of a benchmark; without pictures there is only one."""
    has_pictures = definition.prompt != "text_only" and any(question.image for question in questions)
    return (False, True) if blank_baseline and has_pictures else (False,)
