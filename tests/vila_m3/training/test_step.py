from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import Losses, open_records, write_records

from vila_m3.adapters import merge_adapter
from vila_m3.batches import MixtureDataset, StepBatches, StepCollator, open_mixture, pack_items, pad_items
from vila_m3.checkpoint import load_checkpoint
from vila_m3.model import VilaM3ForConditionalGeneration
from vila_m3.packed_attention import spans_of
from vila_m3.packing import expand_image_places
from vila_m3.parity import _without_wrapper
from vila_m3.processor import Encoded
from vila_m3.trainer import (
    SupervisedLoss,
    WeightAverage,
    arithmetic,
    checkpoint_gradients,
    drop_residuals,
    supervised_count,
    train_adapter,
    train_parts,
)
from vila_m3_common.errors import UserError

PARTS = ("llm", "vision_tower", "mm_projector")


def recorded_items(model: VilaM3ForConditionalGeneration, recorded: Any) -> list[Encoded]:
    images = iter(recorded["batch.image_index"].tolist())
    items = []
    for row, mask in enumerate(recorded["batch.attention_mask"].astype(bool)):
        tokens = recorded["batch.input_ids"][row][mask].tolist()
        expanded, labels = expand_image_places(
            tokens, model.tokens_per_image, recorded["batch.labels"][row][mask].tolist()
        )
        rows = [next(images) for token in tokens if token < 0]
        pixels = torch.from_numpy(recorded["pixel_values"][rows])
        items.append(Encoded(torch.tensor(expanded), torch.tensor(labels), pixels))
    return items


