"""Prompts of a crop, the validation metric."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from vista3d_expert.labels import label_table
from vista3d_expert.training import MeanLabelDice, PromptSampler, label_ratios

PRESENT = np.array([0, 1, 3, 26, 33])


def test_prompts_hold_present_classes_and_absent_ones_with_a_tumor():
    for _ in range(10):
        chosen = set(PromptSampler(absent_count=8).choose(PRESENT).tolist())
        absent = chosen - set(PRESENT.tolist())
        assert chosen - absent == {1, 3, 26, 33}
        assert 8 <= len(absent) <= 9
        assert absent & set(label_table().tumors)


def test_a_tumor_of_the_crop_is_always_prompted():
    sampler = PromptSampler(present_count=1)
    assert all(26 in sampler.choose(PRESENT) for _ in range(20))


def test_crops_are_centred_on_tumors_more_often():
    ratios = label_ratios(15)
    assert len(ratios) == 133
    assert {label for label, ratio in enumerate(ratios) if ratio == 15} == set(label_table().tumors)
    assert ratios[0] == ratios[1] == 1


def test_absent_prompts_come_from_annotated_classes_only():
    sampler = PromptSampler(annotated=[1, 3, 5, 14, 26])
    for _ in range(20):
        assert set(sampler.choose(PRESENT).tolist()) == {1, 3, 5, 14, 26}


def test_a_mapped_data_set_is_prompted_with_its_own_classes_only():
    sampler = PromptSampler(label_mappings={"spleens": [[1, 3]], "default": [[7, 200], [8, 1]]}, absent_count=200)
    assert sampler.choose(PRESENT, "spleens").tolist() == [3]
    assert sampler.choose(PRESENT).tolist() == [1, 200]
    assert len(label_ratios(15, {"default": [[7, 200]]})) == 201


def test_parents_and_point_only_classes_are_never_prompted():
    sampler = PromptSampler(absent_count=200)
    assert not set(sampler.choose(PRESENT).tolist()) & {2, 16, 18, 20, 21, 129, 130, 131}


def test_batch_becomes_one_mask_per_prompt():
    labels = torch.zeros(1, 1, 4, 4, 4)
    labels[..., 0], labels[..., 1] = 1, 26
    batch = {"image": MetaTensor(torch.rand(1, 1, 4, 4, 4)), "label": MetaTensor(labels)}
    image, masks, args, prompts = PromptSampler(absent_count=2)(batch, torch.device("cpu"))
    vector = prompts["class_vector"]
    assert image.shape == (1, 1, 4, 4, 4)
    assert args == ()
    assert masks.shape == (len(vector), 1, 4, 4, 4)
    for label, mask in zip(vector[:, 0], masks, strict=True):
        assert torch.equal(mask[0], (labels[0, 0] == label).float())


def test_metric_averages_cases_first_and_classes_then():
    metric = MeanLabelDice()
    truth = torch.tensor([[1, 1, 0, 2]])
    metric.update(([torch.tensor([[1, 1, 0, 2]])], [truth]))
    metric.update(([torch.tensor([[1, 1, 0, 0]])], [truth]))
    assert metric.compute() == pytest.approx((1.0 + 0.5) / 2)
