"""A chain does each step once, goes on where it was cut off, and starts anew from the first step that changed."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vila_m3.checkpoint import load_checkpoint, load_processor
from vila_m3_common.patients import is_held_out
from vila_m3_composite.training_chain import link_folders, run_chain, split_films

CONFIGS = Path("bundles/vila_m3_with_experts/configs")
# Appends to a file, and fails when it is told to.
WRITE = {
    "text": "a",
    "file": "out.txt",
    "fails": False,
    "run": [
        "$open(@file, 'a').write(@text)",
        "$1 / (0 if @fails else 1)",
    ],
}

Chain = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    """Return a function that makes the steps of a chain that writes ``one``, ``two`` and ``three``."""
    (tmp_path / "write.json").write_text(json.dumps(WRITE))

    def make(**overrides: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {
                "name": name,
                "config_file": [str(tmp_path / "write.json")],
                "overrides": {"file": str(tmp_path / name), "logging_file": False, **overrides.get(name, {})},
                "outputs": [str(tmp_path / name)],
                "minutes": minutes,
            }
            for name, minutes in (("one", 1), ("two", 2), ("three", 1))
        ]

    return make


def written(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in ("one", "two", "three") if (folder / name).is_file()}


def test_a_done_chain_runs_nothing_again(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_chain(chain(), str(tmp_path / "work"))
    told = capsys.readouterr().out
    assert "[1/3] one: started, about 4.0 minutes left" in told
    assert "[3/3] three: done, about 0.0 minutes left" in told
    run_chain(chain(), str(tmp_path / "work"))
    assert written(tmp_path) == {"one": "a", "two": "a", "three": "a"}
    assert capsys.readouterr().out.count("done before") == 3


def test_a_chain_that_failed_goes_on_with_the_step_that_failed(chain: Chain, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        run_chain(chain(two={"fails": True}), str(tmp_path / "work"))
    assert written(tmp_path) == {"one": "a", "two": "a"}
    run_chain(chain(), str(tmp_path / "work"))
    assert written(tmp_path) == {"one": "a", "two": "a", "three": "a"}


def test_other_settings_redo_their_step_and_those_behind_it(chain: Chain, tmp_path: Path) -> None:
    run_chain(chain(), str(tmp_path / "work"))
    (tmp_path / "one").write_text("kept")
    run_chain(chain(two={"text": "b"}), str(tmp_path / "work"))
    assert written(tmp_path) == {"one": "kept", "two": "b", "three": "a"}


def test_changed_inputs_redo_their_step(chain: Chain, tmp_path: Path) -> None:
    weights = tmp_path / "weights/model.bin"
    weights.parent.mkdir()
    weights.write_text("first")
    steps = chain()
    steps[1]["inputs"] = [str(weights.parent)]
    for _ in range(2):
        run_chain(steps, str(tmp_path / "work"))
    assert written(tmp_path) == {"one": "a", "two": "a", "three": "a"}
    (tmp_path / "one").write_text("kept")
    (tmp_path / "two").write_text("old")
    weights.write_text("second")
    run_chain(steps, str(tmp_path / "work"))
    assert written(tmp_path) == {"one": "kept", "two": "a", "three": "a"}
    steps[1]["inputs"] = [str(tmp_path / "absent")]
    with pytest.raises(SystemExit, match="absent"):
        run_chain(steps, str(tmp_path / "work"))


def test_an_output_that_is_gone_is_made_again(chain: Chain, tmp_path: Path) -> None:
    run_chain(chain(), str(tmp_path / "work"))
    (tmp_path / "two").unlink()
    run_chain(chain(), str(tmp_path / "work"))
    assert written(tmp_path) == {"one": "a", "two": "a", "three": "a"}


def test_a_chain_that_cannot_be_is_refused(chain: Chain, tmp_path: Path) -> None:
    steps = chain()
    with pytest.raises(SystemExit, match="two steps have one name: one, one"):
        run_chain([steps[0], steps[0]], str(tmp_path))
    with pytest.raises(SystemExit, match=r"config gone.json of the chain does not exist"):
        run_chain([{**steps[0], "config_file": ["gone.json"]}], str(tmp_path))


def test_linked_folders_are_checked(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("a")
    for _ in range(2):
        link_folders(str(tmp_path / "all"), {"one": str(tmp_path / "data")})
    assert (tmp_path / "all/one/a.txt").read_text() == "a"
    with pytest.raises(SystemExit, match="gone does not exist"):
        link_folders(str(tmp_path / "all"), {"one": str(tmp_path / "gone")})
    (tmp_path / "all/two").mkdir()
    with pytest.raises(SystemExit, match="two is no link"):
        link_folders(str(tmp_path / "all"), {"two": str(tmp_path / "data")})


def test_films_are_those_of_patients_who_are_not_held_out(shared: Path) -> None:
    root = shared / "data/cxr/nih_256"
    films = [Path(film).name for (film,) in split_films(str(root), 0.2)]
    assert 600 < len(films) < 700
    assert not any(is_held_out(str(int(name[:8])), 0.2) for name in films)
    assert split_films(str(root), 0.2, count=3) == [[str(root / name)] for name in films[:3]]


@pytest.mark.slow
def test_the_nano_chain_goes_from_data_to_weights_on_slices(repository: Path, shared: Path, tmp_path: Path) -> None:
    """``make train-nano SMOKE=1``: twice, the second time nothing is left to do."""
    names = ("train_nano", "train_nano_smoke")
    files = [str(repository / CONFIGS / f"{name}.json") for name in names]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
    command += ["--data", str(shared / "data"), "--work", str(tmp_path / "work")]
    for last in ("[38/38] release: done, about 0.0 minutes left", "[38/38] release: done before"):
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr[-3000:]
        assert last in result.stdout
    released = tmp_path / "work/released"
    assert load_processor(released).tokenizer.convert_tokens_to_ids("liver") > 5
    assert load_checkpoint(released).config.vision_config.model_type == "conv_stem_siglip"
    card = json.loads((released / "model_card.json").read_text())
    assert 0 <= card["metrics"]["trigger_accuracy"] <= 1
    assert card["config"]["start_checkpoint"] == "stage3"
    assert str(tmp_path) not in json.dumps(card), "a card is passed on"
    assert set(card["data"]["train"]["data_sets"]) == {
        *("slake", "radvqa", "nih", "nih_expert"),
        *("phantom", "phantom_forms", "phantom_structures", "phantom_findings"),
        *("expert_vista3d", "expert_brats", "expert_cxr"),
    }


def test_the_nano_chain_leaves_out_the_images_of_english_test_questions(shared: Path) -> None:
    """SLAKE's Chinese training questions are asked about 72 of the 96 images of the English test questions."""
    from vila_m3.data.source import Located
    from vila_m3.data.sources.slake import read_slake

    source = shared / "data/vqa/slake"
    overrides = json.loads((Path(__file__).parents[2] / CONFIGS / "train_nano.json").read_text())
    step = next(step for step in overrides["steps"] if step["name"] == "prepare slake")
    assert step["overrides"]["options#spared"] == "@slake_spared"
    assert overrides["slake_spared"] == ["en"]

    def images(split: str, languages: list[str], spared: list[str]) -> set[str]:
        rows = read_slake(source, split, languages, spared=spared)
        return {row.record.images[0] for row in rows if isinstance(row, Located)}

    tested = images("test", ["en"], [])
    assert len(tested & images("train", ["zh"], [])) == 72
    assert not tested & images("train_validate", ["en", "zh"], ["en"])
    assert len(images("train_validate", ["en", "zh"], ["en"])) == 546
    assert not images("validate", ["en"], []) & images("train", ["en", "zh"], ["en"])