def mean_gradients(model: VilaM3ForConditionalGeneration, micro: dict[str, torch.Tensor]) -> tuple[float, dict]:
    model.zero_grad()
    loss = SupervisedLoss(model)(**micro) / supervised_count(micro)
    loss.backward()
    return float(loss.detach()), {
        name: value.grad for name, value in model.named_parameters() if value.grad is not None
    }


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_loss_and_gradients_are_the_recorded_ones(golden: Path, packed: bool) -> None:
    """Batch of three conversations (shared/golden/vila); gradients to 1e-4 of the largest recorded value."""
    recorded = np.load(golden / "A_siglip_llama3.npz")
    model = load_checkpoint(golden / "A_siglip_llama3", dtype="float32", attention="eager")
    items = recorded_items(model, recorded)
    width = int(recorded["repack.labels"].shape[1])
    micro = pack_items(items, width) if packed else pad_items(items)
    if packed:
        np.testing.assert_array_equal(micro["position_ids"], recorded["repack.position_ids"])
        np.testing.assert_array_equal(micro["labels"], recorded["repack.labels"])
    loss, gradients = mean_gradients(model, micro)
    assert loss == pytest.approx(float(recorded["batch_right.loss"]), abs=1e-5)
    by_name = {_without_wrapper(name): value for name, value in gradients.items()}
    names = [name for name in recorded.files if name.startswith("grad.")]
    assert len(names) == 12
    for name in names:
        expected = torch.from_numpy(recorded[name])
        found = by_name[_without_wrapper(name.removeprefix("grad."))]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()) + 1e-9)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packing_changes_neither_loss_nor_gradients(
    model: VilaM3ForConditionalGeneration, dataset: MixtureDataset, attention: str
) -> None:
    model.set_attn_implementation(attention)
    items = [dataset[index] for index in range(5)]
    total = sum(len(item.input_ids) for item in items)
    packed = pack_items(items, total)
    assert packed["input_ids"].shape == (1, total)
    loss, gradients = mean_gradients(model, pad_items(items))
    packed_loss, packed_gradients = mean_gradients(model, packed)
    assert packed_loss == pytest.approx(loss, abs=1e-5)
    assert gradients.keys() == packed_gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(packed_gradients[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_spans_end_where_positions_restart() -> None:
    assert spans_of(torch.tensor([[0, 1, 2, 0, 1, -1, -1], [0, 1, 2, 3, 4, 5, 6]])) == [[3, 2, 1, 1], [7]]


def test_a_packed_conversation_does_not_see_its_neighbours(
    model: VilaM3ForConditionalGeneration, dataset: MixtureDataset
) -> None:
    """Another conversation before it in the row leaves its logits as they are."""
    long, short = sorted((dataset[4], dataset[9]), key=lambda item: -len(item.input_ids))
    changed = Encoded(long.input_ids.flip(0), long.labels, long.pixel_values)
    with torch.no_grad():
        logits = []
        for other in (long, changed):
            packed = pack_items([other, short], 4096)
            rows = model(packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits
            logits.append(rows[0, len(long.input_ids) :])
    torch.testing.assert_close(logits[0], logits[1], atol=1e-6, rtol=0)


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.network.named_parameters()}


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("pack_length", [None, 4096])
def test_four_micro_batches_of_one_are_one_of_four(start: Any, pack_length: int | None) -> None:
    """SGD after one step: weights differ by less than 1e-5."""
    results = []
    for size in (4, 1):
        losses = Losses()
        trainer = start(micro_batch_size=size, pack_length=pack_length, epochs=1, handlers=[losses])
        trainer.optimizer = torch.optim.SGD(list(trainer.network.parameters()), lr=0.1)
        trainer.run()
        results.append((losses.values, weights_of(trainer)))
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    assert_close(results[0][1], results[1][1])


def hashes(model: torch.nn.Module) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in model.named_parameters()}


@pytest.mark.parametrize("parts", [("mm_projector",), ("llm", "mm_projector"), PARTS])
def test_only_the_named_parts_are_updated(
    start: Any, model: VilaM3ForConditionalGeneration, parts: tuple[str, ...]
) -> None:
    before = hashes(model)
    start(parts=parts).run()
    after = hashes(model)
    changed = {name for name in before if before[name] != after[name]}
    assert {name.split(".")[0] for name in changed} == set(parts)
    # The last layer of the tower is behind the features that are read.
    unread = ("vision_tower.encoder.layers.1.", "vision_tower.post_layernorm.", "vision_tower.head.")
    expected = {name for name in before if name.split(".")[0] in parts and not name.startswith(unread)}
    assert {name for name in expected - changed if not name.endswith("k_proj.bias")} == set()
    assert changed <= expected


def test_an_unknown_part_is_refused(model: VilaM3ForConditionalGeneration) -> None:
    with pytest.raises(UserError, match=r"unknown part 'llms'; did you mean 'llm'\? valid: llm, vision_tower"):
        train_parts(model, ["llms"])


def test_a_batch_of_text_alone_has_a_loss(model: VilaM3ForConditionalGeneration, dataset: MixtureDataset) -> None:
    micro = pad_items([dataset[4], dataset[9]])
    assert len(micro["pixel_values"]) == 0
    alone = float(SupervisedLoss(model)(**micro))
    blind = SupervisedLoss(model, always_sees=True)
    blind_loss = blind(**micro)
    assert float(blind_loss) == alone
    blind_loss.backward()
    assert float(model.mm_projector.layers[1].weight.grad.abs().max()) == 0.0


def test_gradient_checkpointing_changes_nothing(model: VilaM3ForConditionalGeneration, dataset: MixtureDataset) -> None:
    micro = pad_items([dataset[0], dataset[1]])
    model.train()
    loss, gradients = mean_gradients(model, micro)
    checkpointed_loss, checkpointed = mean_gradients(checkpoint_gradients(model), micro)
    assert checkpointed_loss == loss
    assert_close(gradients, checkpointed)


def test_a_merged_adapter_is_the_attached_one(model: VilaM3ForConditionalGeneration, dataset: MixtureDataset) -> None:
    micro = pad_items([dataset[0], dataset[4]])
    train_adapter(model, rank=4, includes_tower=True)
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (SupervisedLoss(model)(**micro) / supervised_count(micro)).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        attached = SupervisedLoss(model)(**micro) / supervised_count(micro)
        merged = SupervisedLoss(merge_adapter(model.adapter))(**micro) / supervised_count(micro)
    assert float(merged) == pytest.approx(float(attached), abs=1e-5)


def test_a_loss_that_is_no_number_stops_or_is_skipped(start: Any) -> None:
    def spoil(micros: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
        micros[0]["pixel_values"] = micros[0]["pixel_values"] * float("nan")
        return micros

    for policy in ("stop", "skip"):
        trainer = start(epochs=1, on_nan=policy)
        collate = trainer.data_loader.collate_fn
        trainer.data_loader.__dict__["collate_fn"] = lambda items, collate=collate: spoil(collate(items))
        before = weights_of(trainer)
        if policy == "stop":
            with pytest.raises(UserError, match="step 1: the loss is nan; lower the learning rate"):
                trainer.run()
        else:
            trainer.run()
        assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer).items())


