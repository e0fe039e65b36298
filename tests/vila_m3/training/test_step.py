from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import Losses

from vila_m3.adapters import merge_adapter
from vila_m3.batches import RecordDataset, pack_items, pad_items
from vila_m3.checkpoint import load_checkpoint
from vila_m3.model import VilaM3ForConditionalGeneration
from vila_m3.packing import expand_image_places
from vila_m3.parity import _without_wrapper
from vila_m3.processor import Encoded
from vila_m3.trainer import SupervisedLoss, checkpoint_gradients, supervised_count, train_adapter, train_parts
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
    model: VilaM3ForConditionalGeneration, dataset: RecordDataset, attention: str
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


def test_a_packed_conversation_does_not_see_its_neighbours(
    model: VilaM3ForConditionalGeneration, dataset: RecordDataset
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


def test_a_batch_of_text_alone_has_a_loss(model: VilaM3ForConditionalGeneration, dataset: RecordDataset) -> None:
    micro = pad_items([dataset[4], dataset[9]])
    assert len(micro["pixel_values"]) == 0
    alone = float(SupervisedLoss(model)(**micro))
    blind = SupervisedLoss(model, always_sees=True)
    blind_loss = blind(**micro)
    assert float(blind_loss) == alone
    blind_loss.backward()
    assert float(model.mm_projector.layers[1].weight.grad.abs().max()) == 0.0


def test_gradient_checkpointing_changes_nothing(model: VilaM3ForConditionalGeneration, dataset: RecordDataset) -> None:
    micro = pad_items([dataset[0], dataset[1]])
    model.train()
    loss, gradients = mean_gradients(model, micro)
    checkpointed_loss, checkpointed = mean_gradients(checkpoint_gradients(model), micro)
    assert checkpointed_loss == loss
    assert_close(gradients, checkpointed)


def test_a_merged_adapter_is_the_attached_one(model: VilaM3ForConditionalGeneration, dataset: RecordDataset) -> None:
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
    dataset: RecordDataset, caplog: pytest.LogCaptureFixture
) -> None:
    (Path(dataset.image_root) / "0_0.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"record r0: .*; mend it, or set on_error to skip"):
        dataset[0]
    dataset.on_error = "skip"
    assert torch.equal(dataset[0].input_ids, dataset[1].input_ids)
    assert "skipped: record r0" in caplog.text


def test_an_empty_shard_stops_or_is_left_out(dataset: RecordDataset, tmp_path: Path) -> None:
    empty, full = tmp_path / "empty.jsonl", tmp_path / "data/records.jsonl"
    empty.touch()
    with pytest.raises(UserError, match=r"empty.jsonl holds no conversation; mend it, or set on_error to skip"):
        RecordDataset([full, empty], tmp_path, dataset.processor)
    assert len(RecordDataset([full, empty], tmp_path, dataset.processor, on_error="skip")) == 10
    with pytest.raises(UserError, match="no conversation to train on"):
        RecordDataset([empty], tmp_path, dataset.processor, on_error="skip")
