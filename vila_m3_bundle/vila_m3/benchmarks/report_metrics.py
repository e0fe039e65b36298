"""Metrics of generated reports, each through the package that defined it.

BLEU-1..4, ROUGE-L, METEOR and CIDEr are pycocoevalcap's, on texts that its PTB tokenizer has cut; tokenizer and METEOR
are Java programs inside that package, so without Java none of them is computed. RadGraph-F1, CheXbert-F1, GREEN and
BERTScore need packages and weights of their own. A metric that cannot be computed here says why
(:class:`MetricMissing`) and gets no number. No word list of ours stands in for a clinical metric.
"""

from __future__ import annotations

import importlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from sklearn.metrics import multilabel_confusion_matrix

from .statistics import Measure, SumMeasure, divide, mean_measure


class MetricMissing(RuntimeError):
    """A metric cannot be computed here; the message says what it needs."""


@dataclass(frozen=True)
class Scored:
    """A metric of pairs of reports.

    Args:
        per_pair: ``(pairs,)``.
        measure: the value over all pairs, which need not be the mean (BLEU, METEOR and F1 are not).
    """

    per_pair: np.ndarray
    measure: Measure


class ReportPairs:
    """References and hypotheses, tokenized when a metric first needs it.

    Args:
        references: the true reports.
        hypotheses: the generated ones, in the same order; an empty one scores 0.
    """

    def __init__(self, references: Sequence[str], hypotheses: Sequence[str]) -> None:
        if len(references) != len(hypotheses) or not references:
            raise ValueError(f"{len(references)} references and {len(hypotheses)} hypotheses are no pairs")
        self.references, self.hypotheses = list(references), list(hypotheses)

    @cached_property
    def tokenized(self) -> tuple[dict[int, list[str]], dict[int, list[str]]]:
        """References and hypotheses as pycocoevalcap takes them, number -> [text].

        Raises:
            MetricMissing: without Java or pycocoevalcap.
        """
        check_java("the PTB tokenizer")
        module = load_module("pycocoevalcap.tokenizer.ptbtokenizer", "pycocoevalcap")
        count = len(self.references)
        # One line each: pycocoevalcap lets a carriage return make two texts of one, and shifts all later pairs.
        lines = [" ".join(text.split()) for text in (*self.references, *self.hypotheses)]
        try:
            cut = module.PTBTokenizer().tokenize({number: [{"caption": line}] for number, line in enumerate(lines)})
        except OSError as error:
            raise MetricMissing(f"the PTB tokenizer cannot write into pycocoevalcap's folder ({error})") from error
        if len(cut) != len(lines):
            raise MetricMissing(f"the PTB tokenizer returned {len(cut)} of {len(lines)} texts; see its message above")
        return {n: cut[n] for n in range(count)}, {n: cut[n + count] for n in range(count)}


def check_java(what: str) -> None:
    """Make sure that Java is there.

    Raises:
        MetricMissing: if it is not.
    """
    if shutil.which("java") is None:
        raise MetricMissing(f"{what} needs Java, which is not on the PATH; install a JRE (Java 8 or newer)")


