"""Every recorded result through the benchmarks' own files, and the table of odd answers in both gradings."""

import csv
import gzip
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import f1_score, recall_score, roc_auc_score

from vila_m3.benchmarks import answers, graders, published
from vila_m3.benchmarks.definition import Benchmark, Question, load_benchmark, read_questions
from vila_m3.benchmarks.grading import grade, reliability
from vila_m3.benchmarks.predictions import Predictions, read_predictions
from vila_m3.benchmarks.statistics import compare, mean_measure, measure_interval, value_of
from vila_m3.data.sources.finding_labels import read_finding_labels
from vila_m3_common.errors import UserError
from vila_m3_common.patients import is_held_out

BENCHMARKS = "vila_m3_bundle/configs/benchmarks"


@pytest.fixture(scope="module")
def recorded(shared: Path) -> Path:
    return shared / "golden/data_eval/2_graders"


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


# Every recorded result --------------------------------------------------------------------------------------------


def lines_of(path: Path) -> tuple[tuple[Any, str], ...]:
    return tuple((row["question_id"], row["text"]) for row in map(json.loads, path.read_text().splitlines()))


def test_pathvqa_is_graded_as_recorded(repository: Path, recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "pathvqa/qas").mkdir(parents=True)
    packed = (recorded / "pathvqa/test_vqa_fabricated.pkl").read_bytes()
    (tmp_path / "pathvqa/qas/test_vqa.pkl").write_bytes(packed)
    benchmark = load_benchmark("pathvqa", repository / BENCHMARKS)
    questions = read_questions(benchmark, tmp_path)
    result = grade(benchmark, questions, Predictions(lines_of(recorded / "pathvqa/predictions.jsonl")))
    expected = read_json(recorded / "pathvqa/scores.json")
    assert result["accuracy"]["value"] == expected["accuracy"]
    assert result["accuracy"]["count"] == expected["n_yes_no"]


def diff_vqa(recorded: Path) -> tuple[list[Question], tuple[tuple[Any, str], ...]]:
    questions, lines = [], []
    for kind in ("abnormality", "presence", "view", "location", "level", "type"):
        for row in read_json(recorded / f"mimicvqa/ground_truth/{kind}.json"):
            asked, answered = (turn["value"] for turn in row["conversations"][:2])
            form = row["answer_type"].upper()
            questions.append(Question(row["id"], asked, answered, row["image"], row["id"], form, kind))
        lines += lines_of(recorded / f"mimicvqa/predictions/{kind}.jsonl")
    return questions, tuple(lines)


def test_diff_vqa_is_graded_as_recorded_per_type_macro_and_weighted(repository: Path, recorded: Path) -> None:
    questions, lines = diff_vqa(recorded)
    benchmark = load_benchmark("medical_diff_vqa", repository / BENCHMARKS)
    result = grade(benchmark, questions, Predictions(lines))
    expected = read_json(recorded / "mimicvqa/scores.json")["results"]
    for name in ("avg_open", "avg_closed", "wavg_open", "wavg_closed"):
        assert result[name]["value"] == expected[name]
    assert result["wavg_closed"]["count"] == expected["total_closed"]
    for kind in ("abnormality", "view", "location"):
        assert result[f"open_{kind}"]["value"] == expected[kind]["open"]
        assert result[f"closed_{kind}"]["value"] == expected[kind]["closed"]
    graded = graders.grade_diff_vqa(benchmark, questions, Predictions(lines))
    for name in ("avg_open", "wavg_closed"):
        measure = graded.measures[name]
        assert not isinstance(measure, str)
        assert value_of(measure) == pytest.approx(expected[name], abs=1e-12)
    assert set(graded.published) == {question.id for question in questions}


def test_diff_vqa_says_that_the_reference_needs_every_answer(repository: Path, recorded: Path) -> None:
    questions, lines = diff_vqa(recorded)
    kept = tuple(line for line in lines if line[0] != "level-00")
    result = grade(load_benchmark("medical_diff_vqa", repository / BENCHMARKS), questions, Predictions(kept))
    assert result["wavg_closed"]["value"] is None
    assert any("KeyError, because 'level-00' has no answer" in note for note in result["notes"])
    assert result["corrected_accuracy"]["value"] is not None


