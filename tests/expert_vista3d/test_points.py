"""Clicks of a user: reading, moving to the network's grid, and the mask, checked against MONAI's own path."""

import json
import re

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.apps.vista3d.inferer import point_based_window_inferer
from monai.apps.vista3d.transforms import VistaPostTransformd
from monai.bundle import ConfigParser
from monai.data import MetaTensor, list_data_collate

from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import BundleExpert
from vista3d_expert.hooks import Vista3dFeedback, Vista3dRequest
from vista3d_expert.inferer import PromptInferer, prompted_batch
from vista3d_expert.labels import MARKED_OBJECT, point_class
from vista3d_expert.points import PointPrompt, check_inside, points_on_grid, read_points
from vista3d_expert.transforms import ReadPromptd

ROI = (16, 16, 16)


@pytest.fixture(scope="module")
def volume():
    return torch.rand(1, 1, 30, 24, 26, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("points", "labels", "coordinates", "signs"),
    [
        ([[1, 2, 3]], None, ((1, 2, 3),), (1,)),
        ([1, 2, 3], [1], ((1, 2, 3),), (1,)),
        ("[[1, 2, 3], [4, 5, 6.5]]", "[1, 0]", ((1, 2, 3), (4, 5, 6.5)), (1, 0)),
        (np.array([[1, 2, 3]]), 1, ((1, 2, 3),), (1,)),
    ],
)
def test_points_are_read_from_lists_and_text(points, labels, coordinates, signs):
    assert read_points(points, labels) == PointPrompt(coordinates, signs)


@pytest.mark.parametrize("points", [None, [], "", "[]"])
def test_no_points_are_no_prompt(points):
    assert read_points(points) is None


@pytest.mark.parametrize(
    ("points", "labels", "message"),
    [
        ([[1, 2]], None, "cannot be read; write them as [[x, y, z], ...]"),
        ("[[1, 2", None, "is no list; write it as"),
        ([[1, 2, 3]], [1, 0], "do not fit 1 points; give 1 (inside) or 0 (outside) for each"),
        ([[1, 2, 3]], [2], "do not fit 1 points"),
        ([[1, 2, 3]], [0], "every point is marked as outside (0)"),
        (None, [1], "were given without points"),
    ],
)
def test_unusable_points_say_what_to_give(points, labels, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read_points(points, labels)


def test_a_point_outside_the_image_is_refused():
    check_inside(read_points([0, 0, 9]), (5, 6, 10))
    with pytest.raises(UserError, match=r"point \[0.0, 0.0, 10.0\] lies outside .* from 0, 0, 0 to 4, 5, 9"):
        check_inside(read_points([0, 0, 10]), (5, 6, 10))


@pytest.mark.parametrize(
    ("prompt", "label"),
    [(None, None), ("liver", 1), (["hepatic tumor"], 26), (129, 129), ("rectum", 18), (200, 200), ("[200]", 200)],
)
def test_points_take_one_class_also_one_without_class_prompt_or_a_new_one(prompt, label):
    if prompt == "hepatic tumor":
        prompt = 26
    assert point_class(prompt) == label


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["liver", "spleen"], "points mark one structure, but label_prompt is ['liver', 'spleen']; give one class"),
        ("organs", "points mark one structure"),
        ("kidney", "points cannot mark 'kidney' (2), which VISTA3D segments in parts; give the part under the points"),
        ("livr", "unknown VISTA3D class 'livr'; did you mean 'liver'?"),
        (255, "unknown VISTA3D class id 255"),
    ],
)
def test_an_impossible_class_for_points_says_what_to_give(prompt, message):
    with pytest.raises(UserError, match=re.escape(message)):
        point_class(prompt)