def load_module(module: str, package: str) -> Any:
    """Import a module of an optional package.

    Raises:
        MetricMissing: if it is not installed, or fails while it is imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MetricMissing(f"the package {package} cannot be imported ({error}); pip install {package}") from error


def load_scorer(package: str, make: Callable[[], Any]) -> Any:
    """Build a scorer that reads weights.

    Raises:
        MetricMissing: for whatever its constructor raises; without weights that is a different error in each package.
    """
    try:
        return make()
    except Exception as error:
        raise MetricMissing(
            f"{package} could not load its weights ({type(error).__name__}: {error}); it downloads them from the "
            "Hugging Face Hub, so run it once with a connection, or fill its cache"
        ) from error


# pycocoevalcap ----------------------------------------------------------------------------------------------------

# The constants with which pycocoevalcap keeps BLEU from dividing by zero.
_TINY, _SMALL = 1e-15, 1e-9


def bleu(pairs: ReportPairs, order: int) -> Scored:
    """Return BLEU up to n-grams of ``order``, the corpus value from counts over all pairs."""
    references, hypotheses = pairs.tokenized
    scorer = load_module("pycocoevalcap.bleu.bleu_scorer", "pycocoevalcap").BleuScorer(n=4)
    for number, reference in references.items():
        scorer += (hypotheses[number][0], reference)
    _, per_pair = scorer.compute_score(option="closest", verbose=0)
    parts = [[*row["correct"], *row["guess"], row["testlen"], row["reflen"][0]] for row in scorer.ctest]
    measure = SumMeasure(np.array(parts, dtype=float), lambda sums: _corpus_bleu(sums, order), len(parts))
    return Scored(np.array(per_pair[order - 1]), measure)


def _corpus_bleu(sums: np.ndarray, order: int) -> np.ndarray:
    """Combine ``(R, 10)`` sums (4 correct, 4 guessed, length, reference's length), as ``BleuScorer`` does."""
    correct, guessed, length, wanted = sums[:, :order], sums[:, 4 : 4 + order], sums[:, 8], sums[:, 9]
    precision = ((correct + _TINY) / (guessed + _SMALL)).prod(1) ** (1 / order)
    ratio = (length + _TINY) / (wanted + _SMALL)
    return np.where(ratio < 1, precision * np.exp(1 - 1 / np.minimum(ratio, 1)), precision)


def rouge_l(pairs: ReportPairs) -> Scored:
    """Return ROUGE-L (F with beta 1.2), the mean over pairs."""
    scorer = load_module("pycocoevalcap.rouge.rouge", "pycocoevalcap").Rouge()
    return _mean_of(scorer.compute_score(*pairs.tokenized)[1])


def cider(pairs: ReportPairs) -> Scored:
    """Return CIDEr, the mean over pairs; document frequencies are those of all references, also in the bootstrap."""
    scorer = load_module("pycocoevalcap.cider.cider", "pycocoevalcap").Cider()
    return _mean_of(scorer.compute_score(*pairs.tokenized)[1])


def meteor(pairs: ReportPairs) -> Scored:
    """Return METEOR 1.5 (English, normalised), the corpus value from statistics summed over all pairs."""
    check_java("METEOR")
    references, hypotheses = pairs.tokenized
    program = start_meteor()
    lines = [program.count(references[number][0], hypotheses[number][0]) for number in references]
    counts = np.array([[float(value) for value in line.split()] for line in lines])
    is_said = np.array([bool(hypotheses[number][0].strip()) for number in references])
    per_pair = np.where(is_said, program.score(counts), 0.0)
    # The one chunk of a pair that matches word for word is no fragmentation; METEOR leaves it out of a corpus's sum.
    lengths, chunks, matches = slice(0, 2), 20, slice(21, 23)
    is_whole = (counts[:, lengths] == counts[:, matches]).all(1) & (counts[:, chunks] == 1)
    parts = counts.copy()
    parts[is_whole, chunks] = 0
    return Scored(per_pair, SumMeasure(parts, program.score, len(parts)))


@cache
def start_meteor() -> MeteorProgram:
    """Return the process's METEOR; it reads 60 MB of paraphrases when it starts."""
    return MeteorProgram()


class MeteorProgram:
    """pycocoevalcap's running METEOR.

    Its statistics of a pair are counts, so those of a corpus are their sum, and one ``EVAL`` of a summed line gives
    the corpus value.

    Raises:
        MetricMissing: if it cannot be started or does not answer.
    """

    def __init__(self) -> None:
        module = load_module("pycocoevalcap.meteor.meteor", "pycocoevalcap")
        try:
            self._meteor = module.Meteor()
        except OSError as error:
            raise MetricMissing(f"METEOR cannot be started ({error}); install a JRE") from error

    def count(self, reference: str, hypothesis: str) -> str:
        """Return the statistics of a pair, numbers with blanks between.

        Raises:
            MetricMissing: if the program has ended; its reason is in the message.
        """
        try:
            line = str(self._meteor._stat(hypothesis, [reference]))
        except OSError:
            line = ""
        if not line:
            raise MetricMissing(f"METEOR ended without an answer: {self._last_words()}")
        return line

    def score(self, statistics: np.ndarray) -> np.ndarray:
        """Return the score of each row of statistics, ``(R, 23)`` to ``(R,)``; NaN where no pair counts.

        The program never answers a row of zeros, so that those are not sent.
        """
        is_counted = statistics.any(1)
        scores = np.full(len(statistics), np.nan)
        if is_counted.any():
            scores[is_counted] = self._evaluate(statistics[is_counted])
        return scores

    def _evaluate(self, statistics: np.ndarray) -> np.ndarray:
        rows = " ||| ".join(" ".join(repr(float(value)) for value in row) for row in statistics)
        process = self._meteor.meteor_p
        process.stdin.write(f"EVAL ||| {rows}\n".encode())
        process.stdin.flush()
        scores = [process.stdout.readline() for _ in range(len(statistics) + 1)]
        if not scores[-1]:
            raise MetricMissing(f"METEOR ended without an answer: {self._last_words()}")
        return np.nan_to_num(np.array([float(line) for line in scores[:-1]]))

    def _last_words(self) -> str:
        start_meteor.cache_clear()
        self._meteor.meteor_p.kill()
        return " ".join(self._meteor.meteor_p.stderr.read().decode(errors="replace").split())[:500] or "no message"


def _mean_of(values: Sequence[float]) -> Scored:
    return Scored(np.asarray(values, dtype=float), mean_measure(values))


# Packages with weights --------------------------------------------------------------------------------------------


def radgraph_f1(pairs: ReportPairs) -> Scored:
    """Return RadGraph-F1 (``radgraph``, model radgraph-xl, reward level "partial"), the mean over pairs."""
    module = load_module("radgraph", "radgraph")
    scorer = load_scorer("radgraph", lambda: module.F1RadGraph(reward_level="partial", model_type="radgraph-xl"))
    _, rewards, _, _ = scorer(refs=pairs.references, hyps=pairs.hypotheses)
    return _mean_of(rewards)


def chexbert_f1(pairs: ReportPairs) -> Scored:
    """Return CheXbert's micro F1 over its 14 labels, uncertain counted as present; per pair over that pair's labels.

    Only the package's labeller is asked: its own summary does not run with newer releases of scikit-learn.
    """
    module = load_module("f1chexbert", "f1chexbert")
    scorer = load_scorer("f1chexbert", module.F1CheXbert)
    said = np.array([scorer.get_label(text) for text in pairs.hypotheses])
    true = np.array([scorer.get_label(text) for text in pairs.references])
    counts = multilabel_confusion_matrix(true, said, samplewise=True)
    parts = np.stack([counts[:, 1, 1], counts[:, 0, 1], counts[:, 1, 0]], axis=1).astype(float)
    per_pair = np.nan_to_num(f1_of_sums(parts), nan=1.0)
    return Scored(per_pair, SumMeasure(parts, f1_of_sums, len(parts)))


def f1_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return F1 from ``(R, 3)`` sums of true positives, false positives and false negatives."""
    return divide(2 * sums[:, 0], 2 * sums[:, 0] + sums[:, 1] + sums[:, 2])


GREEN_MODEL = "StanfordAIMI/GREEN-radllama2-7b"


def green(pairs: ReportPairs) -> Scored:
    """Return GREEN (``green_score``), the mean over pairs; a judgement that it cannot read counts 0, as published."""
    module = load_module("green_score", "green-score")
    with tempfile.TemporaryDirectory() as folder:
        scorer = load_scorer("green_score", lambda: module.GREEN(GREEN_MODEL, output_dir=folder))
        values = scorer(pairs.references, pairs.hypotheses)[2]
    return _mean_of([0.0 if value is None else float(value) for value in values])


def bertscore(pairs: ReportPairs) -> Scored:
    """Return BERTScore's F1 (``bert_score``, English default model, rescaled by its baseline), the mean over pairs."""
    module = load_module("bert_score", "bert-score")
    scorer = load_scorer("bert_score", lambda: module.BERTScorer(lang="en", rescale_with_baseline=True))
    return _mean_of([float(value) for value in scorer.score(pairs.hypotheses, pairs.references)[2]])


METRICS: Mapping[str, Callable[[ReportPairs], Scored]] = {
    "bleu_1": lambda pairs: bleu(pairs, 1),
    "bleu_2": lambda pairs: bleu(pairs, 2),
    "bleu_3": lambda pairs: bleu(pairs, 3),
    "bleu_4": lambda pairs: bleu(pairs, 4),
    "rouge_l": rouge_l,
    "meteor": meteor,
    "cider": cider,
    "radgraph_f1": radgraph_f1,
    "chexbert_f1": chexbert_f1,
    "green": green,
    "bertscore": bertscore,
}


def score_reports(
    references: Sequence[str], hypotheses: Sequence[str], metrics: Sequence[str]
) -> dict[str, Scored | MetricMissing]:
    """Return each named metric of pairs of reports, or why it is missing."""
    pairs = ReportPairs(references, hypotheses)
    scored: dict[str, Scored | MetricMissing] = {}
    for name in metrics:
        try:
            scored[name] = METRICS[name](pairs)
        except MetricMissing as missing:
            scored[name] = missing
    return scored