class Films:
    """ChestX-ray14 or CheXpert: real labels read by the benchmark's file, and the recorded answers."""

    def __init__(self, name: str, repository: Path, shared: Path, folder: Path) -> None:
        labels = shared / "data/labels"
        (folder / name).mkdir()
        if name == "chestxray14":
            text = gzip.decompress((labels / "chestxray14_adjudicated.csv.gz").read_bytes())
            (folder / name / "test_labels.csv").write_bytes(text)
        else:
            (folder / name / "groundtruth.csv").write_bytes((labels / "chexpert_test_groundtruth.csv").read_bytes())
        self.benchmark = load_benchmark(name, repository / BENCHMARKS)
        self.questions = read_questions(self.benchmark, folder)
        self.scores = read_json(shared / f"golden/data_eval/2_graders/{name}/scores.json")
        prefix = "test_vila_chexpert_" if name == "chexpert" else "test_vila_"
        self.rows, self.texts = {}, {}
        for finding in self.benchmark.options["findings"]:
            stem = f"{prefix}{finding.lower().replace(' ', '_')}.csv.gz"
            packed = (shared / f"golden/data_eval/2_graders/{name}/predictions" / stem).read_bytes()
            rows = list(csv.reader(io.StringIO(gzip.decompress(packed).decode())))
            self.rows[finding] = rows
            self.texts[finding] = [row[2] for row in rows]

    @property
    def predictions(self) -> Predictions:
        """The recorded answers stand in the order of the label file, as the questions do."""
        lines: list[tuple[Any, str]] = []
        for finding, texts in self.texts.items():
            asked = [question.id for question in self.questions if question.finding == finding]
            lines += zip(asked, texts, strict=True)
        return Predictions(tuple(lines))

    def grade(self) -> graders.Graded:
        return graders.grade_findings(self.benchmark, self.questions, self.predictions)

    def expect(self, exact: dict[str, float], expected: dict[str, Any]) -> None:
        assert exact["f1"] == expected["f1"]
        for finding, value in expected["per_class_f1"].items():
            assert exact[f"f1_{finding.lower()}"] == value


def value(graded: graders.Graded, name: str) -> float:
    measure = graded.measures[name]
    assert not isinstance(measure, str), measure
    return value_of(measure)


@pytest.fixture(params=["chestxray14", "chexpert"])
def films(request: pytest.FixtureRequest, repository: Path, shared: Path, tmp_path: Path) -> Films:
    return Films(request.param, repository, shared, tmp_path)


def test_films_are_graded_as_recorded(films: Films) -> None:
    result = grade(films.benchmark, films.questions, films.predictions)
    values = {name: row["value"] for name, row in result.items() if name.startswith("f1")}
    films.expect(values, films.scores["main"])
    low, high = result["f1"]["interval"]
    assert low < values["f1"] < high
    positives = {name.lower(): count for name, count in films.scores["positives"].items()}
    for finding in films.texts:
        count = sum(question.answer == "yes" for question in films.questions if question.finding == finding)
        assert count == positives[finding.lower().replace(" ", "_")]


@pytest.mark.parametrize("variant", ["one_sentence", "one_empty", "one_unknown_word", "all_no", "all_yes", "plain"])
def test_recorded_variants_are_graded_as_recorded(films: Films, variant: str) -> None:
    expected = films.scores["variants"][variant]
    first, second, third = list(films.texts)[0], list(films.texts)[1], list(films.texts)[-1]
    if films.benchmark.name == "chexpert":
        third = "Edema"
    if variant == "one_sentence":
        films.texts[first][0] = "There is evidence of effusion"
    elif variant == "one_empty":
        films.texts[second][5] = ""
    elif variant == "one_unknown_word":
        films.texts[third][2] = "unsure"
    elif variant == "plain":
        grader: Any = films.benchmark.grader
        for texts in films.texts.values():
            texts[:] = ["yes" if published.read_finding(text, grader) == 1 else "no" for text in texts]
    else:
        for texts in films.texts.values():
            texts[:] = [variant.removeprefix("all_")] * len(texts)
    graded = films.grade()
    if "error" in expected:
        reason = "debugger" if "Bdb" in expected["error"] else expected["error"].removeprefix("ValueError: ")
        assert reason in str(graded.measures["f1"])
        assert value(graded, "corrected_f1") > 0
    else:
        films.expect(graded.exact, expected)
        # The sums behind the intervals give the same value.
        assert value(graded, "f1") == pytest.approx(expected["f1"], abs=1e-12)


