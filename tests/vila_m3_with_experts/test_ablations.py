"""The plan of an ablation study, and its table, from results as the evaluation writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from vila_m3_composite.ablations import Command, Variant, draw_bars, plan_run, run_ablations, run_folder, summarise

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


def overrides_of(variant: Variant, seed: int) -> list[dict[str, Any]]:
    """What the model, the training and the measurement of a run are told."""
    return [step["overrides"] for step in plan_run(variant, seed, COMMANDS, Path("work"))]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_measures_the_model_that_it_trains_from_its_own_start(variant: Variant) -> None:
    model, training, evaluation = overrides_of(variant, 1)
    assert training["start_checkpoint"] == model["output_dir"] == f"work/runs/{variant.name}_1/start"
    assert evaluation["checkpoint"] == training["checkpoint_out"]
    assert evaluation["benchmarks"] == variant.benchmarks
    assert evaluation["blank_baseline"] is False
    assert model["seed"] == training["seed"] == 1


def test_a_run_may_learn_to_read_first() -> None:
    commands = {**COMMANDS, "reading": Command(["train.json"], {"epochs": 1, "rate": 0.2}, 3)}
    model, reading, training, evaluation = (
        step["overrides"] for step in plan_run(VARIANTS[1], 2, commands, Path("work"))
    )
    assert [reading["epochs"], training["epochs"], reading["seed"]] == [1, 3, 2]
    assert reading["start_checkpoint"] == model["output_dir"]
    assert training["start_checkpoint"] == reading["checkpoint_out"]
    assert evaluation["checkpoint"] == training["checkpoint_out"]
    assert reading["ckpt_dir"] != training["ckpt_dir"]
    alone = Variant("alone", ["slake"], reads=False)
    assert [step["name"] for step in plan_run(alone, 0, commands, Path("work"))] == ["model", "training", "evaluation"]


def test_a_variant_changes_what_it_names_alone() -> None:
    base, long, large = (overrides_of(variant, 0) for variant in VARIANTS)
    assert [base[1]["epochs"], long[1]["epochs"], large[1]["epochs"]] == [2, 3, 2]
    assert [base[0]["size"], long[0]["size"], large[0]["size"]] == [1, 1, 9]
    assert base[1]["rate"] == long[1]["rate"] == 0.1


def test_runs_go_on_two_at_a_time_and_a_failed_one_is_named(tmp_path: Path) -> None:
    written = tmp_path / "write.json"
    write = "$__import__('pathlib').Path(@output_dir).mkdir(parents=True)"
    written.write_text(json.dumps({"output_dir": "", "size": 0, "seed": 0, "run": [write]}))
    absent = tmp_path / "absent.json"
    commands = {
        name: {"config_file": [str(absent if name == "training" else written)], "overrides": {}, "minutes": 1}
        for name in COMMANDS
    }
    study = {"base": {"benchmarks": ["slake"]}}
    with pytest.raises(SystemExit, match=r"config .*absent.json of the chain does not exist.*base_\d/log.txt"):
        run_ablations(study, list(range(9)), commands, str(tmp_path / "work"), jobs=2)
    assert not (tmp_path / "work/runs/base_8").exists()  # what waited is not begun any more
    with pytest.raises(SystemExit, match="jobs 0 is not a whole number from 1 on"):
        run_ablations(study, [0, 1], commands, str(tmp_path / "work"), jobs=0)


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
