"""Questions about the same pictures: grouped by the sampler, computed together, with the result of each alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_training import Losses, Start, open_records, write_records

from vila_m3.augmentation import Augmentation
from vila_m3.batches import (
    MixtureDataset,
    PictureGroups,
    SharedRow,
    StepBatches,
    StepCollator,
    pad_items,
    share_items,
    split_group,
)
from vila_m3.configuration import IGNORED_LABEL
from vila_m3.data.record import Message, Record, format_row
from vila_m3.model import VilaM3ForConditionalGeneration
from vila_m3.processor import Encoded, VilaM3Processor
from vila_m3.trainer import SupervisedLoss, supervised_count
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError

PICTURES = [np.random.default_rng(seed).integers(0, 255, (20, 20, 3), dtype=np.uint8) for seed in range(5)]
GROUPS = {
    "image first": ["<image>\nWhich organ?", "<image>\nIs there a mass in the left lung?", "<image>\nWhich plane?"],
    "image last": ["Which organ?\n<image>", "Is there a mass?\n<image>"],
    "both places": ["<image>\nWhich organ?", "Which organ?\n<image>"],
    "four images": [f"T1: <image>, T2: <image>, <image><image>\n{text}" for text in ("Which grade?", "What is it?")],
    "no image": ["Name a lobe of the lung.", "Name a lobe of the liver."],
    "one question": ["<image>\nWhich organ?"],
}


def encode(processor: VilaM3Processor, texts: list[str]) -> list[Encoded]:
    """Encode a group; the second conversation goes on for another turn."""
    items = []
    for number, text in enumerate(texts):
        conversation = Conversation()
        conversation.add("user", text, PICTURES[: text.count("<image>")])
        conversation.add("assistant", "yes" if number else "It is the liver.")
        if number == 1:
            conversation.add("user", "How many?")
            conversation.add("assistant", "There are 2.")
        items.append(processor.encode(conversation))
    return items


def loss_and_gradients(model: VilaM3ForConditionalGeneration, micro: dict[str, torch.Tensor]) -> Any:
    model.zero_grad()
    loss = SupervisedLoss(model)(**micro) / supervised_count(micro)
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("names", [[name] for name in GROUPS] + [list(GROUPS)], ids=[*GROUPS, "all of them"])
def test_sharing_changes_neither_loss_nor_gradients(
    model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, names: list[str], attention: str
) -> None:
    model.set_attn_implementation(attention)
    groups = [encode(processor, GROUPS[name]) for name in names]
    shared = share_items([SharedRow.of(group) for group in groups])
    loss, gradients = loss_and_gradients(model, pad_items([item for group in groups for item in group]))
    shared_loss, shared_gradients = loss_and_gradients(model, shared)
    assert shared_loss == pytest.approx(loss, abs=1e-5)
    assert shared_gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        torch.testing.assert_close(shared_gradients[name], value, atol=1e-5, rtol=1e-5, msg=name)


def test_a_group_encodes_its_picture_once_and_writes_its_beginning_once(processor: VilaM3Processor) -> None:
    items = encode(processor, GROUPS["image first"])
    row = SharedRow.of(items)
    assert len(row.pixel_values) == 1
    assert row.shown.tolist() == [0]
    shared = int((row.parts == 0).sum())
    assert shared > processor.tokens_per_image
    assert len(row.input_ids) == sum(len(item.input_ids) for item in items) - 2 * shared
    micro = share_items([row])
    assert supervised_count(micro) == sum(int((item.labels != IGNORED_LABEL).sum()) for item in items)


@pytest.mark.parametrize("longest", [None, 60, 1])
def test_a_group_that_is_too_long_has_several_rows(
    model: VilaM3ForConditionalGeneration, processor: VilaM3Processor, longest: int | None
) -> None:
    groups = [encode(processor, texts) for texts in GROUPS.values()]
    micros = StepCollator(4, longest, shares_pictures=True)(groups)
    items = [item for group in groups for item in group]
    assert sum(map(supervised_count, micros)) == sum(int((item.labels != IGNORED_LABEL).sum()) for item in items)
    if longest is not None:
        pieces = [piece for group in groups for piece in split_group(group, longest)]
        assert len(pieces) > len(groups)
        assert all(len(SharedRow.of(piece).input_ids) <= longest or len(piece) == 1 for piece in pieces)
    with torch.no_grad():
        total = sum(float(SupervisedLoss(model)(**micro)) for micro in micros)
        assert total == pytest.approx(float(SupervisedLoss(model)(**pad_items(items))), abs=1e-4)


@pytest.fixture
def asked(tmp_path: Path, processor: VilaM3Processor) -> MixtureDataset:
    """Nine questions: five about one picture, three about another one, one without."""
    file = write_records(tmp_path / "asked", [2, 3])
    rows = [("2_0.png",)] * 5 + [("3_0.png",)] * 3 + [()]
    records = []
    for number, images in enumerate(rows):
        text = f"{'<image>' * len(images)}Question {number}?"
        records.append(Record(str(number), (Message("user", text), Message("assistant", "yes")), images))
    file.write_text("".join(f"{format_row(record)}\n" for record in records))
    return open_records(file, processor, cache_gib=1.0)


def test_groups_hold_every_row_once_and_ask_about_one_picture(asked: MixtureDataset) -> None:
    groups = PictureGroups(asked, group_size=2)
    assert groups.sample_lengths == [6]
    rows = [groups[index] for index in range(len(groups))]
    assert sorted(map(len, rows)) == [1, 1, 1, 2, 2, 2]
    for items in rows:
        assert len({item.pixel_values.numpy().tobytes() for item in items}) == 1
    texts = sorted(tuple(item.input_ids.tolist()) for items in rows for item in items)
    assert texts == sorted(tuple(asked[index].input_ids.tolist()) for index in range(9))


def test_groups_of_one_keep_the_order_of_the_rows(asked: MixtureDataset) -> None:
    groups = PictureGroups(asked)
    assert list(StepBatches(groups, 2, 3)) == list(StepBatches(asked.mixture, 2, 3))
    assert torch.equal(groups[4][0].input_ids, asked[4].input_ids)


def test_rows_about_a_kept_picture_do_not_read_it_again(asked: MixtureDataset) -> None:
    first = asked[0]
    for picture in Path(asked.mixture[0].image_root).glob("2_*.png"):
        picture.unlink()
    assert asked[1].pixel_values is first.pixel_values
    assert asked[1].input_ids.tolist() != first.input_ids.tolist()


def test_group_size_below_one_is_refused(asked: MixtureDataset) -> None:
    with pytest.raises(UserError, match="group_size 0 is not a whole number from 1 on"):
        PictureGroups(asked, 0)


def test_a_training_in_groups_learns_what_one_of_single_rows_learns(start: Start, asked: MixtureDataset) -> None:
    """All nine rows in each of two steps: one by one, or as three groups."""
    found = []
    for step_size, group_size in ((9, None), (3, 5)):
        kept = Losses()
        trainer = start(step_size=step_size, micro_batch_size=2, group_size=group_size, handlers=[kept], data=asked)
        trainer.run()
        found.append(
            (list(kept.values.values()), {n: p.detach().clone() for n, p in trainer.network.named_parameters()})
        )
    assert len(found[0][0]) == 2
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, atol=1e-4, rtol=0, msg=name)


def test_augmentation_follows_from_seed_and_step_alone() -> None:
    pixels = torch.rand(3, 3, 24, 24) * 2 - 1
    augment = Augmentation(1.0, seed=3)
    assert torch.equal(augment(pixels, 7), augment(pixels.clone(), 7))
    assert not torch.equal(augment(pixels, 7), augment(pixels, 8))
    assert not torch.equal(augment(pixels, 7), Augmentation(1.0, seed=4)(pixels, 7))
    assert augment(pixels, 7).shape == pixels.shape
    assert torch.equal(Augmentation(0.0)(pixels, 7), pixels)
    assert augment(pixels[:0], 7).shape == (0, 3, 24, 24)


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_augmentation_brings_larger_pictures_to_the_side_of_the_model(strength: float) -> None:
    pixels = torch.rand(3, 3, 30, 30) * 2 - 1
    augment = Augmentation(strength, side=24)
    assert augment(pixels, 7).shape == (3, 3, 24, 24)
    assert augment(pixels[:0], 7).shape == (0, 3, 24, 24)
    assert augment(pixels, 7).std() > 0.25  # a window is cut, not blurred away


def test_augmentation_never_mirrors() -> None:
    """A picture that is bright on its left stays so."""
    pixels = torch.full((64, 3, 24, 24), -1.0)
    pixels[..., :8] = 1.0
    varied = Augmentation(1.0)(pixels, 0)
    assert (varied[..., :12].mean(dim=(1, 2, 3)) > varied[..., 12:].mean(dim=(1, 2, 3))).all()