def test_a_label_file_without_its_last_column_is_read_one_off_as_recorded(
    repository: Path, shared: Path, tmp_path: Path
) -> None:
    films = Films("chestxray14", repository, shared, tmp_path)
    expected = films.scores["variants"]["set_id_column_removed"]
    values = {}
    for finding, rows in films.rows.items():
        truths = [published.read_truth(row[:-1], finding.lower(), "chestxray14") for row in rows]
        values[finding.lower().replace(" ", "_")] = published.finding_f1(truths, films.texts[finding], "chestxray14")
    assert values == expected["per_class_f1"]
    assert sum(values.values()) / 3 == expected["f1"]


def test_scores_of_findings_are_scikit_learns(films: Films) -> None:
    graded = films.grade()
    for finding, texts in films.texts.items():
        truths = [question.answer == "yes" for question in films.questions if question.finding == finding]
        read = [answers.parse_finding(text, finding) for text in texts]
        # What cannot be read is wrong, whatever the truth.
        said = [one == "yes" if one else not truth for one, truth in zip(read, truths, strict=True)]
        key = finding.lower().replace(" ", "_")
        assert value(graded, f"corrected_f1_{key}") == pytest.approx(f1_score(truths, said), abs=1e-12)
        assert value(graded, f"corrected_sensitivity_{key}") == pytest.approx(recall_score(truths, said), abs=1e-12)
        specificity = recall_score(truths, said, pos_label=False)
        assert value(graded, f"corrected_specificity_{key}") == pytest.approx(specificity, abs=1e-12)


def test_the_auroc_is_scikit_learns_and_needs_confidences() -> None:
    random = np.random.default_rng(0)
    truths, sure = random.integers(0, 2, 60), random.uniform(0.5, 1, 60)
    said = random.integers(0, 2, 60)
    benchmark = Benchmark("toy", "", "", "", "", "chestxray14", "", prompt="binary", metrics=("f1",))
    questions = [
        Question(str(n), "", "yes" if truth else "no", "", str(n), "CLOSED", "", "Mass", ("Mass",))
        for n, truth in enumerate(truths)
    ]
    lines = tuple((str(n), "yes" if is_yes else "no") for n, is_yes in enumerate(said))
    confidences = {str(n): float(probability) for n, probability in enumerate(sure)}
    result = grade(benchmark, questions, Predictions(lines, (), confidences))
    assert result["auroc"]["value"] == pytest.approx(roc_auc_score(truths, np.where(said, sure, 1 - sure)))
    bare = grade(benchmark, questions, Predictions(lines))
    assert bare["auroc"]["value"] is None
    assert any("auroc: needs the model's confidence" in note for note in bare["notes"])


def test_multiple_choice_is_graded_by_letters(repository: Path) -> None:
    benchmark = load_benchmark("chestxray14_multi_choice", repository / BENCHMARKS)
    names = ("Fracture", "Pneumothorax", "Lung Opacity")
    truths = ["(A),(C)", "(D)", "(B)", "(D)"]
    questions = [Question(str(n), "", truth, "", str(n), "CLOSED", findings=names) for n, truth in enumerate(truths)]
    said = Predictions((("0", "(A) fracture, (C) lung opacity"), ("1", "None of the above"), ("2", "(A)"), ("3", "?")))
    result = grade(benchmark, questions, said)
    assert result["corrected_accuracy"]["value"] == 0.5
    assert result["unparsable"] == 1
    assert result["f1"]["value"] is None
    assert any("does not grade multiple choice" in note for note in result["notes"])


