"""What each grader makes of a benchmark's predictions: both gradings of every question, and the scores over them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from ..data.cleaning import clean_report
from .answers import is_right, parse_finding, parse_letters
from .choice import is_choice_right
from .definition import Benchmark, Question
from .predictions import Predictions
from .published import (
    CxrGrader,
    PublishedGraderError,
    diff_vqa_score,
    diff_vqa_totals,
    exact_match,
    finding_f1,
    pathvqa_match,
    read_finding,
)
from .report_metrics import MetricMissing, score_reports
from .statistics import AurocMeasure, Measure, SumMeasure, divide, mean_measure
from .triggers import judge_all

Items = dict[str, float | bool | None]


@dataclass
class Graded:
    """A graded benchmark.

    Args:
        measures: name -> score over all questions in their order, or why it is missing; ``corrected_*`` are ours.
        published: question id -> score as published; absent where the reference does not grade it.
        corrected: question id -> score of the corrected grading; None is unparsable.
        exact: name -> the reference's own sum, where adding up in another order could differ in the last bit.
    """

    measures: dict[str, Measure | str]
    published: Items
    corrected: Items
    exact: dict[str, float] = field(default_factory=dict)

    @property
    def unparsable(self) -> int:
        """Number of answers that the corrected grading cannot read."""
        return sum(value is None for value in self.corrected.values())


def published_items(benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions) -> dict[str, bool]:
    """Return question id -> right, as the reference's exact match says."""
    if benchmark.grader == "pathvqa":
        closed = {question.id: question.answer for question in questions if question.kind == "CLOSED"}
        return pathvqa_match(closed, predictions.lines)
    return exact_match({question.id: question.answer for question in questions}, predictions.lines)


def corrected_items(
    questions: Sequence[Question], predictions: Predictions, is_choice: bool = False
) -> dict[str, bool | None]:
    """Return question id -> right by the grammar of :mod:`.answers`; None is unparsable, a missing answer wrong.

    Ids are compared as text, so that the number 1 is the id "1".
    """
    texts = predictions.texts
    return {
        question.id: _is_right(question, texts[question.id], is_choice) if question.id in texts else False
        for question in questions
    }


def _is_right(question: Question, text: str, is_choice: bool) -> bool | None:
    if is_choice:
        return is_choice_right(question.text, question.answer, text)
    return is_right(question.answer, text)


def grade_matches(benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions) -> Graded:
    """Grade VQA-RAD, SLAKE and PathVQA: the share of right answers."""
    published: Items = dict(published_items(benchmark, questions, predictions))
    corrected: Items = dict(corrected_items(questions, predictions, benchmark.grader == "choice"))
    measures: dict[str, Measure | str] = {
        "accuracy": _mean(questions, published),
        "corrected_accuracy": _mean(questions, corrected),
    }
    for kind in ("CLOSED", "OPEN"):
        chosen = [question.kind == kind for question in questions]
        measures[f"corrected_accuracy_{kind.lower()}"] = _mean(questions, corrected, chosen)
    return Graded(measures, published, corrected)


def _mean(questions: Sequence[Question], items: Items, chosen: Sequence[bool] | None = None) -> Measure | str:
    """Return the mean over the questions that are graded and, if given, chosen."""
    counted = [
        question.id in items and is_chosen
        for question, is_chosen in zip(questions, chosen or [True] * len(questions), strict=True)
    ]
    if not any(counted):
        return "no question counts here"
    return mean_measure([float(items.get(question.id) or 0) for question in questions], counted)


# Medical-Diff-VQA -------------------------------------------------------------------------------------------------


