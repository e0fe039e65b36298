"""The counterfactual audit: feedback is what its variant says; rates count what they claim."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vila_m3.answer import Answerer
from vila_m3.benchmarks import audit
from vila_m3.benchmarks.audit_cases import AuditCase, film_cases, phantom_cases
from vila_m3.benchmarks.nih import held_out_films
from vila_m3.benchmarks.predictions import PredictionFile
from vila_m3.phantom_conversations import findings_reply
from vila_m3_common.conversation import Conversation
from vila_m3_common.prompts import CXR_TRAINED_ORDER


@pytest.fixture(scope="module")
def nih(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nih")
    rows = ["Image Index,Finding Labels,Patient ID"]
    for patient in range(40):
        Image.fromarray(np.full((24, 24), 5 * patient, np.uint8)).save(folder / f"{patient}.png")
        rows.append(f"{patient}.png,{'Effusion' if patient % 2 else 'Edema|Mass'},{patient}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def scores(nih: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An expert that sees pneumonia everywhere."""
    folder = tmp_path_factory.mktemp("scores")
    for film in held_out_films(nih):
        said = {name: 0.9 if name == "Pneumonia" else 0.2 for name in CXR_TRAINED_ORDER}
        (folder / f"{film.path.name}.json").write_text(json.dumps(said))
    return folder


@pytest.fixture(scope="module")
def films(nih: Path, scores: Path) -> list[AuditCase]:
    return list(film_cases(str(nih), str(scores), 100))


@pytest.fixture(scope="module")
def phantoms() -> list[AuditCase]:
    return list(phantom_cases(2, 620_000))


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.endswith((": yes", ": no"))]


def test_film_feedback_says_what_its_variant_claims(films: list[AuditCase]) -> None:
    for case in films:
        target, said = case.question.target, case.feedback
        assert said["true"].named == case.truth
        assert said["expert"].named == {"Pneumonia"}
        assert said["blank"].named == frozenset()
        assert lines_of(said["blank"].text) == []
        assert len(lines_of(said["contradicting"].text)) == 19
        if target:
            assert (target in said["flipped"].named) != (target in said["expert"].named)
            line = target.lower().replace("_", " ")
            assert f"\n{line}: yes\n{line}: no\n" in "\n" + said["contradicting"].text.partition("\n")[2]


def test_ct_feedback_says_what_its_variant_claims(phantoms: list[AuditCase]) -> None:
    for case in phantoms:
        said, target = case.feedback, case.question.target
        assert said["true"].named == case.truth
        assert said["blank"].named == frozenset()
        if target:
            assert (target in said["flipped"].named) != (target in case.truth)
            assert said["contradicting"].text == said["flipped"].text
            assert (said["contradicting"].images[0] == said["true"].images[0]).all()


def test_without_the_expert_neither_cards_nor_feedback_are_read(films: list[AuditCase]) -> None:
    alone = films[0].conversation("none", "CARDS")
    assert len(alone.turns) == 1
    assert "CARDS" not in alone.turns[0].text
    asked = films[0].conversation("flipped", "CARDS")
    assert [turn.role for turn in asked.turns] == ["user", "assistant", "expert"]


def test_names_are_read_longest_first() -> None:
    assert audit.named_in("red: left lung upper lobe, blue: liver", "CT") == {"left lung upper lobe", "liver"}
    assert audit.named_in("The findings are: pleural thickening, mass.", "CXR") == {"Pleural_Thickening", "Mass"}


def answers(case: AuditCase, variant: str, follows: bool) -> str:
    """What a model says that always follows, or that knows the truth and never listens."""
    named = case.feedback[variant].named if follows and variant != "none" else case.truth
    if case.question.target:
        return "yes" if case.question.target in named else "no"
    return findings_reply(sorted(named))


def judged(cases: list[AuditCase], follows: bool) -> dict[str, dict[str, Any]]:
    keys = [(case, variant) for case in cases for variant in ("none", *case.feedback)]
    return audit.rates(cases, {(c.id, v): audit.read_answer(c, v, answers(c, v, follows)) for c, v in keys})


def test_a_model_that_always_follows_is_harmed_by_flipped_feedback(films: list[AuditCase]) -> None:
    found = judged(films, follows=True)
    for variant in ("expert", "true", "flipped", "swapped"):
        assert found[variant]["follow"]["value"] == 1
    assert found["blank"]["follow"]["count"] == 0
    assert found["true"]["harm"]["value"] == 0
    assert found["expert"]["harm"]["value"] > 0
    asked = [case for case in films if case.question.target]
    turned = [(c.question.target in c.feedback["flipped"].named) != (c.question.target in c.truth) for c in asked]
    assert found["flipped"]["harm"]["value"] == pytest.approx(np.mean(turned))
    assert found["flipped"]["harm_against_true"]["count"] == len(asked)
    assert found["true"]["unsupported"]["value"] == 0


def test_a_model_that_knows_and_never_listens_is_never_harmed(films: list[AuditCase]) -> None:
    found = judged(films, follows=False)
    assert found["flipped"]["harm"]["value"] == 0
    assert found["flipped"]["rescue"] == {"value": None, "interval": None, "count": 0}
    assert found["swapped"]["follow"]["value"] < 1
    assert found["blank"]["unsupported"]["value"] > 0, "it lists findings that blank feedback does not name"


def test_a_killed_audit_asks_only_what_is_missing(films: list[AuditCase], tmp_path: Path) -> None:
    asked: list[int] = []

    def ask(talks: Any) -> Iterator[dict[str, str]]:
        asked.append(len(talks))
        if sum(asked) > 20:
            raise KeyboardInterrupt
        return [{"text": "yes"} for _ in talks]  # type: ignore[return-value]

    path = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        audit.ask_all(films, "", ask, PredictionFile(path, {}), 8)  # type: ignore[arg-type]
    kept = len(path.read_text().splitlines())
    assert kept == 16
    rest: list[Conversation] = []
    texts = audit.ask_all(
        films, "", lambda talks: rest.extend(talks) or [{"text": "no"} for _ in talks], PredictionFile(path, {}), 8
    )
    assert len(rest) == len(texts) - kept


def test_an_audit_of_a_model_is_written(
    tmp_path: Path, nih: Path, model: Any, processor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answerer = Answerer(model, processor, 4, kept_conversations=0)
    audit.run_audit(str(tmp_path), "", answerer, {}, str(nih), None, 3, 1, 620_000)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == {"CT", "CXR"}
    assert "expert" not in results["CXR"]
    assert set(results["CXR"]["swapped"]) == set(audit.RATES)
    assert "| flipped |" in (tmp_path / "audit.md").read_text()