def test_reports_are_read_from_the_release(repository: Path, tmp_path: Path) -> None:
    release = tmp_path / "mimic_cxr"
    files = {
        "mimic-cxr-2.0.0-split.csv": "dicom_id,study_id,subject_id,split\nd,5,10000001,test\ne,6,10000001,train\n",
        "mimic-cxr-2.0.0-metadata.csv": "dicom_id,ViewPosition\nd,PA\ne,PA\n",
        "files/p10/p10000001/s5.txt": "FINDINGS: The heart is large.\n",
    }
    for name, text in files.items():
        (release / name).parent.mkdir(parents=True, exist_ok=True)
        (release / name).write_text(text)
    [question] = read_questions(load_benchmark("mimic_report_raw", repository / BENCHMARKS), tmp_path)
    assert "The heart is large." in question.answer
    assert (question.image, question.group) == ("files/p10/p10000001/s5/d.jpg", "p10000001")

    (release / "files/p10/p10000001/s5.txt").unlink()
    with pytest.raises(UserError, match="row 1 of mimic-cxr-2.0.0-split.csv cannot be used: report .* cannot be read"):
        read_questions(load_benchmark("mimic_report_raw", repository / BENCHMARKS), tmp_path)


def test_reports_are_graded_in_both_gradings(repository: Path) -> None:
    shipped = load_benchmark("mimic_report_clean", repository / BENCHMARKS)
    benchmark = replace(shipped, metrics=("bleu_4", "rouge_l", "green"))  # METEOR takes half a minute to start
    questions = [
        Question(str(n), "Describe it.", text, "", f"p{n}", "OPEN")
        for n, text in enumerate(["The heart is normal in size.", "No pneumothorax is seen.", "Clear lungs today."])
    ]
    said = Predictions((("0", "FINDINGS: The heart is normal in size."), ("1", "Ok."), ("2", "Clear lungs.")))
    result = grade(benchmark, questions, said)
    assert result["bleu_4"]["count"] == 2  # "Ok." is empty once cleaned, and is left out as published
    assert result["corrected_bleu_4"]["count"] == 3
    assert result["corrected_rouge_l"]["value"] == pytest.approx(result["rouge_l"]["value"] * 2 / 3)
    assert result["unparsable"] == 1
    assert result["green"]["value"] is None
    assert any(note.startswith("green") and "pip install green-score" in note for note in result["notes"])


# Odd answers ------------------------------------------------------------------------------------------------------

LETTERS = "a letter answers no question for yes or no"
INSIDE = "the published parser finds 'no' or 'yes' inside a word"
WORD = "the published parser takes the first a, b, c or d of a word for an option"
FALL_BACK = "the published parser takes what it cannot read for a no"
# Where the corrected reading of a yes/no question differs from the published one, and why.
DIFFERENT: dict[str, dict[str, str | None]] = {
    "nothing was said": dict.fromkeys(["", "   ", ".", "()"]),
    LETTERS: dict.fromkeys(
        [*"x1abcdef", "A", "B", "(A)", "(B)", "(C)", "(D)", "(E)", "(F)", "(x)", "( b )", "(a", "e)", "(A), (B)"]
        + ["(A) (C)", "A. B", "answer: (C)", "A: B", "(B) Cardiomegaly", "(E) Pleural effusion", "B) Pneumothorax"]
    ),
    INSIDE: {
        "Diagnosis: yes": "yes",
        "abnormal": "yes",
        "Abnormal findings: yes": "yes",
        "cannot exclude. yes": "yes",
        "cannot exclude, yes": "yes",
        "unknown": None,
        "nodule": None,
        "noyes": None,
        "eyes": None,
    },
    "a remark in brackets is not the answer": {"(no finding) yes": "yes"},
    WORD: {
        "There is evidence of effusion": "yes",
        "edema": None,
        "cardiomegaly": None,
        "pneumothorax": None,
        "fracture": None,
        "pleural effusion": None,
        "Lung opacity": None,
        "The patient has cardiomegaly.": None,
        "The heart is (mildly) enlarged": None,
    },
    "a call of an expert is no answer": dict.fromkeys(["<CXR()>", "I should trigger <CXR()>."]),
    FALL_BACK: {
        "unsure": None,
        "I think so": "yes",
        "effusion": None,
        "The right lung": None,
        "true": "yes",
        "positive": "yes",
        "Да": None,
        "y": "yes",
    },
}
# Texts that name options of (A) Fracture (B) Pneumothorax (C) Lung Opacity (D) None of the Above; all others name none.
CHOSEN = {
    "a": "A", "b": "B", "c": "C", "d": "D", "A": "A", "B": "B", "(A)": "A", "(B)": "B", "(C)": "C", "(D)": "D",
    "( b )": "B", "(a": "A", "(A), (B)": "AB", "(A) (C)": "AC", "A. B": "AB", "answer: (C)": "C", "A: B": "B",
    "(B) Cardiomegaly": "B", "B) Pneumothorax": "B", "(D) None of the Above": "D", "(F) None of the Above": "D",
    "None of the above": "D", "None": "D", "pneumothorax": "B", "fracture": "A", "Lung opacity": "C",
}  # fmt: skip


