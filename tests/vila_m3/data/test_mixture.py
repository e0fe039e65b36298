"""Mixtures: repeats, orders equal to VILA's, resume, rows read by line."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vila_m3.checkpoint import load_processor
from vila_m3.data.mixture import IndexedJsonl, Mixture, MixtureSampler, temperature_quotas
from vila_m3.data.mixture_report import describe_mixture, report_mixture
from vila_m3.data.record import Message, Record, format_row
from vila_m3_common.errors import UserError

ROOT = Path(__file__).parents[3]
PAPER = {
    "usmle": 10,
    "radvqa": 4,
    "slake": 4,
    "pathvqa": 4,
    "expert_mimic_vqa": 2,
    "expert_vista3d": 8,
    "expert_brats": 16,
    "mimic_report": 1,
    "mimic_report_expert": 1,
}


def write_rows(path: Path, name: str, count: int) -> None:
    rows = [Record(f"{name}{i}", (Message("user", "Ü?"), Message("assistant", "yes"))) for i in range(count)]
    path.write_text("".join(f"{format_row(row)}\n" for row in rows))


@pytest.fixture
def data_sets(tmp_path: Path) -> dict[str, Any]:
    write_rows(tmp_path / "a.jsonl", "a", 7)
    write_rows(tmp_path / "b1.jsonl", "b", 5)
    write_rows(tmp_path / "b2.jsonl", "c", 3)
    return {"a": {"files": "a.jsonl", "repeats": 2}, "b": {"files": ["b1.jsonl", "b2.jsonl"], "images": "b"}}


def recorded(shared: Path) -> list[dict[str, Any]]:
    return json.loads((shared / "golden/vila/sampler.json").read_text())


def test_orders_equal_the_recorded_ones_of_every_rank(shared: Path) -> None:
    for case in recorded(shared):
        for rank, expected in enumerate(case["indices_per_rank"]):
            sampler = MixtureSampler(case["sample_lens"], case["batch_size"], case["num_replicas"], rank, case["seed"])
            sampler.set_epoch(case["epoch"])
            assert list(sampler) == expected
            assert len(sampler) == len(expected)


@pytest.mark.parametrize("replica_count", [1, 2, 3, 8])
@pytest.mark.parametrize("quotas", [None, [40, 17, 60]])
def test_processes_share_the_rows_and_an_epoch_is_another_order(replica_count: int, quotas: list[int] | None) -> None:
    samplers = [MixtureSampler([40, 17, 60], 2, replica_count, rank, quotas=quotas) for rank in range(replica_count)]
    first = [list(sampler) for sampler in samplers]
    rows = [row for order in first for row in order]
    assert len(rows) == len(set(rows)) == sum(n // (2 * replica_count) * 2 * replica_count for n in (40, 17, 60))
    for sampler in samplers:
        sampler.set_epoch(1)
    assert [list(sampler) for sampler in samplers] != first


def test_resume_from_a_step_gives_the_rest_of_the_same_epoch() -> None:
    sampler = MixtureSampler([40, 17, 60], 4, 2, 1)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(3, first_step=5)
    assert list(sampler) == whole[20:]
    assert len(sampler) == len(whole) - 20
    with pytest.raises(UserError, match="an epoch has 14 steps of 4 rows"):
        sampler.set_epoch(3, first_step=15)


def test_parts_are_spread_evenly_over_an_epoch() -> None:
    order = np.array(list(MixtureSampler([900, 100], 10)))
    counts = [(order[start : start + 100] >= 900).sum() for start in range(0, 1000, 100)]
    assert max(counts) - min(counts) <= 1


def test_a_mixture_repeats_and_names_its_data_sets(tmp_path: Path, data_sets: dict[str, Any]) -> None:
    mixture = Mixture(data_sets, tmp_path)
    assert mixture.sample_lengths == [7, 7, 8]
    items = [mixture[index] for index in range(len(mixture))]
    assert [item.record.id for item in items[7:9]] == ["a0", "a1"]
    assert [item.record.id for item in items[18:20]] == ["b4", "c0"]
    assert items[-1].data_set == "b"
    assert items[-1].image_root == tmp_path / "b"
    assert items[0].conversation().turns[0].text == "Ü?"


def test_a_balanced_mixture_takes_the_repeats_and_an_unbalanced_one_shows_every_row_once(
    tmp_path: Path, data_sets: dict[str, Any]
) -> None:
    assert Mixture(data_sets, tmp_path, "balanced").sample_lengths == [7, 7, 8]
    unbalanced = Mixture(data_sets, tmp_path, "unbalanced")
    assert unbalanced.sample_lengths == [7, 8]
    names = [unbalanced[index].record.id for index in MixtureSampler(unbalanced.sample_lengths, 1)]
    assert sorted(names) == sorted(set(names))
    assert len(names) == 15


def test_temperature_evens_shares_out(tmp_path: Path, data_sets: dict[str, Any]) -> None:
    assert temperature_quotas([900, 100, 0], 1) == [900, 100, 0]
    assert temperature_quotas([900, 100], 2) == [750, 250]
    mixture = Mixture(data_sets, tmp_path, "temperature", 1e9)
    assert mixture.quotas is not None
    assert sum(mixture.quotas) == 15
    rows = list(MixtureSampler([900, 100], 10, quotas=[750, 250]))
    assert sum(row >= 900 for row in rows) == 250
    assert np.bincount(np.array(rows), minlength=1000)[900:].tolist().count(3) == 50


def test_rows_are_found_by_line_and_survive_the_way_to_a_worker(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, "r", 3)
    path.write_text("\n" + path.read_text().replace("\n", "\r\n\n") + "  \n")
    rows = IndexedJsonl(path)
    assert len(rows) == 3
    rows[1]
    assert copy.deepcopy(rows)[2].id == "r2"


def test_the_last_row_may_lack_its_line_break(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, "r", 3)
    path.write_text(path.read_text().rstrip())
    assert IndexedJsonl(path)[2].id == "r2"


def test_a_bad_row_is_named_by_its_number(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(UserError, match=r"row 1 of .*rows.jsonl: the line is not valid JSON"):
        IndexedJsonl(tmp_path / "rows.jsonl")[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_sets": {"a": {"file": "a.jsonl"}}}, "did you mean 'files'"),
        ({"data_sets": {"a": {"files": "absent.jsonl"}}}, "cannot be read"),
        ({"data_sets": {"a": {"files": "a.jsonl", "repeats": 0}}}, "not a whole number from 1 on"),
        ({"balance": "balance"}, "did you mean 'balanced'"),
        ({"temperature": 0}, "must be above 0"),
        ({"data_sets": {}}, "has no rows"),
    ],
)
def test_a_mixture_tells_what_is_wrong(
    tmp_path: Path, data_sets: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(**{"data_sets": data_sets, "root": tmp_path, **change})


def test_data_sets_without_files_can_be_skipped(tmp_path: Path, data_sets: dict[str, Any]) -> None:
    mixture = Mixture({**data_sets, "mimic": {"files": ["m.jsonl"]}}, tmp_path, missing="skip")
    assert mixture.skipped == ["mimic"]
    assert len(mixture) == 22


def test_a_batch_that_nothing_fills_is_refused() -> None:
    with pytest.raises(UserError, match="no data set fills one batch of 8 x 4 rows"):
        MixtureSampler([7, 23], 8, 4)


def test_the_papers_repeats_stand_in_the_config() -> None:
    config = json.loads((ROOT / "vila_m3_bundle/configs/mixture_m3.json").read_text())
    assert {name: entry["repeats"] for name, entry in config["data_sets"].items()} == PAPER


def test_the_report_tells_items_tokens_and_shares_and_draws_them(
    tmp_path: Path, data_sets: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    processor = load_processor(ROOT / "vila_m3_bundle/models/nano")
    mixture = Mixture(data_sets, tmp_path)
    rows = describe_mixture(mixture, processor)
    expected = sum(len(processor.tokenize(mixture[index].conversation())[0]) for index in range(len(mixture)))
    assert [(row["items"], row["repeats"], row["shown"]) for row in rows] == [(7, 2, 14), (8, 1, 8)]
    assert sum(row["tokens"] for row in rows) == expected
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert all(0 < row["supervised_tokens"] < row["tokens"] for row in rows)
    report_mixture(mixture, processor, str(tmp_path / "out"))
    assert "| a | 7 | 2 | 14 | 0 |" in capsys.readouterr().out
    assert Image.open(tmp_path / "out/mixture.png").width > 500
