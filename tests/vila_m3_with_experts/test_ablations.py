"""The plan of an ablation study, and its table, from results as the evaluation writes them."""

import json
from pathlib import Path
from typing import Any

import pytest

from vila_m3_composite.ablations import (
    Command,
    Variant,
    draw_bars,
    plan_run,
    plan_start,
    run_ablations,
    run_folder,
    summarise,
)

COMMANDS = {
    "model": Command(["model.json"], {"size": 1}, 0.1),
    "training": Command(["train.json"], {"epochs": 2, "rate": 0.1}, 10),
    "evaluation": Command(["evaluate.json"], {"blank_baseline": False}, 1),
}
VARIANTS = [
    Variant("base", ["slake", "nih"]),
    Variant("long", ["slake"], {"training": {"epochs": 3}}),
    Variant("large", ["slake"], {"model": {"size": 9}}),
]


def overrides_of(variant: Variant, seed: int) -> list[dict[str, Any]]:
    """What the model, the training and the measurement of a run are told."""
    steps = plan_start(variant, seed, COMMANDS, Path("work")) + plan_run(variant, seed, COMMANDS, Path("work"))
    return [step["overrides"] for step in steps]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_measures_the_model_that_it_trains(variant: Variant) -> None:
    model, training, evaluation = overrides_of(variant, 1)
    start = "large" if "model" in variant.changes else "base"
    assert training["start_checkpoint"] == model["output_dir"] == f"work/starts/{start}/new"
    assert evaluation["checkpoint"] == training["checkpoint_out"]
    assert evaluation["benchmarks"] == variant.benchmarks
    assert evaluation["blank_baseline"] is False
    assert model["seed"] == training["seed"] == 1


def test_a_run_goes_through_the_stages_before_its_training() -> None:
    commands = {
        "model": COMMANDS["model"],
        "seeing": Command(["train.json"], {"rate": 0.3}, 1),
        "reading": Command(["train.json"], {"epochs": 1, "rate": 0.2}, 3),
        **COMMANDS,
    }
    starts = plan_start(VARIANTS[1], 2, commands, Path("work"))
    model, seeing, reading = (step["overrides"] for step in starts)
    training, evaluation = (step["overrides"] for step in plan_run(VARIANTS[1], 2, commands, Path("work")))
    assert [reading["epochs"], training["epochs"], reading["seed"]] == [1, 3, 2]
    trained = (seeing, reading, training)
    written = [model["output_dir"], *(stage["checkpoint_out"] for stage in trained)]
    assert [*(stage["start_checkpoint"] for stage in trained), evaluation["checkpoint"]] == written
    assert len({stage["ckpt_dir"] for stage in trained}) == 3
    alone = Variant("alone", ["slake"], {"reading": {"epochs": 4}})
    *_, other = (step["overrides"] for step in plan_start(alone, 2, commands, Path("work")))
    assert other["epochs"] == 4
    training = plan_run(alone, 2, commands, Path("work"))[0]
    assert training["inputs"] == [training["overrides"]["start_checkpoint"]] == [other["checkpoint_out"]]
    assert other["checkpoint_out"] != reading["checkpoint_out"]


def test_a_variant_changes_what_it_names_alone() -> None:
    base, long, large = (overrides_of(variant, 0) for variant in VARIANTS)
    assert [base[1]["epochs"], long[1]["epochs"], large[1]["epochs"]] == [2, 3, 2]
    assert [base[0]["size"], long[0]["size"], large[0]["size"]] == [1, 1, 9]
    assert base[1]["rate"] == long[1]["rate"] == 0.1


def test_runs_go_on_two_at_a_time_behind_their_starts(tmp_path: Path) -> None:
    scores = json.dumps({"slake": {"metrics": ["f1"], "corrected_f1": {"value": 0.5}}})
    written = {
        "model": ("@output_dir", "weights", "str(@seed)"),
        "training": ("@checkpoint_out", "weights", "(pathlib.Path(@start_checkpoint) / 'weights').read_text() + '!'"),
        "evaluation": ("@output_dir", "results.json", "@scores"),
    }
    commands = {}
    for name, (folder, file, text) in written.items():
        write = f"$(pathlib.Path({folder}).mkdir(parents=True), (pathlib.Path({folder}) / '{file}').write_text({text}))"
        told = dict.fromkeys(("output_dir", "checkpoint_out", "start_checkpoint", "ckpt_dir", "checkpoint"), "")
        config = {"imports": ["$import pathlib"], **told, "seed": 0, "benchmarks": [], "scores": scores}
        run = [write, *(["$pathlib.Path(@ckpt_dir).mkdir()"] if name == "training" else [])]
        (tmp_path / f"{name}.json").write_text(json.dumps({**config, "run": run}))
        commands[name] = {"config_file": [str(tmp_path / f"{name}.json")], "overrides": {}, "minutes": 1}
    study = {name: {"benchmarks": ["slake"]} for name in ("base", "other")}
    work = tmp_path / "work"
    run_ablations(study, [0, 1], commands, str(work), jobs=2)
    assert sorted(path.name for path in (work / "starts").iterdir()) == ["base"]
    assert (work / "runs/other_1/training/weights").read_text() == "0!"
    assert [row["runs"] for row in json.loads((work / "ablations.json").read_text())] == [2, 2]


def test_a_failed_run_is_named_and_none_is_begun_behind_it(tmp_path: Path) -> None:
    written = tmp_path / "write.json"
    write = "$pathlib.Path(@output_dir).mkdir(parents=True)"
    imports = ["$import pathlib"]
    written.write_text(json.dumps({"imports": imports, "output_dir": "", "size": 0, "seed": 0, "run": [write]}))
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


def test_equal_scores_are_drawn(tmp_path: Path) -> None:
    told = {"variant": "base", "benchmark": "nih", "metric": "f1", "runs": 3}
    mean = (0.1 + 0.1 + 0.1) / 3
    assert mean > 0.1
    draw_bars([{**told, "mean": mean, "least": 0.1, "most": 0.1}], tmp_path / "bars.png")
    assert (tmp_path / "bars.png").exists()


def test_a_study_without_seeds_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no variants or no seeds are given"):
        run_ablations({"base": {"benchmarks": ["slake"]}}, [], {}, str(tmp_path))


def test_a_change_of_an_unknown_command_is_refused(tmp_path: Path) -> None:
    study = {"base": {"benchmarks": ["slake"], "changes": {"trainin": {"epochs": 1}}}}
    commands = {"training": {"config_file": [], "overrides": {}, "minutes": 1}}
    with pytest.raises(SystemExit, match="trainin"):
        run_ablations(study, [0], commands, str(tmp_path))


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