def test_all_recorded_odd_answers_are_right_in_the_corrected_grading(recorded: Path) -> None:
    rows = read_json(recorded / "extract_answer_table.json")["rows"]
    different = {text: reading for table in DIFFERENT.values() for text, reading in table.items()}
    assert len(rows) == 96
    assert set(different) | set(CHOSEN) <= {row["text"] for row in rows}
    for row in rows:
        text, as_published = row["text"], {0: "no", 1: "yes"}.get(row["chestxray14_fallback_0"])
        assert answers.parse_yes_no(text) == different.get(text, as_published), text
        # A text stands in the table of differences only if it differs.
        assert text not in different or different[text] != as_published or as_published is None, text
        letters = answers.parse_letters(text, ["Fracture", "Pneumothorax", "Lung Opacity", "None of the Above"])
        assert "".join(letters or ()) == CHOSEN.get(text, ""), text


def test_a_call_of_an_expert_is_right_where_it_is_the_true_answer() -> None:
    truth = "I segmented the liver using <VISTA3D(organs)>."
    assert answers.is_right(truth, truth) is True
    assert answers.is_right(truth, "I segmented the liver using <VISTA3D(skeleton)>.") is None
    assert answers.is_right("yes", "<CXR()>") is None


@pytest.mark.parametrize(
    ("text", "finding", "read"),
    [
        ("(B) Cardiomegaly", "Cardiomegaly", "yes"), ("(B) Cardiomegaly", "Edema", None),
        ("The patient has cardiomegaly.", "Cardiomegaly", "yes"), ("pleural effusion", "Effusion", "yes"),
        ("There is evidence of effusion", "Pleural effusion", "yes"), ("There is evidence of effusion", "Edema", None),
        ("There is no evidence of effusion", "Pleural effusion", "no"), ("There is no evidence of edema", "Mass", None),
        ("Diagnosis: no", "Edema", "no"), ("abnormal", "Edema", "yes"), ("Effusion: yes", "Edema", "yes"),
        ("No.", "Edema", "no"), ("Airspace opacity", "Lung Opacity", "yes"), ("I cannot answer this.", "Edema", None),
    ],
)  # fmt: skip
def test_an_answer_is_read_for_the_finding_that_was_asked(text: str, finding: str, read: str | None) -> None:
    assert answers.parse_finding(text, finding) == read


# Labels -----------------------------------------------------------------------------------------------------------


def test_held_out_patients_are_those_that_the_chest_x_ray_expert_was_not_trained_on(shared: Path) -> None:
    from cxr_expert.data import read_labels_csv, split_by_patient

    folder = shared / "data/cxr/nih_256"
    parts = split_by_patient(read_labels_csv(folder, folder / "labels.csv"), 0.2)
    assert {item["patient"] for item in parts["validation"]} == {
        item["patient"] for part in parts.values() for item in part if is_held_out(item["patient"], 0.2)
    }


def test_label_files_are_refused_with_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text("Image Index,Patient,Mass\na.png,x,YES\n")
    with pytest.raises(UserError, match="lacks the columns Patient ID; did you mean 'Patient'"):
        list(read_finding_labels(tmp_path, "test", "l.csv", {"Mass": "Mass"}))
    items = list(
        read_finding_labels(tmp_path, "test", "l.csv", {"Mass": "Mass"}, patient="Patient", patient_pattern=r"\d+")
    )
    assert "holds no patient" in items[0].reason  # type: ignore[union-attr]