def grade_diff_vqa(benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions) -> Graded:
    """Grade Medical-Diff-VQA: per type, and over types the plain (``avg``) and the weighted mean (``wavg``)."""
    corrected: Items = dict(corrected_items(questions, predictions))
    kinds = list(dict.fromkeys(question.category for question in questions))
    measures: dict[str, Measure | str] = {}
    texts = dict(predictions.lines)
    absent = next((question.id for question in questions if question.id not in texts), None)
    published: Items = {}
    exact: dict[str, float] = {}
    if absent is None:
        published = {q.id: diff_vqa_score(q.answer, texts[q.id], q.kind == "CLOSED") for q in questions}
        rows = {
            kind: [(q.kind == "CLOSED", float(published[q.id] or 0)) for q in questions if q.category == kind]
            for kind in kinds
        }
        totals = diff_vqa_totals(rows)
        for form in ("closed", "open"):
            is_form = [q.kind == form.upper() for q in questions]
            measures[f"wavg_{form}"] = _mean(questions, published, is_form)
            measures[f"avg_{form}"] = _macro(questions, published, kinds, is_form)
            exact |= {f"{name}_{form}": totals[f"{name}_{form}"] for name in ("avg", "wavg")}
            for kind in kinds:
                chosen = [q.category == kind and is_one for q, is_one in zip(questions, is_form, strict=True)]
                measures[f"{form}_{kind}"] = _mean(questions, published, chosen)
                exact[f"{form}_{kind}"] = totals[kind][form]
    else:
        reason = f"the reference ends with a KeyError, because {absent!r} has no answer"
        measures |= dict.fromkeys(("wavg_closed", "wavg_open", "avg_closed", "avg_open"), reason)
    measures["corrected_accuracy"] = _mean(questions, corrected)
    measures["corrected_accuracy_macro"] = _macro(questions, corrected, kinds, [True] * len(questions))
    for kind in kinds:
        measures[f"corrected_accuracy_{kind}"] = _mean(questions, corrected, [q.category == kind for q in questions])
    return Graded(measures, published, corrected, exact)


def _macro(questions: Sequence[Question], items: Items, kinds: Sequence[str], chosen: Sequence[bool]) -> Measure | str:
    """Return the plain mean over types of the mean per type."""
    if not any(chosen):
        return "no question counts here"
    parts = np.zeros((len(questions), 2 * len(kinds)))
    for place, (question, is_chosen) in enumerate(zip(questions, chosen, strict=True)):
        if is_chosen:
            kind = kinds.index(question.category)
            parts[place, 2 * kind : 2 * kind + 2] = float(items.get(question.id) or 0), 1
    return SumMeasure(parts, _macro_of_sums, int(sum(chosen)))


def _macro_of_sums(sums: np.ndarray) -> np.ndarray:
    means = divide(sums[:, 0::2], sums[:, 1::2])
    counts = (~np.isnan(means)).sum(1)
    return divide(np.nan_to_num(means).sum(1), counts)


# Findings in chest X-rays -----------------------------------------------------------------------------------------


def grade_findings(benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions) -> Graded:
    """Grade ChestX-ray14 and CheXpert: F1 per finding and its plain mean.

    An answer that cannot be read, or is missing, is wrong in the corrected grading, whatever the truth.
    """
    if benchmark.prompt == "multi_choice":
        return _grade_choices(questions, predictions)
    texts = predictions.texts
    findings = list(dict.fromkeys(question.finding for question in questions))
    truths = np.array([int(question.answer == "yes") for question in questions])
    said = [parse_finding(texts.get(question.id, ""), question.finding) for question in questions]
    right = [None if read is None else (read == "yes") == bool(truth) for read, truth in zip(said, truths, strict=True)]
    corrected: Items = {
        question.id: value if question.id in texts else False for question, value in zip(questions, right, strict=True)
    }
    owner = np.array([findings.index(question.finding) for question in questions])
    is_right_ = np.array([bool(value) for value in right])
    counts = _confusion(truths[:, None], np.where(is_right_, truths, 1 - truths)[:, None], owner, len(findings))
    measures, published, exact = _published_findings(benchmark, questions, dict(predictions.lines), findings)
    measures |= _finding_measures(counts, findings, len(questions))
    measures["corrected_accuracy"] = mean_measure([float(bool(value)) for value in corrected.values()])
    measures["auroc"] = _auroc(questions, said, truths, owner, predictions.confidences)
    return Graded(measures, published, corrected, exact)


