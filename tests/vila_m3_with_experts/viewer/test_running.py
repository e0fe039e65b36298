"""Experts as a viewer asks for them: wishes, refusals, label maps; in this process, without MONAI Label."""

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from viewer_studies import flip_and_shift

from vila_m3_common import phantoms
from vila_m3_common.errors import UserError
from vila_m3_composite.viewer import label_maps
from vila_m3_composite.viewer.models import ViewerModels
from vila_m3_composite.viewer.running import Wish, describe_result, describe_scores, run_on
from vila_m3_composite.viewer.settings import ViewerSettings
from vila_m3_composite.viewer.studies import write_studies


def test_class_prompts_reach_the_expert(
    models: ViewerModels, ct_file: Path, ct_phantom: phantoms.VolumePhantom, tmp_path: Path
) -> None:
    wish = Wish.from_params({"label_prompt": [1], "device": "cuda", "model": "expert_vista3d"})
    result = run_on(models, "expert_vista3d", ct_file, wish, tmp_path)
    told = describe_result(result, "expert_vista3d")
    assert told["label_names"] == {"liver": 1}
    assert told["label_info"][0] | {"color": None} == {
        "name": "liver",
        "idx": 1,
        "description": "liver",
        "color": None,
        "model_name": "expert_vista3d",
    }
    assert result.label_map_path is not None
    found = np.asarray(nib.Nifti1Image.from_filename(result.label_map_path).dataobj) == 1
    truth = ct_phantom.labels == 1
    assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.6


def test_points_reach_the_expert_and_prompts_do_not_stay(
    models: ViewerModels, ct_file: Path, ct_phantom: phantoms.VolumePhantom, tmp_path: Path
) -> None:
    point = np.argwhere(ct_phantom.labels == 1).mean(axis=0).round().tolist()
    wish = Wish.from_params({"points": [point], "point_labels": [1], "label_prompt": [1]})
    marked = run_on(models, "expert_vista3d", ct_file, wish, tmp_path)
    assert any("point branch" in note for note in marked.notes)
    plain = run_on(models, "expert_vista3d", ct_file, Wish("hepatic tumor"), tmp_path)
    assert {row["name"] for row in plain.measurements} <= {"liver", "hepatic tumor"}
    assert not any("point branch" in note for note in plain.notes)


def test_a_four_dimensional_mri_is_one_image(models: ViewerModels, mri_4d_file: Path, tmp_path: Path) -> None:
    result = run_on(models, "expert_brats", mri_4d_file, Wish(), tmp_path)
    assert set(describe_result(result, "expert_brats")["label_names"].values()) <= {1, 2, 4}


def test_scores_have_monai_labels_form(models: ViewerModels, cxr_file: Path, tmp_path: Path) -> None:
    result = run_on(models, "expert_cxr", cxr_file, Wish(), tmp_path)
    told = describe_scores(result, {"Effusion": 7})
    (effusion,) = [row for row in told["prediction"] if row["label"] == "Effusion"]
    assert effusion["idx"] == 7
    assert effusion["score"] == round(result.scores["Effusion"], 6)


@pytest.mark.parametrize(
    ("name", "image", "wish", "told"),
    [
        ("expert_vista3d", "ct_file", Wish("spleens"), "unknown VISTA3D argument 'spleens'; Valid: everything"),
        ("expert_vista3d", "ct_file", Wish(prompts={"label_prompt": []}), "label_prompt is empty"),
        ("expert_vista3d", "ct_file", Wish(prompts={"label_prompt": [None]}), "unknown VISTA3D class 'None'"),
        ("expert_vista3d", "ct_file", Wish(prompts={"points": [[1, 2]]}), "cannot be read; write them as"),
        ("expert_vista3d", "ct_file", Wish(slice_index=900), "slice_index 900 is out of range"),
        ("expert_vista3d", "mri_4d_file", Wish(), "VISTA3D was not run: it reads one CT volume .* the image is MRI"),
        ("expert_brats", "ct_file", Wish(), "the image is CT. If that is wrong, give the modality"),
        ("expert_brats", "cxr_file", Wish(), "the image is CXR"),
        ("expert_cxr", "ct_file", Wish(), "the image is CT"),
        ("expert_spleen", "ct_file", Wish(), "there is no expert 'expert_spleen'"),
    ],
)
def test_what_cannot_be_run_is_explained(
    models: ViewerModels, name: str, image: str, wish: Wish, told: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UserError, match=told):
        run_on(models, name, request.getfixturevalue(image), wish, tmp_path)