# Intervals and notes ----------------------------------------------------------------------------------------------


def test_two_runs_differ_with_an_interval_and_a_p_value() -> None:
    ids = [str(n) for n in range(80)]
    worse, better = [0.0] * 50 + [1.0] * 30, [0.0] * 20 + [1.0] * 60
    found = compare(mean_measure(worse), mean_measure(better), ids)
    assert found.difference == pytest.approx(30 / 80)
    assert 0 < found.interval[0] < 30 / 80 < found.interval[1]
    assert found.p_value < 0.001
    same = compare(mean_measure(worse), mean_measure(worse), ids)
    assert (same.difference, same.p_value, same.interval) == (0, 1, (0, 0))


def test_one_patient_with_all_the_difference_is_no_evidence() -> None:
    worse, better = [0.0] * 40, [1.0] * 40
    assert compare(mean_measure(worse), mean_measure(better), ["p"] * 40).p_value > 0.9


def test_only_counted_questions_enter_a_mean() -> None:
    measure = mean_measure([1.0, 0.0, 1.0], [True, True, False])
    assert (value_of(measure), measure.count) == (0.5, 2)
    low, high = measure_interval(measure, ["a", "b", "c"])
    assert 0 <= low < high <= 1


def test_confidences_are_compared_with_being_right() -> None:
    curve = reliability({"a": 0.95, "b": 0.85, "c": 0.05}, {"a": True, "b": False, "c": False})
    assert [row["count"] for row in curve["bins"]] == [1, 1, 1]
    assert curve["expected_calibration_error"] == pytest.approx((0.05 + 0.85 + 0.05) / 3)
    assert reliability({}, {"a": True}) == {}


def test_nan_confidences_are_counted_and_ignored(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [
        f'{{"question_id": "{n}", "text": "yes", "confidence": {value}}}' for n, value in enumerate(["NaN", 2, 0.5])
    ]
    path.write_text("\n".join(rows))
    read = read_predictions(path, ["0", "1", "2"])
    assert read.confidences == {"2": 0.5}
    assert any("2 confidences are no probability" in note for note in read.notes)


def test_a_file_that_includes_another_holds_only_what_differs(repository: Path) -> None:
    told = load_benchmark("chexpert_expert_binary_conv", repository / BENCHMARKS)
    assert (told.prompt, told.expert, told.grader) == ("binary_conv", "expert_findings/chexpert", "chexpert")
    assert told.options["file"] == "groundtruth.csv"
    assert load_benchmark("chexpert_expert", repository / BENCHMARKS).published_scores()["VILA-M3 3B"] == {"f1": 60.8}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("include: nihh\n", "unknown benchmark 'nihh'; did you mean 'nih'"),
        ("include: toy\n", "includes itself"),
        ("include: nih\nprompt: binari\n", "unknown prompt 'binari'; did you mean 'binary'"),
        (
            "include: nih\nprompt: text_only\n",
            "prompt text_only tells an expert's findings; give their folder as expert",
        ),
        ("include: nih\ngrader: report\nmetrics: [bleu_5]\n", "unknown metric 'bleu_5'; did you mean 'bleu_"),
        ("include: nih\nmetrics: []\n", "metrics must be a list of names, the headline first"),
        ("include: nih\nmetric: [f1]\n", "unknown key 'metric'; did you mean 'metrics'"),
    ],
)
def test_faults_of_a_file_are_refused(repository: Path, tmp_path: Path, change: str, message: str) -> None:
    (tmp_path / "nih.yaml").write_text((repository / BENCHMARKS / "nih.yaml").read_text())
    (tmp_path / "toy.yaml").write_text(change)
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        load_benchmark("toy", tmp_path)


def test_every_grader_has_a_function(repository: Path) -> None:
    from vila_m3.benchmarks.definition import GRADERS, list_benchmarks

    assert set(GRADERS) == set(graders.TABLE)
    for name in list_benchmarks(repository / BENCHMARKS):
        assert load_benchmark(name, repository / BENCHMARKS).counts
