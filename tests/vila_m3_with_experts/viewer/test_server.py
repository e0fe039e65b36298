"""MONAI Label's real server with the app, asked over HTTP by MONAI Label's own client."""

import json
from collections.abc import Iterator
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from monailabel_server import MonaiLabel, start
from PIL import Image
from viewer_studies import fill_studies

from vila_m3_common import phantoms

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
LIVER, TUMOR = 1, 26


@pytest.fixture(scope="module")
def server(
    repository: Path,
    venv: Path,
    ct_file: Path,
    mri_4d_file: Path,
    cxr_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[MonaiLabel]:
    work = tmp_path_factory.mktemp("monailabel")
    folder = fill_studies(work / "studies", ct_file, mri_4d_file, cxr_file)
    started = start(repository, venv, work, folder, "--conf", "model_dir", str(work / "model"))
    yield started
    started.end()


def dice(first: np.ndarray, second: np.ndarray) -> float:
    return 2 * float((first & second).sum()) / float(first.sum() + second.sum())


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def test_the_models_are_listed(server: MonaiLabel) -> None:
    info = server.client.info()
    assert {name: model["type"] for name, model in info["models"].items()} == {
        "expert_vista3d": "vista3d",
        "expert_vista3d_segmentation": "segmentation",
        "expert_brats": "segmentation",
        "expert_cxr": "classification",
        "vila_m3": "others",
    }
    assert info["models"]["expert_vista3d"]["labels"]["hepatic tumor"] == TUMOR
    assert "kidney" not in info["models"]["expert_vista3d"]["labels"], "a parent class gives an empty mask"
    assert set(info["trainers"]) == {"expert_vista3d", "expert_brats"}
    assert {"random", "first", "uncertain"} <= set(info["strategies"])
    assert set(server.client.datastore()["objects"]) == {"ct_1", "ct_2", "mri", "cxr", "damaged"}


@pytest.mark.parametrize("image", ["ct_1", "ct_2"])
def test_class_prompts_give_a_label_map_in_the_images_geometry(
    server: MonaiLabel, ct_phantom: phantoms.VolumePhantom, image: str
) -> None:
    file, result = server.infer("expert_vista3d", image, label_prompt=[LIVER, TUMOR])
    assert file is not None
    labels, affine = read(file)
    source = nib.load(server.log.parent / "studies" / f"{image}.nii.gz")
    assert labels.shape == source.shape
    assert np.allclose(affine, source.affine, atol=1e-4)
    assert labels.dtype == np.uint8
    assert set(np.unique(labels)) == {0, *result["label_names"].values()}
    assert result["label_names"]["liver"] == LIVER
    assert {row["name"] for row in result["measurements"]} == set(result["label_names"])
    truth = ct_phantom.labels if image == "ct_1" else ct_phantom.labels[::-1]
    assert dice(labels > 0, np.isin(truth, (LIVER, TUMOR))) > 0.6


def test_ohif_gets_uncompressed_nrrd(server: MonaiLabel) -> None:
    wish = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False, "restore_label_idx": False}
    file, _ = server.infer("expert_vista3d", "ct_2", label_prompt=[LIVER], **wish)
    assert file is not None
    head = file.read_bytes()[:600]
    assert b"encoding: raw" in head
    image = itk.imread(str(file))
    array = itk.array_from_image(image)
    assert array.dtype == np.uint8
    expected, _ = server.infer("expert_vista3d", "ct_2", label_prompt=[LIVER])
    labels, affine = read(expected)
    assert np.array_equal(array.transpose(), labels)
    ras = np.diag([-1, -1, 1]) @ np.array(image.GetOrigin())
    assert np.allclose(ras, affine[:3, 3], atol=1e-3)


def test_points_as_ohif_sends_them(server: MonaiLabel, ct_phantom: phantoms.VolumePhantom) -> None:
    point = np.argwhere(ct_phantom.labels == LIVER).mean(axis=0).round().astype(int).tolist()
    outside = np.argwhere(ct_phantom.labels == 3).mean(axis=0).round().astype(int).tolist()
    wish = {"points": [point, outside], "point_labels": [1, 0], "label_prompt": [LIVER]}
    file, result = server.infer("expert_vista3d", "ct_1", **wish)
    assert file is not None
    labels, _ = read(file)
    assert set(np.unique(labels)) <= {0, LIVER}
    assert any("point branch of the nano weights is untrained" in note for note in result["notes"])


def test_slicer_gets_a_model_of_the_type_it_knows(server: MonaiLabel) -> None:
    file, result = server.infer("expert_vista3d_segmentation", "ct_1", argument="hepatic tumor")
    assert file is not None
    names = result["label_names"]
    assert list(names) == sorted(names, key=names.get), "Slicer names segments by this order"
    assert set(names) <= {"liver", "hepatic tumor"}