def test_a_corrupt_image_stops_or_gives_way_to_the_next_record(
    dataset: MixtureDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data/0_0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"row 1 of data set conversations: .*; mend it, or set on_error to skip"):
        dataset[0]
    dataset.on_error = "skip"
    assert torch.equal(dataset[0].input_ids, dataset[1].input_ids)
    assert "skipped: row 1 of data set conversations" in caplog.text


def test_a_damaged_line_stops_or_gives_way_to_the_next_record(dataset: MixtureDataset, tmp_path: Path) -> None:
    file = tmp_path / "data/records.jsonl"
    second, lines = dataset[1], file.read_text().splitlines(keepends=True)
    file.write_text("".join([lines[0][:40] + "\n", *lines[1:]]))
    with pytest.raises(UserError, match=r"the line is not valid JSON.*set on_error to skip"):
        open_records(file, dataset.processor)[0]
    skipping = open_records(file, dataset.processor, on_error="skip")
    assert torch.equal(skipping[0].input_ids, second.input_ids)


def test_an_empty_shard_stops_or_is_left_out(dataset: MixtureDataset, tmp_path: Path) -> None:
    empty, full = tmp_path / "empty.jsonl", tmp_path / "data/records.jsonl"
    empty.touch()
    with pytest.raises(UserError, match=r"empty.jsonl holds no conversation; mend it, or set on_error to skip"):
        open_mixture([full, empty], tmp_path)
    assert len(open_mixture([full, empty], tmp_path, on_error="skip")) == 10
    with pytest.raises(UserError, match=r"missing.jsonl cannot be read .*No such file"):
        open_mixture([full, tmp_path / "missing.jsonl"], tmp_path)
    with pytest.raises(UserError, match="no conversation in .*empty.jsonl; give JSONL files with rows"):
        open_mixture([empty], tmp_path, on_error="skip")
    with pytest.raises(UserError, match="no conversations are given; name JSONL files, or the config of a mixture"):
        open_mixture()


def test_a_kept_row_is_not_read_again(tmp_path: Path, processor: Any) -> None:
    file = write_records(tmp_path / "kept", range(5))
    kept = open_records(file, processor, cache_gib=1.0)
    first = kept[0]
    (tmp_path / "kept/0_0.png").unlink()
    assert kept[0] is first
    with pytest.raises(UserError, match="0_0.png"):
        open_records(file, processor)[0]


class _Sizes:
    """Stands for a mixture of three data sets."""

    sample_lengths = (13, 7, 2)
    quotas = None
    data_sets = ()


def test_steps_are_the_recorded_orders_of_all_ranks(shared: Path) -> None:
    """Each process's steps, joined, are its recorded order (shared/golden/vila/sampler.json)."""
    import json

    cases = json.loads((shared / "golden/vila/sampler.json").read_text())
    assert cases
    for case in cases:
        mixture: Any = _Sizes()
        mixture.sample_lengths = case["sample_lens"]
        size, world = case["batch_size"], case["num_replicas"]
        for rank, expected in enumerate(case["indices_per_rank"]):
            sampler = StepBatches(mixture, size * world, case["epoch"] + 1, case["seed"], rank=rank, world_size=world)
            sampler.first_step = case["epoch"] * sampler.steps_per_pass
            assert [index for step in sampler for index in step] == expected