def _published_findings(
    benchmark: Benchmark, questions: Sequence[Question], texts: Mapping[Any, str], findings: Sequence[str]
) -> tuple[dict[str, Measure | str], Items, dict[str, float]]:
    """Read the answers as the reference does; its error, if it ends with one, is the reason of every score."""
    grader = cast(CxrGrader, benchmark.grader)
    truths = {question.id: int(question.answer == "yes") for question in questions}
    try:
        read = {question.id: read_finding(texts.get(question.id, ""), grader) for question in questions}
        values = {
            name: finding_f1(
                [truths[q.id] for q in questions if q.finding == name],
                [texts.get(q.id, "") for q in questions if q.finding == name],
                grader,
            )
            for name in findings
        }
    except PublishedGraderError as error:
        return dict.fromkeys(["f1", *(_key("f1", name) for name in findings)], str(error)), {}, {}
    spoiled = {q.finding for q in questions if read[q.id] not in (0, 1)}
    owner = np.array([findings.index(question.finding) for question in questions])
    said = np.array([[int(read[q.id] == 1)] for q in questions])
    true = np.array([[truths[q.id]] for q in questions])
    counts = _confusion(true, said, owner, len(findings))
    for name in spoiled:
        counts[:, 4 * findings.index(name)] = 0  # no true positives: F1 is 0 in every replicate
    measures: dict[str, Measure | str] = {"f1": SumMeasure(counts, _macro_f1, len(questions))}
    for place, name in enumerate(findings):
        chosen = counts[:, 4 * place : 4 * place + 4]
        measures[_key("f1", name)] = SumMeasure(chosen, _macro_f1, int((owner == place).sum()))
    exact = {"f1": sum(values.values()) / len(values)} | {_key("f1", name): value for name, value in values.items()}
    return measures, {q.id: read[q.id] == truths[q.id] for q in questions}, exact


def _key(metric: str, finding: str) -> str:
    return f"{metric}_{finding.lower().replace(' ', '_')}"


def _confusion(truths: np.ndarray, said: np.ndarray, owner: np.ndarray | None, finding_count: int) -> np.ndarray:
    """Return ``(questions, 4 x findings)``: true and false positives, false and true negatives of each finding.

    Args:
        truths: ``(questions, 1)`` for questions about one finding each, ``(questions, findings)`` for all at once.
        said: of the same shape.
        owner: the finding of each question; None for all at once.
        finding_count: number of findings.
    """
    cells = np.stack([truths & said, (1 - truths) & said, truths & (1 - said), (1 - truths) & (1 - said)], axis=2)
    if owner is None:
        return cells.reshape(len(truths), -1).astype(float)
    counts = np.zeros((len(truths), 4 * finding_count))
    for place, finding in enumerate(owner):
        counts[place, 4 * finding : 4 * finding + 4] = cells[place, 0]
    return counts


