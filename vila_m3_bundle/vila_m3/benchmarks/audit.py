"""The counterfactual audit of experts: what does the VLM do with feedback that is right, wrong, or says nothing?"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tqdm import tqdm

from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.prompts import spoken
from vila_m3_common.standalone import make_output_dir

from ..answer import Answerer
from ..resumable_files import write_atomically
from .answers import parse_yes_no
from .audit_cases import VARIANTS, AuditCase, all_cases, known_names
from .grading import write_json
from .predictions import PredictionFile
from .runner import Ask, asks_model
from .statistics import score
from .tables import percent

RATES = {
    "right": "right answers",
    "follow": "agrees with the feedback",
    "harm": "right without the expert, wrong with this feedback",
    "rescue": "wrong without the expert, right with this feedback",
    "harm_against_true": "right with true feedback, wrong with this",
    "unsupported": "names what the feedback does not contain",
    "undecided": "answers neither yes nor no to a question for one finding",
}


@dataclass(frozen=True)
class Reading:
    """How one answer is read.

    Args:
        is_right: whether it agrees with the truth.
        follows: whether it agrees with the feedback; None where that says nothing, or two things.
        names_unsupported: whether it names what the feedback does not.
        is_undecided: whether a question for one finding got neither yes nor no.
    """

    is_right: bool
    follows: bool | None
    names_unsupported: bool
    is_undecided: bool


@cache
def _pattern(modality: str) -> re.Pattern[str]:
    names = sorted(map(spoken, known_names(modality)), key=len, reverse=True)
    return re.compile(r"\b(" + "|".join(map(re.escape, names)) + r")s?\b")


def named_in(text: str, modality: str) -> frozenset[str]:
    """Return the findings or structures that an answer names, the longest first ("left lung upper lobe")."""
    spelt = {spoken(name): name for name in known_names(modality)}
    return frozenset(spelt[name] for name in _pattern(modality).findall(text.lower().replace("_", " ")))


def read_answer(case: AuditCase, variant: str, text: str) -> Reading:
    """Read an answer to one variant of a case."""
    feedback = case.feedback.get(variant)
    stated = feedback.named if feedback else frozenset()
    target = case.question.target
    named = named_in(text, case.modality)
    unsupported = bool(named - stated - ({target} if target else set()))
    if not target:
        follows = named == stated if feedback is not None and feedback.is_decisive else None
        return Reading(named == case.truth, follows, unsupported, False)
    said = parse_yes_no(text)
    follows = None
    if feedback is not None and feedback.is_decisive:
        follows = said is not None and (said == "yes") == (target in stated)
    return Reading(said is not None and (said == "yes") == (target in case.truth), follows, unsupported, said is None)


Readings = Mapping[tuple[str, str], Reading]


def rates(cases: Sequence[AuditCase], readings: Readings) -> dict[str, dict[str, Any]]:
    """Return variant -> rate -> ``{value, interval, count}``, with 95 % intervals by patient.

    ``harm`` and ``rescue`` are shares of the questions that were right, or wrong, without the expert; a value of None
    says that there was none. Only questions for one finding count there.
    """
    found: dict[str, dict[str, Any]] = {}
    asked = [case for case in cases if case.question.target]
    for variant in VARIANTS:
        every = [case for case in cases if (case.id, variant) in readings]
        decided = [case for case in asked if (case.id, variant) in readings]
        if not every:
            continue

        def read(case: AuditCase, variant: str = variant) -> Reading:
            return readings[case.id, variant]

        def where(name: str, is_right: bool, among: Sequence[AuditCase] = decided) -> list[AuditCase]:
            return [case for case in among if readings[case.id, name].is_right == is_right]

        told = [case for case in every if read(case).follows is not None]
        found[variant] = {
            "right": _share(decided, lambda case: read(case).is_right),
            "follow": _share(told, lambda case: bool(read(case).follows)),
            "harm": _share(where("none", True), lambda case: not read(case).is_right),
            "rescue": _share(where("none", False), lambda case: read(case).is_right),
            "harm_against_true": _share(where("true", True), lambda case: not read(case).is_right),
            "unsupported": _share(every, lambda case: read(case).names_unsupported),
            "undecided": _share(decided, lambda case: read(case).is_undecided),
        }
        if variant == "none":
            found[variant] = {name: found[variant][name] for name in ("right", "undecided")}
    return found


def _share(cases: Sequence[AuditCase], holds: Callable[[AuditCase], bool]) -> dict[str, Any]:
    return score([float(holds(case)) for case in cases], [case.patient for case in cases])


def audit_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one Markdown table per modality: variants down, rates across, in percent."""
    lines = ["# Counterfactual audit of the expert", ""]
    lines += [f"- `{name}`: {told}" for name, told in RATES.items()]
    for modality, variants in results.items():
        lines += ["", f"## {modality}", "", f"| feedback | {' | '.join(RATES)} |", f"| --- |{' --- |' * len(RATES)}"]
        for variant, row in variants.items():
            lines.append(f"| {variant} | {' | '.join(_percent(row.get(name)) for name in RATES)} |")
    return "\n".join(lines) + "\n"