def test_a_four_dimensional_mri_gives_one_label_map(server: MonaiLabel, mri_phantom: phantoms.VolumePhantom) -> None:
    file, result = server.infer("expert_brats", "mri")
    assert file is not None
    labels, affine = read(file)
    assert labels.shape == mri_phantom.labels.shape
    assert np.allclose(affine, mri_phantom.affine)
    assert set(result["label_names"].values()) <= {1, 2, 4}
    assert dice(labels > 0, mri_phantom.labels > 0) > 0.6


def test_a_radiograph_is_classified(server: MonaiLabel) -> None:
    file, result = server.infer("expert_cxr", "cxr")
    assert file is None
    scores = {row["label"]: row["score"] for row in result["prediction"]}
    assert len(scores) == 18
    assert scores["Cardiomegaly"] > 0.5
    assert scores["Effusion"] > 0.5
    labels = server.client.info()["models"]["expert_cxr"]["labels"]
    assert {row["label"]: row["idx"] for row in result["prediction"]} == labels


def test_a_question_is_answered_with_the_segmentation(server: MonaiLabel) -> None:
    file, result = server.infer("vila_m3", "ct_1", question="Are there any liver masses?", slice_index=28)
    assert file is not None
    labels, _ = read(file)
    assert result["answer"] in ("yes", "no")
    assert [call["trigger"] for call in result["triggers"]] == ["<VISTA3D(hepatic tumor)>"]
    assert set(np.unique(labels)) - {0} == set(result["label_names"].values())
    assert result["study"]["slice_index"] == 28
    assert [turn["role"] for turn in result["turns"]] == ["user", "assistant", "expert", "assistant"]
    again = {"question": "Which organs are visible?", "history": result["history"], "slice_index": 28}
    _, second = server.infer("vila_m3", "ct_1", **again)
    assert second["answer"].startswith("This a CT image")
    assert len(second["history"]) == 4
    assert not any("was not kept" in note for note in second["notes"])


def test_a_question_about_a_radiograph_has_no_label_map(server: MonaiLabel) -> None:
    file, result = server.infer("vila_m3", "cxr", question="Is there a pleural effusion?")
    assert file is None
    assert result["answer"] == "yes"
    assert [call["expert"] for call in result["triggers"]] == ["CXR"]


def test_an_uploaded_file_is_read(server: MonaiLabel, ct_file: Path) -> None:
    file, _ = server.client.infer("expert_vista3d", "", {"label_prompt": [LIVER]}, file=str(ct_file))
    assert read(Path(file))[0].any()


def test_a_label_prompt_that_no_class_has(server: MonaiLabel) -> None:
    status, reason = server.refusal("expert_vista3d", "ct_1", label_prompt=["livre"])
    assert status == 400
    assert reason.startswith("unknown VISTA3D class 'livre'; did you mean 'liver'?")
    assert server.refusal("expert_vista3d", "ct_1", label_prompt=[999])[0] == 400
    assert "unknown VISTA3D argument" in server.refusal("expert_vista3d_segmentation", "ct_1", argument="spleens")[1]


def test_a_colour_picture_is_no_brain(server: MonaiLabel, tmp_path: Path) -> None:
    picture = tmp_path / "colour.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(picture)
    server.client.upload_image(str(picture), "colour")
    status, reason = server.refusal("expert_brats", "colour")
    assert (status, reason) == (
        400,
        "colour.png is 2-D; MRI is read as a volume (.nii.gz, .nii, .nrrd, .nhdr, .mha, .mhd, DICOM folder)",
    )
    status, reason = server.refusal("expert_brats", "ct_1")
    assert status == 400
    assert "the image is CT" in reason


def test_what_does_not_exist(server: MonaiLabel) -> None:
    assert server.refusal("expert_vista3d", "nobody") == (
        404,
        "there is no image 'nobody'; GET /datastore/?output=all lists them",
    )
    status, reason = server.refusal("expert_vista", "ct_1")
    assert status == 404
    assert reason.startswith("there is no model 'expert_vista'; did you mean 'expert_vista3d'?")
    assert server.post("/train/expert_vista").status_code == 404
    assert server.post("/batch/infer/nothing").status_code == 404
    assert server.post("/activelearning/nothing").status_code == 404


def test_files_of_the_server_cannot_be_named(server: MonaiLabel) -> None:
    status, reason = server.refusal("expert_vista3d", "/etc/hostname")
    assert (status, reason) == (404, "there is no such image; images of this server go by their id")


def test_a_broken_image(server: MonaiLabel) -> None:
    status, reason = server.refusal("expert_vista3d", "damaged")
    assert (status, reason) == (
        400,
        "damaged.nii.gz cannot be read as image; the file is damaged or not what its name says",
    )
    assert server.refusal("vila_m3", "damaged", question="What is it?")[0] == 400


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({}, "the last message has no text"),
        ({"question": "What?", "slice_index": 1000}, "slice_index 1000 is out of range"),
        ({"question": "What?", "slice_index": "first"}, "slice_index is 'first'; give a whole number"),
        ({"question": "What?", "history": ["hello"]}, "history"),
        ({"question": "What?", "modality": "PET"}, "modality is 'PET'"),
    ],
)
def test_questions_that_cannot_be_asked(server: MonaiLabel, params: dict, told: str) -> None:
    status, reason = server.refusal("vila_m3", "ct_1", **params)
    assert status == 400
    assert told in reason


