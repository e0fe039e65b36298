"""The plan of an ablation study, and its table, from results as the evaluation writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from vila_m3_composite.ablations import Command, Variant, draw_bars, plan_steps, run_ablations, run_folder, summarise

COMMANDS = {
    "model": Command(["model.json"], {"size": 1}, 0.1),
    "training": Command(["train.json"], {"epochs": 2, "rate": 0.1}, 10),
    "evaluation": Command(["evaluate.json"], {"blank_baseline": False}, 1),
}
VARIANTS = [
    Variant("base", ["slake", "nih"]),
    Variant("long", ["slake"], training={"epochs": 3}),
    Variant("large", ["slake"], model={"size": 9}),
]


@pytest.fixture
def steps() -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in plan_steps(VARIANTS, [0, 1], COMMANDS, Path("work"))}


def test_every_variant_is_trained_and_measured_with_every_seed(steps: dict[str, dict[str, Any]]) -> None:
    names = [name for name in steps if name.startswith("train")]
    assert names == [f"train {variant} {seed}" for variant in ("base", "long", "large") for seed in (0, 1)]
    for name in names:
        measured = steps[name.replace("train", "measure")]["overrides"]
        assert measured["checkpoint"] == steps[name]["overrides"]["checkpoint_out"]
        assert measured["blank_baseline"] is False


def test_a_variant_changes_what_it_names_alone(steps: dict[str, dict[str, Any]]) -> None:
    assert steps["train base 1"]["overrides"]["epochs"] == 2
    assert steps["train long 1"]["overrides"] == {
        "epochs": 3,
        "rate": 0.1,
        "start_checkpoint": "work/models/base",
        "checkpoint_out": "work/runs/long_1/model",
        "ckpt_dir": "work/runs/long_1/state",
        "seed": 1,
    }
    assert steps["measure long 0"]["overrides"]["benchmarks"] == ["slake"]


def test_only_another_shape_starts_from_another_model(steps: dict[str, dict[str, Any]]) -> None:
    assert [name for name in steps if name.startswith("model")] == ["model base", "model large"]
    assert steps["model large"]["overrides"] == {"size": 9, "output_dir": "work/models/large"}
    assert steps["train large 0"]["overrides"]["start_checkpoint"] == "work/models/large"
    assert list(steps).index("model large") < list(steps).index("train large 0")


def test_the_table_holds_mean_and_span_over_the_seeds(tmp_path: Path) -> None:
    for variant in VARIANTS:
        for seed, value in ((0, 0.5), (1, 0.7)):
            folder = run_folder(tmp_path, variant.name, seed) / "results"
            folder.mkdir(parents=True)
            scores = {"metrics": ["f1"], "f1": {"value": 0.1}, "corrected_f1": {"value": value}}
            (folder / "results.json").write_text(json.dumps(dict.fromkeys(variant.benchmarks, scores)))
    rows = summarise(VARIANTS, [0, 1], tmp_path)
    assert [(row["variant"], row["benchmark"]) for row in rows] == [
        ("base", "slake"),
        ("base", "nih"),
        ("long", "slake"),
        ("large", "slake"),
    ]
    assert rows[0] == {
        "variant": "base",
        "benchmark": "slake",
        "metric": "f1",
        "runs": 2,
        "mean": pytest.approx(0.6),
        "least": 0.5,
        "most": 0.7,
    }
    draw_bars(rows, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


def test_a_study_without_seeds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no variants or no seeds are given"):
        run_ablations({"base": {"benchmarks": ["slake"]}}, [], {}, str(tmp_path))


def test_the_shipped_study_names_a_base_and_what_the_paper_varies(repository: Path) -> None:
    config = json.loads((repository / "bundles/vila_m3_with_experts/configs/ablations.json").read_text())
    assert list(config["variants"])[0] == "base"
    assert set(config["variants"]) == {
        "base",
        "without_expert",
        "unbalanced",
        "one_epoch",
        "three_epochs",
        "small",
        "large",
    }
    assert len(config["seeds"]) == 3