def _percent(rate: Mapping[str, Any] | None) -> str:
    text = percent(rate)
    return f"{text}, n {rate['count']}" if rate and text else ""


def ask_all(
    cases: Sequence[AuditCase], cards: str, ask: Ask, written: PredictionFile, batch_size: int
) -> dict[tuple[str, str], str]:
    """Ask every variant of every case that has no answer yet; return (case, variant) -> answer."""
    keys = [(case, variant) for variant in VARIANTS for case in cases if variant == "none" or variant in case.feedback]
    waiting = [(case, variant) for case, variant in keys if _name(case, variant) not in written.done]
    with tqdm(total=len(keys), initial=len(keys) - len(waiting), desc="audit", unit="answer") as bar:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            answers = ask([case.conversation(variant, cards) for case, variant in batch])
            written.append(
                [
                    {"question_id": _name(case, variant), "prompt": case.question.text, **answer}
                    for (case, variant), answer in zip(batch, answers, strict=True)
                ]
            )
            bar.update(len(batch))
    return {(case.id, variant): _text(written, _name(case, variant)) for case, variant in keys}


def _name(case: AuditCase, variant: str) -> str:
    return f"{case.id}/{variant}"


def _text(written: PredictionFile, name: str) -> str:
    return str(written.done[name]["text"]) if name in written.done else ""


def _fingerprint(cases: Sequence[AuditCase]) -> str:
    """Tell one set of cases from another, so that answers to an older one are not taken for these."""
    told = [(case.id, case.question.text, sorted((k, v.text) for k, v in case.feedback.items())) for case in cases]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16]


@exits_with_message
def run_audit(
    output_dir: str,
    cards: str,
    answerer: Answerer,
    settings: Mapping[str, Any],
    nih_root: str | None = None,
    scores_root: str | None = None,
    film_count: int = 200,
    phantom_count: int = 60,
    first_seed: int = 600_000,
    batch_size: int = 32,
) -> None:
    """Audit a VLM; write ``results.json``, ``audit.md`` and every answer to ``answers.jsonl``. Goes on after a kill.

    Args:
        output_dir: where to write.
        cards: text of the model cards.
        answerer: the VLM.
        settings: what the answers depend on.
        nih_root: folder of NIH films with ``labels.csv``; None leaves X-rays out.
        scores_root: folder with the expert's scores of each film; None leaves out what the expert really says.
        film_count: films at most, one of each patient.
        phantom_count: CT phantoms.
        first_seed: of the phantoms; training's must not overlap.
        batch_size: questions at once.
    """
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is too small; give at least 1")
    cases = all_cases(nih_root, scores_root, film_count, phantom_count, first_seed)
    if not cases:
        raise UserError("there is nothing to audit; give --nih_root, or a phantom_count above 0")
    folder = make_output_dir(output_dir)
    written = PredictionFile(folder / "answers.jsonl", {**settings, "cases": _fingerprint(cases)})
    texts = ask_all(cases, cards, asks_model(answerer), written, batch_size)
    by_id = {case.id: case for case in cases}
    readings = {key: read_answer(by_id[key[0]], key[1], text) for key, text in texts.items()}
    results = {
        modality: rates([case for case in cases if case.modality == modality], readings)
        for modality in sorted({case.modality for case in cases})
    }
    write_json(folder / "results.json", results)
    table = audit_table(results)
    write_atomically(folder / "audit.md", table)
    print(table)
    print(f"written to {folder / 'results.json'} and audit.md")
