"""Many questions from a JSONL file: answered in batches, written line by line, continued after a kill."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vila_m3_common.conversation import IMAGE_TOKEN, Conversation, neutralise
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.volumes import load_picture

from .answer import Answered, Answerer
from .inference import open_conversation
from .resumable_files import append_durably, check_settings, write_atomically

ROLES = ("user", "assistant", "expert")


@dataclass(frozen=True)
class Question:
    """One line of the input.

    Args:
        question_id: names it in the output.
        row: the line's fields; None when the line is no JSON object.
        problem: why it cannot be asked, when that shows before its images are read.
    """

    question_id: str | int
    row: Mapping[str, Any] | None = None
    problem: str = ""


def read_questions(path: str | Path) -> list[Question]:
    """Read the lines of a JSONL file; bad lines become questions with a problem.

    Raises:
        UserError: if the file is missing, empty, not UTF-8, or two lines have one ``question_id``.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"questions {path} cannot be read ({error}); give a JSONL file in UTF-8") from error
    questions = [_read_question(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise UserError(f'questions {path} are empty; give lines such as {{"question": "...", "image": "..."}}')
    counts = Counter(question.question_id for question in questions)
    repeated = [str(name) for name, count in counts.items() if count > 1]
    if repeated:
        raise UserError(f"question_id {', '.join(repeated[:5])} stands in several lines of {path}; make them different")
    return questions


def _read_question(line: str, number: int) -> Question:
    """Parse a line; one without ``question_id`` is named by its number."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        return Question(f"line {number}", None, f"line {number} is not valid JSON: {error}")
    if not isinstance(row, dict):
        return Question(f"line {number}", None, f"line {number} is no JSON object")
    question_id = row.get("question_id", f"line {number}")
    if not isinstance(question_id, (str, int)):
        return Question(f"line {number}", row, f"question_id of line {number} is no text or number")
    return Question(question_id, row)


def build_conversation(row: Mapping[str, Any], image_root: Path, cards: str) -> Conversation:
    """Make the conversation of a line.

    Args:
        row: either ``question`` with ``image`` (path, list of four paths, or absent) and perhaps ``modality``,
            ``slice_index``, ``axis``; or ``turns``, a list of ``{"role", "text"}`` with ``<image>`` placeholders,
            and ``images``, the pictures in their order. ``turns`` are taken as they are, without model cards.
        image_root: folder that relative paths are in.
        cards: text of the model cards, for the first form.

    Raises:
        UserError: for missing fields, unknown roles, or images that cannot be used.
    """
    if "turns" in row:
        return _from_turns(row["turns"], [image_root / path for path in row.get("images", [])])
    if not isinstance(row.get("question"), str):
        raise UserError("the line has neither question nor turns")
    given = row.get("image")
    image = None if given is None else _paths(given, image_root)
    conversation, _ = open_conversation(
        image, row["question"], cards, row.get("modality"), row.get("slice_index"), row.get("axis", 2)
    )
    return conversation


def _paths(given: Any, image_root: Path) -> str | list[str]:
    if isinstance(given, str):
        return str(image_root / given)
    if isinstance(given, list) and all(isinstance(path, str) for path in given):
        return [str(image_root / path) for path in given]
    raise UserError(f"image {given!r} is neither a path nor a list of paths")


def _from_turns(turns: Any, image_paths: Sequence[Path]) -> Conversation:
    conversation = Conversation()
    images = iter([load_picture(path) for path in image_paths])
    needed = 0
    for turn in turns if isinstance(turns, list) else []:
        role, text = turn.get("role"), turn.get("text")
        if role not in ROLES or not isinstance(text, str):
            raise UserError(f"turn {turn!r} needs a role ({', '.join(ROLES)}) and a text")
        count = text.count(IMAGE_TOKEN)
        needed += count
        if needed > len(image_paths):
            raise UserError(f"the turns have more {IMAGE_TOKEN} placeholders than the {len(image_paths)} images given")
        conversation.add(role, _keep_placeholders(text), [next(images) for _ in range(count)])
    if needed < len(image_paths):
        raise UserError(f"{len(image_paths)} images were given for {needed} {IMAGE_TOKEN} placeholders")
    return conversation


def _keep_placeholders(text: str) -> str:
    """Take control strings out of a text, but not its image placeholders."""
    return IMAGE_TOKEN.join(neutralise(part) for part in text.split(IMAGE_TOKEN))


class AnswerFile:
    """The output: one line per answered question, appended batch by batch.

    A line that a kill cut off is dropped, and so are lines with errors, which are tried again.

    Args:
        path: the JSONL file.
        settings: what the answers depend on; kept beside it in ``<path>.settings.json``.

    Raises:
        UserError: if the file was begun with other settings.
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.settings_path = self.path.with_name(f"{self.path.name}.settings.json")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        check_settings(self.path, self.settings_path, dict(settings), "--output")
        self.done = {row["question_id"]: row for row in self._answered_lines()}
        self._rewrite()

    def _answered_lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.is_file():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and "question_id" in row and "text" in row:
                yield row

    def _rewrite(self) -> None:
        """Leave whole, good lines only; replaced in one step, so that a kill loses nothing."""
        write_atomically(self.path, "".join(map(_line, self.done.values())))

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write lines and make sure that they are on disk."""
        append_durably(self.path, "".join(map(_line, rows)))


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@exits_with_message
def run_batches(
    questions: str,
    output: str,
    answerer: Answerer,
    cards: str,
    settings: Mapping[str, Any],
    batch_size: int = 8,
    image_root: str | None = None,
) -> None:
    """Answer every line of ``questions`` and write ``question_id``, ``text`` and why the text ended.

    Args:
        questions: JSONL file; see :func:`build_conversation`.
        output: JSONL file; lines that it has are not asked again.
        answerer: the bundle's ``answer`` hook.
        cards: text of the model cards.
        settings: what the answers depend on, such as the checkpoint.
        batch_size: conversations at once.
        image_root: folder that relative image paths are in; None takes the folder of ``questions``.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is too small; give at least 1")
    asked = read_questions(questions)
    root = Path(image_root) if image_root else Path(questions).parent
    written = AnswerFile(output, settings)
    waiting = [question for question in asked if question.question_id not in written.done]
    failed = cut = 0
    with tqdm(total=len(asked), initial=len(asked) - len(waiting), desc="questions", unit="question") as bar:
        for start in range(0, len(waiting), batch_size):
            rows = _answer(waiting[start : start + batch_size], answerer, root, cards)
            written.append(rows)
            failed += sum("error" in row for row in rows)
            cut += sum(row.get("stop_reason", "stop token") != "stop token" for row in rows)
            bar.update(len(rows))
    print(f"{len(asked) - failed} of {len(asked)} questions answered, written to {output}")
    if cut:
        print(f"note: {cut} answers were cut off at their longest allowed length; see stop_reason")
    if failed:
        print(f"note: {failed} questions could not be asked; see their error in {output}. Run again to retry them")


def _answer(batch: Sequence[Question], answerer: Answerer, root: Path, cards: str) -> list[dict[str, Any]]:
    """Answer a batch; a question that cannot be asked gets a line with its error."""
    rows: dict[str | int, dict[str, Any]] = {}
    ready: dict[str | int, Conversation] = {}
    for question in batch:
        try:
            if question.problem or question.row is None:
                raise UserError(question.problem)
            conversation = build_conversation(question.row, root, cards)
            answerer.tokenize(conversation)  # raises what would else stop the whole batch
            ready[question.question_id] = conversation
        except (UserError, ValueError, TypeError, AttributeError) as error:
            rows[question.question_id] = {"question_id": question.question_id, "error": str(error)}
    answers = answerer.answer_batch(list(ready.values()))
    rows |= {name: _answer_row(name, answer) for name, answer in zip(ready, answers, strict=True)}
    return [rows[question.question_id] for question in batch]


def _answer_row(question_id: str | int, answer: Answered) -> dict[str, Any]:
    return {
        "question_id": question_id,
        "text": answer.text.strip(),
        "stop_reason": answer.stop_reason,
        "new_token_count": answer.new_token_count,
    }