@pytest.mark.parametrize("replica_count", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_steps_do_not_depend_on_the_number_of_processes(replica_count: int, world_size: int) -> None:
    def steps(count: int, first: int = 0) -> list[list[int]]:
        samplers = [
            StepBatches(_Sizes(), 4, 2, rank=rank, world_size=count, replica_count=replica_count)  # type: ignore[arg-type]
            for rank in range(count)
        ]
        for sampler in samplers:
            sampler.first_step = first
        return [sum(parts, []) for parts in zip(*samplers, strict=True)]

    assert steps(world_size) == steps(replica_count)
    assert steps(world_size, first=5) == steps(replica_count)[5:]
    assert len(steps(world_size)) == 2 * (3 + 1)


def test_a_resumed_order_is_that_of_the_first_number_of_processes() -> None:
    two = StepBatches(_Sizes(), 4, replica_count=2)  # type: ignore[arg-type]
    one = StepBatches(_Sizes(), 4)  # type: ignore[arg-type]
    assert list(one) != list(two)
    one.load_state_dict(two.state_dict())
    assert list(one) == list(two)
    other = StepBatches(_Sizes(), 2)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"another epoch_length 10 \(was 4\), batch_size 2 \(was 4\)"):
        other.load_state_dict(two.state_dict())


def test_conversations_of_like_length_are_computed_together(dataset: MixtureDataset) -> None:
    items = [dataset[index] for index in range(10)]
    lengths = [micro["attention_mask"].sum(dim=1).tolist() for micro in StepCollator(2)(items)]
    assert sum(lengths, []) == sorted(len(item.input_ids) for item in items)


def test_packed_rows_hold_no_padding(dataset: MixtureDataset) -> None:
    items = [dataset[index] for index in range(10)]
    micros = StepCollator(2, pack_length=400)(items)
    assert all(micro["input_ids"].shape[0] == 1 and micro["input_ids"].shape[1] <= 400 for micro in micros)
    assert sum(micro["input_ids"].numel() for micro in micros) == sum(len(item.input_ids) for item in items)


def test_a_gradient_that_is_no_number_stops_the_training(start: Any) -> None:
    trainer = start(epochs=1)
    weight = trainer.network.model.mm_projector.layers[1].weight
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(UserError, match="step 1: the gradient's norm is (nan|inf)"):
        trainer.run()


def test_arithmetic_is_bfloat16_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    assert arithmetic("auto", "cuda") is torch.bfloat16
    assert arithmetic("bfloat16", "cpu") is torch.bfloat16
    for amx, avx in ((True, False), (False, True), (False, False)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert arithmetic("auto", "cpu") is (torch.bfloat16 if amx or avx else torch.float32)
    with pytest.raises(UserError, match="unknown amp_dtype 'bfloat'; did you mean 'bfloat16'"):
        arithmetic("bfloat", "cpu")


def test_an_average_forgets_the_weights_it_began_with() -> None:
    """After 30 steps with a decay of 0.999 a constant average would still hold 97% of them."""
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 1.0)
    average = WeightAverage(network, 0.999)
    torch.nn.init.constant_(network.weight, 0.0)
    left = 1.0
    for step in range(1, 31):
        average.update()
        left *= (1 + step) / (10 + step)
        assert float(average.averages["weight"]) == pytest.approx(left)
    assert left < 1e-3
    other = WeightAverage(network, 0.999)
    other.load_state_dict(average.state_dict())
    for each in (average, other):
        torch.nn.init.constant_(network.weight, 1.0)
        each.update()
    assert torch.equal(average.averages["weight"], other.averages["weight"])


def test_dropout_varies_training_alone(model: VilaM3ForConditionalGeneration, dataset: MixtureDataset) -> None:
    micro = pad_items([dataset[0], dataset[1]])
    names = set(model.state_dict())
    before = float(SupervisedLoss(model.eval())(**micro))
    drop_residuals(model, 0.3)
    loss = SupervisedLoss(model)
    assert set(model.state_dict()) == names
    assert float(loss.eval()(**micro)) == before
    torch.manual_seed(0)
    first, second = (float(loss.train()(**micro)) for _ in range(2))
    torch.manual_seed(0)
    assert first != second
    assert float(loss(**micro)) == first


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_dropout_that_is_no_share_is_refused(model: VilaM3ForConditionalGeneration, share: float) -> None:
    with pytest.raises(UserError, match="is no share"):
        drop_residuals(model, share)
