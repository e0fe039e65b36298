"""Questions for findings in a label file: in the forms of benchmarks, with an expert's findings, balanced."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from vila_m3.benchmarks.asking import ask_record
from vila_m3.benchmarks.definition import Benchmark, Question
from vila_m3.data.record import Record
from vila_m3.data.source import Located, Rejected
from vila_m3.data.sources.finding_labels import limit_negatives, read_finding_labels
from vila_m3_common.errors import UserError

FINDINGS = {"Effusion": "Effusion", "Mass": "Mass"}
FILMS = {"a.png": "Effusion", "b.png": "No Finding", "c.png": "No Finding", "d.png": "Mass|Effusion", "e.png": "Edema"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [f"{name},{labels},{number}" for number, (name, labels) in enumerate(FILMS.items())]
    (tmp_path / "labels.csv").write_text("\n".join(["Image Index,Finding Labels,Patient ID", *lines]) + "\n")
    (tmp_path / "found").mkdir()
    for name in FILMS:
        (tmp_path / "found" / f"{name}.json").write_text(json.dumps({"Effusion": 0.8, "Mass": 0.3}))
    return tmp_path


def read(folder: Path, **options: Any) -> list[Record]:
    items = read_finding_labels(folder, "train", "labels.csv", FINDINGS, listed="Finding Labels", **options)
    return [item.record for item in items if isinstance(item, Located)]


@pytest.mark.parametrize("prompt", ["binary", "binary_conv", "text_only"])
def test_training_asks_as_the_benchmark_does(folder: Path, prompt: str) -> None:
    records = read(folder, prompt=prompt, expert=folder / "found", cards="CARDS")
    assert len(records) == 10
    for record in records:
        told = record.metadata
        question = Question(
            record.id, "", "", record.images[0] if record.images else "a.png", "", "CLOSED",
            finding=told["finding"], findings=tuple(told["findings"]),
        )  # fmt: skip
        benchmark = Benchmark("b", "", "", "", "", "chestxray14", "", prompt=prompt, expert="found")
        asked = ask_record(benchmark, question, folder, "CARDS")
        assert record.messages[:-1] == asked.messages
        assert record.images == asked.images
        assert "effusion: yes" in record.messages[-2].text
        assert record.messages[-1].text in ("yes", "no")


def test_of_several_forms_one_is_drawn_for_each_question(folder: Path) -> None:
    forms = ["binary", "binary_conv", "text_only"]
    records = [record for seed in range(5) for record in read(folder, prompt=forms, expert=folder / "found", seed=seed)]
    assert set(Counter((len(record.messages), len(record.images)) for record in records)) == {(2, 1), (4, 1), (2, 0)}
    assert read(folder, prompt=forms, expert=folder / "found") == read(folder, prompt=forms, expert=folder / "found")


def test_an_image_without_saved_findings_costs_its_own_questions_only(folder: Path) -> None:
    (folder / "found/b.png.json").unlink()
    options = {"listed": "Finding Labels", "prompt": "binary", "expert": folder / "found"}
    items = list(read_finding_labels(folder, "train", "labels.csv", FINDINGS, **options))
    rejected = [item for item in items if isinstance(item, Rejected)]
    assert [item.row for item in rejected] == [2, 2]
    assert "b.png.json cannot be read" in rejected[0].reason
    assert len(items) == 10


@pytest.mark.parametrize("prompt", ["binary_conv", ["binary", "text_only"]])
def test_a_form_that_tells_findings_needs_them(folder: Path, prompt: Any) -> None:
    with pytest.raises(UserError, match="give their folder as expert"):
        read(folder, prompt=prompt)


def test_negatives_are_limited_finding_by_finding(folder: Path) -> None:
    def kept(per_positive: float | None, seed: int = 0) -> Counter[tuple[str, str]]:
        items = read_finding_labels(folder, "train", "labels.csv", FINDINGS, listed="Finding Labels")
        found = [item.record for item in limit_negatives(items, per_positive, seed) if isinstance(item, Located)]
        return Counter((record.metadata["finding"], record.messages[-1].text) for record in found)

    assert kept(None) == {("Effusion", "yes"): 2, ("Effusion", "no"): 3, ("Mass", "yes"): 1, ("Mass", "no"): 4}
    assert kept(1) == {("Effusion", "yes"): 2, ("Effusion", "no"): 2, ("Mass", "yes"): 1, ("Mass", "no"): 1}
    assert kept(9) == kept(None)