def test_points_keep_their_place_in_the_patient_through_preprocessing(bundle_root, tmp_path):
    """An image stored from left to right, front to back, with uneven voxels: the bright voxel stays under the point."""
    array = np.full((40, 30, 20), -1000, np.float32)
    array[8:32, 6:24, 4:16] = 40
    array[20, 11, 9] = 900
    affine = np.array([[-2.0, 0, 0, 50], [0, -2.0, 0, -40], [0, 0, 4.0, 7], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(array, affine), tmp_path / "ct.nii.gz")
    parser = ConfigParser()
    parser.read_config(str(bundle_root / "configs/inference.json"))
    parser["spacing"] = 2.0
    item = parser.get_parsed_content("preprocessing")({"image": str(tmp_path / "ct.nii.gz"), "points": [20, 11, 9]})
    image, _, _, prompts = prompted_batch(list_data_collate([item]), torch.device("cpu"))
    brightest = np.unravel_index(int(image[0, 0].argmax()), image.shape[2:])
    np.testing.assert_allclose(prompts["points"][0, 0], brightest, atol=0.01)
    assert prompts["point_labels"] == (1,)
    assert prompts["label_ids"] == []


def test_a_point_in_the_air_that_was_cut_off_is_refused():
    image = MetaTensor(torch.rand(1, 1, 8, 8, 8), affine=torch.eye(4)[None])
    image.meta["original_affine"] = np.eye(4)[None]
    with pytest.raises(UserError, match=r"point \[20.0, 1.0, 1.0\] lies in the air around the body"):
        points_on_grid(read_points([20, 1, 1]), image)


def test_a_point_on_the_border_stays_a_hair_inside(network, volume):
    image = MetaTensor(volume, affine=torch.eye(4)[None])
    image.meta["original_affine"] = np.eye(4)[None]
    points = points_on_grid(read_points([0, 0, 25]), image)
    assert (points > 0).all()
    assert points[0, 0, 2] < 25
    coords, _ = network.update_point_to_patch(
        [slice(None)] * 2 + [slice(0, 16), slice(0, 16), slice(10, 26)], points, torch.ones(1, 1)
    )
    assert coords is not None  # MONAI drops a point that lies on the border itself


@pytest.mark.parametrize(
    ("points", "labels"), [([[25, 18, 19]], [1]), ([[5, 6, 7], [25, 18, 19], [12, 12, 12]], [1, 1, 0])]
)
def test_points_without_a_class_give_the_mask_of_monais_path(network, volume, points, labels):
    coords, signs = torch.tensor([points], dtype=torch.float32), torch.tensor([labels])
    with torch.no_grad():
        logits = point_based_window_inferer(
            volume, ROI, network, point_coords=coords, point_labels=signs, transpose=True
        )
    zoo = VistaPostTransformd("pred")({"pred": logits.as_tensor()[0].clone(), "points": coords, "point_labels": signs})
    found = PromptInferer(ROI)(volume, network, [], points=coords, point_labels=labels)[0, 0]
    expected = torch.nan_to_num(zoo["pred"][0], nan=0) > 0
    assert expected.any()
    assert torch.equal(found > 0, expected)
    assert set(torch.unique(found).tolist()) == {0, MARKED_OBJECT}


@pytest.mark.parametrize("class_id", [3, 26])
def test_points_with_a_class_correct_its_mask_as_monais_path_does(network, volume, class_id):
    """The Model Zoo looks only into the windows around the points; here the class is segmented everywhere first."""
    coords, labels = torch.tensor([[[8.0, 8, 8], [9, 12, 10]]]), [1, 0]
    automatic = PromptInferer(ROI)(volume, network, [class_id])[0, 0] == class_id
    found = PromptInferer(ROI)(volume, network, [class_id], points=coords, point_labels=labels)[0, 0] == class_id
    windows = torch.zeros_like(found)
    windows[:17, :20, :18] = True
    assert torch.equal(found[~windows], automatic[~windows])
    assert not torch.equal(found, automatic)


@pytest.mark.parametrize("class_id", [18, 129, 200])
def test_a_class_that_only_points_can_mark_is_looked_for_around_them(network, volume, class_id):
    coords = torch.tensor([[[15.0, 12, 13]]])
    found = PromptInferer(ROI)(volume, network, [class_id], points=coords, point_labels=[1])
    assert set(torch.unique(found).tolist()) <= {0, class_id}
    assert (found[..., 24:] == 0).all()


def test_tumours_take_the_point_embeddings_of_special_classes(network, volume, monkeypatch):
    seen = []
    head = network.point_head.forward
    monkeypatch.setattr(
        network.point_head,
        "forward",
        lambda out, coords, labels, **kw: (seen.append(labels.clone()), head(out, coords, labels, **kw))[1],
    )
    for class_id in (26, 3):
        PromptInferer(ROI)(volume, network, [class_id], points=torch.tensor([[[8.0, 8, 8]]]), point_labels=[1])
    assert [int(labels[0, 0]) for labels in seen] == [3, 1]


def test_request_and_feedback_carry_points(ct_file, tmp_path):
    item = Vista3dRequest(points="[[30, 30, 30]]")(ExpertRequest((str(ct_file),), argument="organs"))
    assert item == {"image": str(ct_file), "label_prompt": None, "points": ((30.0, 30.0, 30.0),), "point_labels": (1,)}
    read = ReadPromptd()(item)
    assert (read["label_prompt"], json.loads(read["clicks"])) == ("[]", [[[30, 30, 30]], [1]])
    labels = torch.zeros(1, 72, 64, 56)
    labels[0, 28:32, 28:32, 28:32] = MARKED_OBJECT
    request = ExpertRequest((str(ct_file),), slice_index=30, question="What is it?", output_dir=str(tmp_path))
    result = Vista3dFeedback()({**read, "pred": labels, "request": request.to_json()})
    assert "describe red: marked object. Use" in result.text
    assert result.measurements[0]["name"] == "marked object"


@pytest.mark.parametrize("label_prompt", [None, "spleen"])
def test_the_bundle_answers_a_click(bundle_root, small_case, tmp_path, label_prompt):
    prompts = {"points": [[12, 17, 20]], "label_prompt": label_prompt, "spacing": 8.0, "roi_size": [40, 40, 40]}
    expert = BundleExpert(bundle_root, {"device": "cpu", **prompts})
    result = expert.run(ExpertRequest((str(small_case / "image.nii.gz"),), output_dir=str(tmp_path)))
    expert.close()
    labels = np.asarray(nib.load(result.label_map_path).dataobj)
    assert labels.shape == (40, 36, 32)
    assert set(np.unique(labels)) <= {0, 3 if label_prompt else MARKED_OBJECT}
    assert any("the point branch of the nano weights is untrained" in note for note in result.notes)