def _rates(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return F1, sensitivity and specificity ``(R, findings)`` of sums ``(R, 4 x findings)``; an undefined F1 is 0."""
    hit, false_alarm, missed, passed = (sums[:, start::4] for start in range(4))
    f1 = np.nan_to_num(divide(2 * hit, 2 * hit + false_alarm + missed))
    return f1, divide(hit, hit + missed), divide(passed, passed + false_alarm)


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    return np.asarray(_rates(sums)[0].mean(1))


def _macro_sensitivity(sums: np.ndarray) -> np.ndarray:
    return _nan_mean(_rates(sums)[1])


def _macro_specificity(sums: np.ndarray) -> np.ndarray:
    return _nan_mean(_rates(sums)[2])


def _nan_mean(values: np.ndarray) -> np.ndarray:
    is_known = ~np.isnan(values)
    return divide(np.nan_to_num(values).sum(1), is_known.sum(1))


def _finding_measures(counts: np.ndarray, findings: Sequence[str], count: int) -> dict[str, Measure | str]:
    rates = {"f1": _macro_f1, "sensitivity": _macro_sensitivity, "specificity": _macro_specificity}
    measures: dict[str, Measure | str] = {}
    for name, combine in rates.items():
        measures[f"corrected_{name}"] = SumMeasure(counts, combine, count)
        for place, finding in enumerate(findings):
            chosen = counts[:, 4 * place : 4 * place + 4]
            measures[_key(f"corrected_{name}", finding)] = SumMeasure(chosen, combine, int((chosen.sum(1) > 0).sum()))
    return measures


def _auroc(
    questions: Sequence[Question],
    said: Sequence[str | None],
    truths: np.ndarray,
    owner: np.ndarray,
    confidences: Mapping[str, float],
) -> Measure | str:
    """Return the area under the ROC curve, the probability of "yes" taken from the confidence in the answer."""
    if any(question.id not in confidences for question in questions):
        return "needs the model's confidence in every answer"
    if None in said:
        return "needs a yes or no in every answer"
    sure = np.array([confidences[question.id] for question in questions])
    return AurocMeasure(truths, np.where(np.array(said) == "yes", sure, 1 - sure), owner)


def _grade_choices(questions: Sequence[Question], predictions: Predictions) -> Graded:
    """Grade multiple choice, which the reference asks but does not grade."""
    texts = predictions.texts
    findings = list(questions[0].findings)
    options = [*findings, "None of the above"]
    read = [parse_letters(texts.get(question.id, ""), options) for question in questions]
    truths = np.array(
        [_present(parse_letters(question.answer, options) or (), len(findings)) for question in questions]
    )
    said = np.array(
        [
            _present(letters, len(findings)) if letters is not None else 1 - truth
            for letters, truth in zip(read, truths, strict=True)
        ]
    )
    right = (truths == said).all(1)
    corrected: Items = {
        question.id: None if letters is None and question.id in texts else bool(value)
        for question, letters, value in zip(questions, read, right, strict=True)
    }
    measures = _finding_measures(_confusion(truths, said, None, len(findings)), findings, len(questions))
    measures["f1"] = "the reference does not grade multiple choice"
    measures["corrected_accuracy"] = mean_measure([float(bool(value)) for value in corrected.values()])
    return Graded(measures, {}, corrected)


def _present(letters: Sequence[str], count: int) -> list[int]:
    return [int(chr(ord("A") + place) in letters) for place in range(count)]


# Reports ----------------------------------------------------------------------------------------------------------


def grade_reports(benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions) -> Graded:
    """Grade generated reports.

    As published, generated reports are cleaned, and a case whose report is missing or empty after that is left out
    silently. In the corrected grading it counts as an empty report.
    """
    texts = {name: clean_report(text) for name, text in predictions.texts.items()}
    said = [texts.get(question.id, "") for question in questions]
    has_text = [bool(text) for text in said]
    measures: dict[str, Measure | str] = {}
    published: Items = {}
    corrected: Items = {}
    for prefix, chosen in (("", has_text), ("corrected_", [True] * len(questions))):
        places = [place for place, is_chosen in enumerate(chosen) if is_chosen]
        if not places:
            measures |= dict.fromkeys((f"{prefix}{name}" for name in benchmark.metrics), "no report was generated")
            continue
        scored = score_reports(
            [questions[place].answer for place in places], [said[place] for place in places], benchmark.metrics
        )
        for name, row in scored.items():
            if isinstance(row, MetricMissing):
                measures[prefix + name] = str(row)
                continue
            measures[prefix + name] = _spread(row.measure, places, len(questions))
            if name == benchmark.metrics[0]:
                items = {questions[place].id: float(row.per_pair[index]) for index, place in enumerate(places)}
                (corrected if prefix else published).update(items)
    for question, text in zip(questions, said, strict=True):
        if not text:
            corrected[question.id] = None
    return Graded(measures, published, corrected)


def _spread(measure: Measure, places: Sequence[int], count: int) -> Measure:
    """Return a measure over some questions as one over all of them."""
    parts = cast(SumMeasure, measure)
    spread = np.zeros((count, parts.parts.shape[1]))
    spread[list(places)] = parts.parts
    return SumMeasure(spread, parts.combine, len(places))


def grade_triggers(benchmark: Benchmark, questions: Sequence[Question], predictions: Predictions) -> Graded:
    """Grade the calls of experts: the right ones, or rightly none; ``corrected`` wants the right argument too."""
    rows = list(judge_all(questions, predictions))
    published: Items = {row.question.id: row.names_right for row in rows}
    corrected: Items = {row.question.id: row.outcome == "right" for row in rows}
    measures: dict[str, Measure | str] = {
        "accuracy": _mean(questions, published),
        "corrected_accuracy": _mean(questions, corrected),
    }
    return Graded(measures, published, corrected)


TABLE: Mapping[str, Callable[[Benchmark, Sequence[Question], Predictions], Graded]] = {
    "exact": grade_matches,
    "pathvqa": grade_matches,
    "diff_vqa": grade_diff_vqa,
    "chestxray14": grade_findings,
    "chexpert": grade_findings,
    "report": grade_reports,
    "choice": grade_matches,
    "trigger": grade_triggers,
}
