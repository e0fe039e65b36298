"""Forgetting between two checkpoints: the paired drop, multiple choice read by its letter, both runs resumable."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import run
from PIL import Image

from vila_m3.benchmarks.choice import is_choice_right
from vila_m3.benchmarks.forgetting import PAPER, forgetting_table, paired_drop
from vila_m3.export import save_released
from vila_m3_common.errors import UserError
from vila_m3_common.hooks import quiet

QUESTION = "Which drug?\nA. Ibuprofen\nB. Aspirin\nC. Heparin, low dose"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("B", True), ("B.", True), ("(B)", True), ("B. Aspirin", True), ("b", True), ("Answer: B", True),
        ("The answer is B.", True), ("Aspirin", True), ("A. Aspirin", False), ("C. Heparin, low dose", False),
        ("", None), ("I cannot answer this question.", None), ("paracetamol", None), ("(A) or (B)", None),
    ],
)  # fmt: skip
def test_a_choice_is_read_by_its_letter_or_its_text(text: str, right: bool | None) -> None:
    assert is_choice_right(QUESTION, "B. Aspirin", text) is right


def items(*right: bool | None) -> list[dict[str, Any]]:
    return [{"question_id": str(n), "group": f"g{n // 2}", "corrected": r} for n, r in enumerate(right)]


def test_the_drop_is_paired() -> None:
    before, after = items(*[True] * 30, *[False] * 10), items(*[True] * 20, *[None] * 10, *[True] * 2, *[False] * 8)
    found = paired_drop(before, after, "corrected")
    assert (found["before"], found["after"], found["drop"]) == pytest.approx((0.75, 0.55, 0.2))
    assert found["relative_drop"] == pytest.approx(0.2 / 0.75)
    assert (found["lost"], found["gained"]) == (10, 2)
    assert found["interval"][0] < 0.2 < found["interval"][1]
    assert paired_drop(before, before, "corrected")["interval"] == [0, 0]
    assert paired_drop(items(False), items(False), "corrected")["relative_drop"] is None


def test_different_questions_are_not_compared() -> None:
    with pytest.raises(UserError, match="did not answer the same questions; give both the same benchmarks"):
        paired_drop(items(True, True), items(True), "corrected")


def write_data(root: Path) -> None:
    (root / "usmle").mkdir(parents=True)
    options = {"A": "Ibuprofen", "B": "Aspirin"}
    rows = [{"question": f"Which drug {n}?", "options": options, "answer_idx": "B"} for n in range(6)]
    (root / "usmle/test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "general_vqa/images").mkdir(parents=True)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(root / "general_vqa/images/a.png")
    talk = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "nothing"}]
    lines = [json.dumps({"id": str(n), "image": "a.png", "conversations": talk}) for n in range(4)]
    (root / "general_vqa/test.jsonl").write_text("\n".join(lines) + "\n")


def test_two_checkpoints_are_compared(tmp_path: Path, repository: Path, model: Any, processor: Any) -> None:
    save_released(model, processor, tmp_path / "before")
    torch.manual_seed(5)
    for value in model.llm.parameters():
        value.data += 0.05 * torch.randn_like(value)
    save_released(model, processor, tmp_path / "after")
    write_data(tmp_path / "data")
    arguments = {name: str(tmp_path / name) for name in ("before", "after")}
    config = str(repository / "vila_m3_bundle/configs/forgetting.json")
    places = {"data_root": str(tmp_path / "data"), "output_dir": str(tmp_path / "out")}
    with quiet():
        run(config_file=config, **arguments, **places, device="cpu", max_new_tokens=3)
    found = json.loads((tmp_path / "out/forgetting.json").read_text())
    assert {name: row["corrected"]["count"] for name, row in found.items()} == {"usmle": 6, "general_vqa": 4}
    texts = [(tmp_path / f"out/{state}/predictions/usmle.jsonl").read_text() for state in ("before", "after")]
    assert texts[0] != texts[1], "each checkpoint was asked"
    assert "<image>" not in texts[0]
    assert PAPER in (tmp_path / "out/forgetting.md").read_text()


def test_the_table_says_what_the_paper_loses() -> None:
    table = forgetting_table({"usmle": {"corrected": paired_drop(items(True, True), items(True, False), "corrected")}})
    assert "4 to 23 %" in table
    assert "| usmle | 2 | 100.0 | 50.0 | 50.0 [" in table