def test_an_option_that_nobody_touched_is_none() -> None:
    """Slicer sends the list of choices as it got it."""
    assert Wish.from_params({"argument": ["everything", "organs"], "modality": ["CT"]}) == Wish()


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"argument": 3}, "argument is 3; give a text"),
        ({"slice_index": 1.5}, "slice_index is 1.5; give a whole number"),
    ],
)
def test_parameters_of_another_type_are_refused(params: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        Wish.from_params(params)


def test_weights_that_were_trained_since_are_used(repository: Path, ct_file: Path, tmp_path: Path) -> None:
    app = repository / "bundles/vila_m3_with_experts/monailabel_app"
    own = ViewerModels(ViewerSettings.from_conf({"model_dir": str(tmp_path)}, app))
    first = own.expert("expert_brats")
    assert own.expert("expert_brats") is first
    stamp = own.weights_stamp("expert_brats")
    weights = repository / "expert_brats" / "models" / "model.safetensors"
    own.trained_weights("expert_brats").write_bytes(weights.read_bytes())
    second = own.expert("expert_brats")
    assert second is not first
    assert second.workflow.parser.get_parsed_content("checkpoint") == str(tmp_path / "expert_brats.safetensors")
    assert own.weights_stamp("expert_brats") != stamp
    with pytest.raises(RuntimeError, match="closed"):
        _ = first.workflow
    own.close()


def test_conf_is_read(repository: Path) -> None:
    app = repository / "bundles/vila_m3_with_experts/monailabel_app"
    conf = {"sequence_order": "flair, t1,t1c,t2", "expert_bundles": "expert_brats", "device": "cpu"}
    composite = ViewerSettings.from_conf(conf, app).composite()
    assert composite["expert_bundles"] == ["expert_brats"]
    assert composite["expert_overrides"]["sequence_order"] == ["flair", "t1", "t1c", "t2"]
    assert composite["expert_overrides"]["device"] == "cpu"
    with pytest.raises(UserError, match="unknown --conf 'devices'; did you mean 'device'?"):
        ViewerSettings.from_conf({"devices": "cpu"}, app)
    with pytest.raises(UserError, match="sequence_order"):
        ViewerSettings.from_conf({"sequence_order": "t1,t2"}, app)


@pytest.mark.parametrize("extension", label_maps.EXTENSIONS)
def test_label_maps_keep_their_place_in_every_format(ct_file: Path, tmp_path: Path, extension: str) -> None:
    flip_and_shift(ct_file, tmp_path / "flipped.nii.gz")
    image = nib.Nifti1Image.from_filename(tmp_path / "flipped.nii.gz")
    labels = (np.asarray(image.dataobj) > 100).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, image.affine), tmp_path / "labels.nii.gz")
    written = label_maps.write_label_map(tmp_path / "labels.nii.gz", extension, is_compressed=False)
    read, expected = (itk.imread(str(path)) for path in (written, tmp_path / "labels.nii.gz"))
    written.unlink()
    assert np.array_equal(itk.array_from_image(read), itk.array_from_image(expected))
    for name in ("GetOrigin", "GetSpacing"):
        assert np.allclose(getattr(read, name)(), getattr(expected, name)(), atol=1e-4)
    directions = [itk.array_from_matrix(one.GetDirection()) for one in (read, expected)]
    assert np.allclose(*directions, atol=1e-6)


def test_a_label_of_fewer_slices_is_brought_onto_the_images_grid() -> None:
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    labels = np.zeros((6, 5, 8), np.uint8)
    labels[1:4, 2:4, 3:6] = 7
    part, part_affine = labels[::-1, :, 3:6], affine.copy()
    part_affine[:3, 3] = (affine @ [5, 0, 3, 1])[:3]
    part_affine[0, 0] *= -1
    assert np.array_equal(label_maps.on_grid(part, part_affine, labels.shape, affine), labels)
    assert label_maps.on_grid(labels, affine, labels.shape, affine) is labels
    part_affine[2, 3] += 12
    with pytest.raises(UserError, match="lies beside the image"):
        label_maps.on_grid(part, part_affine, labels.shape, affine)


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown result_extension '\.\./x\.nii'"):
        label_maps.write_label_map(tmp_path / "labels.nii.gz", "../x.nii")


def test_the_phantom_studies_are_written_once(tmp_path: Path) -> None:
    written = write_studies(tmp_path, count=1)
    assert [path.name for path in written] == ["phantom_ct_1.nii.gz", "phantom_mri_1.nii.gz", "phantom_cxr_1.png"]
    assert nib.load(written[1]).shape[3] == 4
    stamps = [path.stat().st_mtime_ns for path in written]
    assert [path.stat().st_mtime_ns for path in write_studies(tmp_path, count=1)] == stamps
