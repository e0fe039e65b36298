"""A benchmark's question as the conversation that the model is shown, with or without an expert's findings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vila_m3_common.errors import UserError
from vila_m3_common.prompts import report_turns

from ..data.experts.cxr import ROLES, add_expert, finding_messages, read_scores
from ..data.record import Message, Record
from .definition import Benchmark, Question, prompt_of


def ask_record(benchmark: Benchmark, question: Question, data_root: str | Path, cards: str = "") -> Record:
    """Return the turns before the answer, in the benchmark's prompt form.

    With an expert, its saved findings (``<data_root>/<expert>/<image>.json``) stand in the turns: in the trained form
    for plain questions, in the reference's evaluation forms for findings and reports.

    Args:
        benchmark: its ``prompt`` and ``expert`` choose the form.
        question: what is asked.
        data_root: folder with the data sets' folders.
        cards: text of the model cards.

    Raises:
        UserError: if the expert's findings are missing.
    """
    if benchmark.prompt == "conversation" and question.record is not None:
        return replace(question.record, messages=question.record.messages[:-1])
    scores = _read_expert(benchmark, question, data_root)
    images = (question.image,) if question.image else ()
    plain = Record(question.id, (Message("user", prompt_of(benchmark, question)),), images)
    if benchmark.prompt in ("question", "report"):
        if scores is None:
            return plain
        if benchmark.prompt == "question":
            return add_expert(plain, scores, cards)
        turns = report_turns(question.text, scores, cards)
        messages = tuple(Message(role, text) for role, text in zip(ROLES, turns, strict=False))
    else:
        messages = finding_messages(benchmark.prompt, question.findings, question.finding, scores, cards)
    return replace(plain, messages=messages, images=() if benchmark.prompt == "text_only" else plain.images)


def _read_expert(benchmark: Benchmark, question: Question, data_root: str | Path) -> dict[str, float] | None:
    if not benchmark.expert:
        return None
    folder = Path(data_root) / benchmark.expert
    if not folder.is_dir():
        raise UserError(
            f"{benchmark.name} needs the expert's findings in {folder}, which does not exist; write them with "
            "bundles/vila_m3_with_experts/configs/expert_predictions.json"
        )
    return read_scores(folder, question.image)


def prompt_text(record: Record) -> str | list[dict[str, str]]:
    """Return what a predictions file records: the one user turn, or all turns with their speakers."""
    if len(record.messages) == 1:
        return record.messages[0].text
    return [{"role": message.role, "text": message.text} for message in record.messages]
