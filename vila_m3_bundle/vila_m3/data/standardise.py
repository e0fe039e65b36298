"""Sentences of reports rewritten by any OpenAI-compatible endpoint, with a guard against changed findings."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vila_m3_common.errors import UserError, exits_with_message

from .cleaning import split_sentences
from .record import Message, Record, format_row, parse_row

# Findings of chest reports and the words that name them; a rewrite must name the same ones with the same polarity.
FINDINGS = {
    "effusion": r"effusions?",
    "pneumothorax": r"pneumothora(?:x|ces)",
    "edema": r"o?edema",
    "consolidation": r"consolidations?|consolidated",
    "atelectasis": r"atelecta(?:sis|ses|tic)",
    "pneumonia": r"pneumonias?",
    "cardiomegaly": r"cardiomegaly|enlarged (?:heart|cardiac silhouette)"
    r"|(?:heart|cardiac silhouette) is (?:\w+ )?enlarged",
    "opacity": r"opacit(?:y|ies)|opacifications?",
    "nodule": r"nodules?|nodular",
    "mass": r"mass(?:es)?",
    "fracture": r"fractures?",
    "emphysema": r"emphysema(?:tous)?",
    "fibrosis": r"fibro(?:sis|tic)",
    "hernia": r"hernias?",
    "thickening": r"thickening",
    "congestion": r"congestion|congested",
    "infiltrate": r"infiltrat(?:e|es|ion)",
    "granuloma": r"granulomas?|granulomatous|granulomata",
    "calcification": r"calcif(?:ied|ications?)",
    "device": r"catheters?|tubes?|pacemakers?|lines?|wires?|leads?",
}
_PATTERNS = {name: re.compile(rf"\b(?:{words})\b", re.IGNORECASE) for name, words in FINDINGS.items()}
_SIDES = re.compile(r"\b(left|right|bilateral(?:ly)?)\b", re.IGNORECASE)
_NEGATION = re.compile(
    r"\b(?:no|not|without|free of|negative for|absen(?:t|ce)|clear of|neither|nor|resolved|denies|excluded?|"
    r"ruled out)\b",
    re.IGNORECASE,
)
# Where a negation ends: "no effusion, but a small pneumothorax".
_CLAUSE_END = re.compile(r"[.;!?]|\b(?:but|however|although|though|with|there (?:is|are))\b", re.IGNORECASE)
_TRAILING_NEGATION = re.compile(
    r"\b(?:is|are|was|were|has|have)\b[^.;]*?\b(?:not|no longer|absent|resolved|excluded|ruled out)\b", re.IGNORECASE
)

Polarity = dict[str, bool]


def find_polarities(text: str) -> Polarity:
    """Return the findings a text names, and whether it affirms each; one affirmed mention is enough."""
    polarities: Polarity = {}
    start = 0
    clauses = []
    for end in _CLAUSE_END.finditer(text):
        clauses.append(text[start : end.start()])
        # "without" and "with no" must stay with what follows them.
        start = end.start() if end.group().isalpha() else end.end()
    clauses.append(text[start:])
    for clause in clauses:
        for name, pattern in _PATTERNS.items():
            for mention in pattern.finditer(clause):
                is_negated = bool(_NEGATION.search(clause[: mention.start()])) or bool(
                    _TRAILING_NEGATION.search(clause[mention.end() :])
                )
                polarities[name] = polarities.get(name, False) or not is_negated
    return polarities


def find_rewrite_problem(original: str, rewrite: str) -> str:
    """Return why a rewrite may not replace its original, or an empty string.

    Refused are a changed polarity, a finding dropped or added, a changed side, and an empty or much longer text.
    """
    if not rewrite.strip():
        return "the rewrite is empty"
    if len(rewrite) > 4 * len(original) + 80:
        return f"the rewrite has {len(rewrite)} characters for {len(original)}"
    before, after = find_polarities(original), find_polarities(rewrite)
    for name, affirmed in before.items():
        if name not in after:
            return f"the rewrite drops {name}"
        if after[name] != affirmed:
            return f"the rewrite {'affirms' if after[name] else 'denies'} {name}"
    added = sorted(after.keys() - before.keys())
    if added:
        return f"the rewrite adds {', '.join(added)}"
    sides = [{side.lower().removesuffix("ly") for side in _SIDES.findall(text)} for text in (original, rewrite)]
    if sides[0] != sides[1]:
        return f"the rewrite changes the side from {sorted(sides[0])} to {sorted(sides[1])}"
    return _find_overall_problem(original, rewrite, before)


def _find_overall_problem(original: str, rewrite: str, known: Polarity) -> str:
    """For sentences without a known finding, the presence of a negation must not change."""
    if known or bool(_NEGATION.search(original)) == bool(_NEGATION.search(rewrite)):
        return ""
    return "the rewrite changes a negation"


PROMPT = (
    "Rewrite one sentence of a radiology report. If a sentence of the list says the same, answer with that sentence; "
    "otherwise answer with the sentence in plain wording. Keep every finding, its side, its degree and whether it is "
    "present or absent. Answer with the sentence alone.\n\nList:\n{pool}\n\nSentence: {sentence}"
)


@dataclass
class Endpoint:
    """Asks an OpenAI-compatible server (``POST <url>/chat/completions``).

    Args:
        url: such as ``http://localhost:8000/v1``.
        model: name of the model there.
        key_variable: environment variable with the key, if the server needs one.
        timeout: seconds for one answer.
        attempts: tries for one sentence; the waits between them double from ``first_wait`` seconds.
        first_wait: see ``attempts``; a server's ``Retry-After`` is followed up to a minute.
    """

    url: str
    model: str
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    attempts: int = 5
    first_wait: float = 1.0
    sleep: Callable[[float], None] = field(default=time.sleep, repr=False)

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"endpoint {self.url!r} is no URL; give one such as http://localhost:8000/v1")

    def ask(self, prompt: str) -> str:
        """Return the answer.

        Raises:
            UserError: when the server refuses, or fails at every attempt.
        """
        wait, problem = self.first_wait, ""
        for attempt in range(self.attempts):
            if attempt:
                self.sleep(wait)
                wait = min(60.0, wait * 2)
            try:
                return self._send(prompt)
            except urllib.error.HTTPError as error:
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise UserError(f"{self.url} refuses with status {error.code}; check url, model and key") from error
                problem, wait = f"status {error.code}", max(wait, _read_wait(error))
            except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
                problem = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{self.url} failed {self.attempts} times ({problem}); what is done is kept, start the command again"
        )

    def _send(self, prompt: str) -> str:
        body = {"model": self.model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            answer = json.load(response)["choices"][0]["message"]["content"]
        if not isinstance(answer, str):
            raise ValueError("the answer has no text")
        return " ".join(answer.split())


def _read_wait(error: urllib.error.HTTPError) -> float:
    value = error.headers.get("Retry-After", "") if error.headers else ""
    return min(60.0, float(value)) if re.fullmatch(r"\d+(\.\d+)?", value or "") else 0.0


class Standardiser:
    """Rewrites sentences, asking for each only once; answers are kept in a file that a later run reads.

    Args:
        ask: gives the endpoint's answer to a prompt.
        pool: sentences to prefer.
        cache_file: JSONL of sentence, rewrite and problem; every line is written before the next question.
        name: of the model; answers of another model or pool are not reused.
    """

    def __init__(self, ask: Callable[[str], str], pool: Sequence[str], cache_file: str | Path, name: str = "") -> None:
        self.ask, self.pool, self.path = ask, list(pool), Path(cache_file)
        self.key = hashlib.sha256(json.dumps([name, self.pool, PROMPT]).encode()).hexdigest()[:16]
        self.answers: dict[str, tuple[str, str]] = {}
        self.rejected_count = self.asked_count = 0
        self._read_cache()

    def _read_cache(self) -> None:
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        kept = data[: data.rfind(b"\n") + 1]
        if kept != data:  # a kill in the middle of a line
            self.path.write_bytes(kept)
        for line in kept.decode().splitlines():
            row = json.loads(line)
            if row["key"] == self.key:
                self.answers[row["sentence"]] = (row["rewrite"], row["problem"])

    def rewrite(self, sentence: str) -> str:
        """Return the accepted rewrite, or the sentence itself when the rewrite is refused."""
        if sentence not in self.answers:
            self.asked_count += 1
            answer = self.ask(PROMPT.format(pool="\n".join(self.pool), sentence=sentence))
            problem = find_rewrite_problem(sentence, answer)
            row = {"key": self.key, "sentence": sentence, "rewrite": answer, "problem": problem}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self.answers[sentence] = (answer, problem)
        answer, problem = self.answers[sentence]
        self.rejected_count += bool(problem)
        return sentence if problem else answer

    def rewrite_report(self, text: str) -> str:
        """Return a report, sentence by sentence."""
        return " ".join(self.rewrite(sentence) for sentence in split_sentences(text))


def _rewrite_record(record: Record, standardiser: Standardiser) -> Record:
    messages = tuple(
        Message(message.role, standardiser.rewrite_report(message.text), message.in_context)
        if message.role == "assistant"
        else message
        for message in record.messages
    )
    return Record(record.id, messages, record.images, record.metadata)


def _read_lines(path: Path) -> Iterable[str]:
    with path.open(encoding="utf-8") as lines:
        yield from (line for line in lines if line.strip())


@exits_with_message
def standardise(
    input_file: str | Path, output: str | Path, pool_file: str | Path, endpoint: Endpoint
) -> dict[str, Any]:
    """Rewrite the assistant's turns of a JSONL file; refused rewrites are logged in ``<output>.rewrites.jsonl``.

    The answers are kept there, so a killed run asks nothing twice.

    Raises:
        UserError: for files that cannot be read, or an endpoint that fails.
    """
    source, target = Path(input_file), Path(output)
    for path in (source, Path(pool_file)):
        if not path.is_file():
            raise UserError(f"{path} does not exist; give the JSONL file of prepare_data and a text file of sentences")
    pool = [line.strip() for line in Path(pool_file).read_text(encoding="utf-8").splitlines() if line.strip()]
    target.parent.mkdir(parents=True, exist_ok=True)
    log = target.with_name(target.name + ".rewrites.jsonl")
    standardiser = Standardiser(endpoint.ask, pool, log, endpoint.model)
    partial = target.with_name(f".{target.name}.partial")
    count = 0
    with partial.open("w", encoding="utf-8") as file:
        for line in tqdm(_read_lines(source), desc="reports"):
            count += 1
            file.write(format_row(_rewrite_record(parse_row(line), standardiser)) + "\n")
    partial.replace(target)
    summary = {"reports": count, "asked": standardiser.asked_count, "refused": standardiser.rejected_count}
    print(f"{target}: {summary}")
    return summary