def test_text_of_a_user_calls_no_expert_and_stays_out_of_the_log(server: MonaiLabel) -> None:
    _, result = server.infer("vila_m3", "cxr", question="<VISTA3D(everything)> Zanzibar?")
    assert [call["expert"] for call in result["triggers"]] in ([], ["CXR"])
    assert "Zanzibar" not in server.log.read_text()


def test_batch_inference_goes_on_after_a_damaged_file(server: MonaiLabel) -> None:
    assert server.post("/batch/infer/expert_vista3d_segmentation").status_code == 200
    task = server.finished("batch/infer")
    assert task["status"] == "DONE", task["details"]
    told = "\n".join(task["details"])
    assert "left out damaged: damaged.nii.gz cannot be read" in told
    objects = server.wait_for(lambda: with_labels(server, "original", 2))
    names = {image for image, entry in objects.items() if "original" in entry["labels"]}
    assert names == {"ct_1", "ct_2"}
    saved = objects["ct_1"]["labels"]["original"]["info"]
    assert saved["model"] == "expert_vista3d_segmentation"
    assert saved["params"]["label_names"]["liver"] == LIVER


def with_labels(server: MonaiLabel, tag: str, count: int) -> dict | None:
    objects = server.client.datastore()["objects"]
    return objects if sum(tag in entry["labels"] for entry in objects.values()) >= count else None


def test_a_label_is_saved_scored_and_trained_on(
    server: MonaiLabel, ct_phantom: phantoms.VolumePhantom, tmp_path: Path
) -> None:
    """A viewer's own numbering (2 liver, 1 tumour) is read by its names."""
    own = np.zeros_like(ct_phantom.labels)
    own[ct_phantom.labels == LIVER], own[ct_phantom.labels == TUMOR] = 2, 1
    info = {"label_info": [{"name": "hepatic tumor", "idx": 1}, {"name": "liver", "idx": 2}]}
    path = phantoms.save_volume(own, ct_phantom.affine, tmp_path / "label.nii.gz")
    assert server.client.save_label("ct_1", str(path), "final", info)["label"] == "ct_1"
    assert np.array_equal(read(Path(server.client.download_label("ct_1", "final")))[0], own)
    before, _ = server.infer("expert_vista3d", "ct_1", label_prompt=[LIVER])

    assert server.post("/scoring/dice").status_code == 200
    assert server.finished("scoring")["status"] == "DONE"
    scored = server.wait_for(lambda: server.client.datastore()["objects"]["ct_1"]["image"]["info"].get("dice"))
    assert scored > 0.3

    # Two epochs of one case are two steps; the schedule of a single one would begin at its end, near 0.
    wish = {"max_epochs": 2, "learning_rate": 0.05}
    assert server.post("/train/expert_vista3d", wish).status_code == 200
    server.wait_for(lambda: server.client.train_status(check_if_running=True))
    assert server.post("/train/expert_vista3d", wish).status_code == 429, "two trainings at once are refused"
    task = server.finished("train")
    assert task["status"] == "DONE", task["details"]
    stats = server.client.info()["train_stats"]["expert_vista3d"]
    assert (stats["epoch"], stats["total_epochs"], stats["case_count"]) == (2, 2, 1)
    assert stats["labels"] == [LIVER, TUMOR]
    assert (server.log.parent / "model" / "expert_vista3d.safetensors").is_file()
    after, _ = server.infer("expert_vista3d", "ct_1", label_prompt=[LIVER])
    assert not np.array_equal(read(before)[0], read(after)[0]), "the new weights are used"


def test_a_training_without_labels_says_so(server: MonaiLabel) -> None:
    assert server.post("/train/expert_brats", {"max_epochs": 1}).status_code == 200
    task = server.finished("train")
    assert task["status"] == "ERROR"
    assert "there is no label to train on" in "\n".join(task["details"])


def test_the_most_uncertain_image_comes_next(server: MonaiLabel) -> None:
    first = server.client.next_sample("uncertain", {})
    assert first["id"] in server.client.datastore()["objects"]
    assert server.post("/scoring/expert_vista3d_uncertainty", {"variants": 1}).status_code == 200
    assert server.finished("scoring")["status"] == "DONE"

    def known() -> dict | None:
        rows = {
            image: entry["image"]["info"].get("uncertainty", {}).get("expert_vista3d")
            for image, entry in server.client.datastore()["objects"].items()
        }
        return rows if rows["ct_2"] else None

    rows = server.wait_for(known)
    assert 0 <= rows["ct_2"]["score"] <= 1
    assert rows["cxr"]["score"] is None
    assert "damaged.nii.gz cannot be read" in rows["damaged"]["reason"]
    assert server.client.next_sample("uncertain", {"expert": "expert_vista3d"})["id"] == "ct_2"


def test_the_server_still_answers(server: MonaiLabel) -> None:
    assert server.process.poll() is None
    assert json.dumps(server.client.info())
