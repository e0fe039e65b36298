"""Prompt of the item, resampling beside text, small tumours."""

import json
import re

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from vila_m3_common.errors import UserError
from vista3d_expert.transforms import MapClassesd, ReadPromptd, RemoveSmallTumorsd


def label_map(labels, spacing=2.0):
    return MetaTensor(torch.from_numpy(labels)[None], affine=torch.diag(torch.tensor([spacing] * 3 + [1.0])))


def test_prompt_becomes_one_json_string():
    assert ReadPromptd()({"label_prompt": ["liver", 26]}) == {"label_prompt": "[1, 26]", "clicks": ""}


def test_item_without_prompt_gets_everything():
    assert len(json.loads(ReadPromptd()({})["label_prompt"])) == 117


def test_unknown_class_in_an_item_is_a_user_error():
    with pytest.raises(UserError, match="did you mean 'spleen'"):
        ReadPromptd()({"label_prompt": "spleeen"})


def test_small_tumor_takes_the_label_around_it():
    labels = np.ones((12, 12, 12), np.uint8)
    labels[1, 1, 1] = 26
    labels[4:8, 4:8, 4:8] = 26
    item = {"pred": label_map(labels), "image": label_map(labels)}
    filtered = RemoveSmallTumorsd("pred", min_volume_ml=0.1)(item)["pred"]
    assert filtered[0, 1, 1, 1] == 1
    assert (filtered == 26).sum() == 64


def test_tumor_volume_is_measured_in_ml():
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[1:3, 1:3, 1:3] = 23  # 8 voxels
    at_2_mm = {"pred": label_map(labels, 2.0), "image": label_map(labels, 2.0)}
    at_4_mm = {"pred": label_map(labels, 4.0), "image": label_map(labels, 4.0)}
    transform = RemoveSmallTumorsd("pred", min_volume_ml=0.1)
    assert (transform(at_2_mm)["pred"] == 23).sum() == 0
    assert (transform(at_4_mm)["pred"] == 23).sum() == 8


def test_organs_and_zero_threshold_are_left_alone():
    labels = np.zeros((6, 6, 6), np.uint8)
    labels[0, 0, 0], labels[3, 3, 3] = 1, 26
    item = {"pred": label_map(labels), "image": label_map(labels)}
    assert (RemoveSmallTumorsd("pred", min_volume_ml=0)(item)["pred"][0].numpy() == labels).all()
    assert (RemoveSmallTumorsd("pred", min_volume_ml=9)(item)["pred"] == 1).sum() == 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a", [0, 1, 0, 200]), ("other", [0, 5, 0, 0])],
)
def test_each_data_set_has_its_mapping_and_classes_without_one_become_background(name, expected):
    mapped = MapClassesd("label", {"a": [[1, 1], [7, 200]], "default": [[1, 5]]})
    labels = np.array([0, 1, 3, 7]).reshape(1, 1, 4)
    result = mapped({"label": label_map(labels), "dataset_name": name})["label"]
    assert isinstance(result, MetaTensor)
    assert result.dtype == torch.uint8
    assert result.flatten().tolist() == expected


def test_label_maps_stored_as_floats_keep_their_ids():
    labels = np.array([0, 25.9999, 3.0001, 128.0], np.float32).reshape(1, 1, 4)
    assert MapClassesd("label")({"label": label_map(labels)})["label"].flatten().tolist() == [0, 26, 3, 128]


@pytest.mark.parametrize("value", [2.5, -1, 300])
def test_values_that_are_no_ids_are_refused(value):
    labels = np.array([0, value], np.float32).reshape(1, 1, 2)
    with pytest.raises(UserError, match=r"label map label holds values from .* that are no class ids"):
        MapClassesd("label")({"label": label_map(labels)})


def test_a_mapping_to_an_impossible_id_is_refused():
    with pytest.raises(UserError, match=re.escape("the class mapping 1 -> 255 cannot be used; ids of the data set")):
        MapClassesd("label", {"a": [[1, 255]]})
