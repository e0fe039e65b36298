"""Report metrics against what pycocoevalcap returned (../shared/golden/data_eval/3_report_metrics)."""

import gzip
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score

from vila_m3.benchmarks import report_metrics
from vila_m3.benchmarks.report_metrics import MetricMissing, ReportPairs, Scored, score_reports
from vila_m3.benchmarks.statistics import measure_interval, value_of
from vila_m3.data.cleaning import clean_report

TOLERANCE = 1e-6
COCO = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "meteor", "cider")
RECORDED = {name: name.upper() for name in COCO} | {"cider": "Cider"}


@pytest.fixture(scope="module")
def recorded(shared: Path) -> Path:
    if shutil.which("java") is None:
        pytest.fail("the tests of report metrics need a JRE; apt-get install default-jre-headless")
    return shared / "golden/data_eval/3_report_metrics"


@pytest.fixture(scope="module")
def pairs(recorded: Path) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress((recorded / "pairs.json.gz").read_bytes()))


def scores_of(references: list[str], hypotheses: list[str], names: Any = COCO) -> dict[str, Scored]:
    scored = score_reports(references, hypotheses, names)
    missing = {name: row for name, row in scored.items() if isinstance(row, MetricMissing)}
    assert not missing
    return scored  # type: ignore[return-value]


@pytest.fixture(scope="module")
def raw_scores(pairs: list[dict[str, Any]]) -> dict[str, Scored]:
    return scores_of([row["reference"] for row in pairs], [row["hypothesis"] for row in pairs])


def test_texts_are_tokenized_as_recorded(pairs: list[dict[str, Any]]) -> None:
    texts = ReportPairs([row["reference"] for row in pairs], [row["hypothesis"] for row in pairs]).tokenized
    assert [text for (text,) in texts[0].values()] == [row["tokenized_reference"] for row in pairs]
    assert [text for (text,) in texts[1].values()] == [row["tokenized_hypothesis"] for row in pairs]


@pytest.mark.parametrize("name", COCO)
def test_every_recorded_pair_is_reproduced(
    pairs: list[dict[str, Any]], raw_scores: dict[str, Scored], name: str
) -> None:
    expected = [row["scores"][RECORDED[name]] for row in pairs]
    np.testing.assert_allclose(raw_scores[name].per_pair, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("cleans_reference", "cleans_hypothesis"),
    [
        (False, False),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_the_recorded_corpus_is_reproduced(
    recorded: Path,
    pairs: list[dict[str, Any]],
    raw_scores: dict[str, Scored],
    cleans_reference: bool,
    cleans_hypothesis: bool,
) -> None:
    corpus = json.loads((recorded / "corpus_scores.json").read_text())["corpus"]
    words = {False: "raw", True: "cleaned"}
    start = f"reference_{words[cleans_reference]}__hypothesis_{words[cleans_hypothesis]}"
    (expected,) = [row for name, row in corpus.items() if name.startswith(start)]
    scored = raw_scores
    if cleans_hypothesis:
        references = [clean_report(row["reference"]) if cleans_reference else row["reference"] for row in pairs]
        scored = scores_of(references, [clean_report(row["hypothesis"]) for row in pairs])
    for name in COCO:
        assert value_of(scored[name].measure) == pytest.approx(expected[RECORDED[name]], rel=0, abs=TOLERANCE), name


def test_the_recorded_edge_cases_are_reproduced(recorded: Path) -> None:
    for case in json.loads((recorded / "edge_cases.json").read_text()):
        has_meteor = isinstance(case["METEOR"], dict)
        names = [name for name in COCO if name != "meteor" or has_meteor]
        # pycocoevalcap reads a text up to its first carriage return; ours reads all of it (next test).
        scored = scores_of([text.split("\r")[0] for text in case["references"]], case["hypotheses"], names)
        for order in range(1, 5):
            name = f"bleu_{order}"
            assert value_of(scored[name].measure) == pytest.approx(
                case["BLEU"]["corpus"][order - 1], rel=0, abs=TOLERANCE
            ), case["name"]
            np.testing.assert_allclose(
                scored[name].per_pair, case["BLEU"]["per_pair"][order - 1], rtol=0, atol=TOLERANCE
            )
        for name in names[4:]:
            row = case[RECORDED[name]]
            assert value_of(scored[name].measure) == pytest.approx(row["corpus"], rel=0, abs=TOLERANCE), case["name"]
            np.testing.assert_allclose(scored[name].per_pair, row["per_pair"], rtol=0, atol=TOLERANCE)


def test_an_empty_report_scores_nothing_and_line_breaks_do_not_shift_the_pairs() -> None:
    scored = scores_of(["The heart is normal.", "No effusion."], ["", "No\u2028effusion\x0b."])
    assert all(row.per_pair[0] == pytest.approx(0, abs=1e-6) for row in scored.values())
    assert scored["rouge_l"].per_pair[1] == scored["meteor"].per_pair[1] == 1.0
    assert ReportPairs(["One.\r\nTwo.", "Three."], ["", ""]).tokenized[0] == {0: ["one two"], 1: ["three"]}


@pytest.mark.parametrize("name", ["bleu_4", "rouge_l", "cider", pytest.param("meteor", marks=pytest.mark.slow)])
def test_intervals_hold_the_corpus_values(
    raw_scores: dict[str, Scored], pairs: list[dict[str, Any]], name: str
) -> None:
    low, high = measure_interval(raw_scores[name].measure, [row["uid"] for row in pairs])
    assert low < value_of(raw_scores[name].measure) < high
    assert high - low < (1.5 if name == "cider" else 0.2)


def test_meteor_of_no_pair_is_undefined_and_does_not_wait(raw_scores: dict[str, Scored]) -> None:
    measure = raw_scores["meteor"].measure
    assert np.isnan(measure.evaluate(np.zeros((2, measure.count)))).all()


def test_without_java_the_metrics_are_missing_and_have_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_metrics.shutil, "which", lambda _: None)
    for missing in score_reports(["a"], ["a"], COCO).values():
        assert isinstance(missing, MetricMissing)
        assert "needs Java, which is not on the PATH; install a JRE" in str(missing)


CLINICAL = {"radgraph_f1": "radgraph", "chexbert_f1": "f1chexbert", "green": "green_score", "bertscore": "bert_score"}


@pytest.mark.parametrize("name", CLINICAL)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, CLINICAL[name], None)
    (missing,) = score_reports(["a"], ["b"], [name]).values()
    assert isinstance(missing, MetricMissing)
    assert f"pip install {CLINICAL[name].replace('_', '-')}" in str(missing)


class NoWeights:
    def __init__(self, *_: Any, **__: Any) -> None:
        raise OSError("offline")


@pytest.mark.parametrize("name", CLINICAL)
def test_missing_weights_are_told_and_give_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = dict.fromkeys(("F1RadGraph", "F1CheXbert", "GREEN", "BERTScorer"), NoWeights)
    monkeypatch.setitem(sys.modules, CLINICAL[name], types.SimpleNamespace(**classes))
    (missing,) = score_reports(["a"], ["b"], [name]).values()
    assert isinstance(missing, MetricMissing)
    assert "could not load its weights (OSError: offline)" in str(missing)


# Stand-ins with the signatures of radgraph 0.1.18, f1chexbert 0.0.2, bert-score 0.3.13 and GREEN's release on GitHub.


class RadGraph:
    def __init__(self, reward_level: str, model_type: str | None = None, **_: Any) -> None:
        assert (reward_level, model_type) == ("partial", "radgraph-xl")

    def __call__(self, refs: list[str], hyps: list[str]) -> tuple[float, list[float], list[Any], list[Any]]:
        rewards = [float(ref == hyp) for ref, hyp in zip(refs, hyps, strict=True)]
        return float(np.mean(rewards)), rewards, [], []


class CheXbert:
    def get_label(self, report: str, mode: str = "rrg") -> list[int]:
        return [int(chr(ord("a") + place) in report) for place in range(14)]


class Green:
    def __init__(self, model_name: str, output_dir: str = ".") -> None:
        assert model_name == report_metrics.GREEN_MODEL
        assert Path(output_dir).is_dir()

    def __call__(self, refs: list[str], hyps: list[str]) -> tuple[float, float, list[float | None], str, Any]:
        return 0.5, 0.5, [float(ref == hyp) if hyp else None for ref, hyp in zip(refs, hyps, strict=True)], "", None


class BertScorer:
    def __init__(self, lang: str, rescale_with_baseline: bool) -> None:
        assert lang == "en"

    def score(self, cands: list[str], refs: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        same = np.array([float(one == two) for one, two in zip(cands, refs, strict=True)])
        return same * 0, same * 0, same


def test_adapters_call_their_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "radgraph": {"F1RadGraph": RadGraph},
        "f1chexbert": {"F1CheXbert": CheXbert},
        "green_score": {"GREEN": Green},
        "bert_score": {"BERTScorer": BertScorer},
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(**content))
    references, hypotheses = ["a b", "c", "zz"], ["a", "c", ""]
    scored = scores_of(references, hypotheses, list(CLINICAL))
    for name in ("radgraph_f1", "green", "bertscore"):
        assert scored[name].per_pair.tolist() == [0, 1, 0]
        assert value_of(scored[name].measure) == pytest.approx(1 / 3)
    label = CheXbert().get_label
    expected = f1_score([label(text) for text in references], [label(text) for text in hypotheses], average="micro")
    assert value_of(scored["chexbert_f1"].measure) == pytest.approx(expected)
    assert scored["chexbert_f1"].per_pair == pytest.approx([2 / 3, 1, 1])
