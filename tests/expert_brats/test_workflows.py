"""The configs: properties, hooks, inference, training with resumption, evaluation, from any folder."""

import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, create_workflow, verify_net_in_out
from stored_axes import stored_as
from torchrun import run_processes

from brats_expert.expert import BratsRequest
from brats_expert.labels import LABEL_NAMES
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import BundleExpert
from vila_m3_common.phantoms import mri_phantom, save_mri, save_volume
from vila_m3_common.volumes import load_volume
from vila_m3_common.weights import load_weights, read_state_dict

SEQUENCE_FILES = ["t1c.nii.gz", "t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz"]
TINY = {
    "device": "cpu",
    "spacing": 8.0,
    "roi_size": [16, 16, 16],
    "epochs": 2,
    "val_interval": 1,
}


@pytest.fixture(scope="module")
def expert(bundle_root):
    opened = BundleExpert(bundle_root, {"device": "cpu"})
    yield opened
    opened.close()


@pytest.fixture
def datalist_dir(small_phantom, tmp_path):
    """A user's own data set: one phantom in all sections, the image once as four files, once as 4-D."""
    folder = tmp_path / "dataset"
    shutil.copytree(small_phantom, folder)
    volumes = [nib.load(folder / name) for name in SEQUENCE_FILES]
    stacked = np.stack([np.asarray(volume.dataobj) for volume in volumes], axis=-1)
    nib.save(nib.Nifti1Image(stacked, volumes[0].affine), folder / "four.nii.gz")
    training = [{"image": SEQUENCE_FILES, "label": "label.nii.gz"}, {"image": "four.nii.gz", "label": "label.nii.gz"}]
    (folder / "datalist.json").write_text(json.dumps({"training": training, "validation": training[:1]}))
    return folder


def open_workflow(bundle_root, names, workflow_type, **overrides):
    return create_workflow(
        config_file=[str(bundle_root / "configs" / name) for name in names],
        meta_file=str(bundle_root / "configs" / "metadata.json"),
        workflow_type=workflow_type,
        logging_file=False,
        **overrides,
    )


@pytest.mark.parametrize(
    ("names", "workflow_type"),
    [
        (["inference.json"], "infer"),
        (["train.json"], "train"),
        (["train.json", "evaluate.json"], "train"),
    ],
)
def test_monai_finds_its_properties(bundle_root, datalist_dir, tmp_path, names, workflow_type):
    overrides = {"ckpt_dir": str(tmp_path / "ckpt"), "output_dir": str(tmp_path), "dataset_dir": str(datalist_dir)}
    if workflow_type == "infer":
        overrides.pop("ckpt_dir")
    workflow = open_workflow(bundle_root, names, workflow_type, device="cpu", **overrides)
    assert workflow.check_properties() == []


def test_card_stands_in_the_trained_cards(expert, shared):
    benchmarks = json.loads((shared / "golden" / "data_eval" / "benchmarks.json").read_text())
    lines = benchmarks["model_list_texts"]["training_and_report"].split("\n")
    assert expert.card.render() in lines
    assert expert.card.study_modality == "MRI"
    assert expert.card.sequence_count == 4
    assert not expert.card.report_ends_turn


def test_preprocessing_without_spacing_equals_the_recorded_input(bundle_root, golden):
    parser = ConfigParser(json.loads((bundle_root / "configs" / "inference.json").read_text()))
    parser["spacing"] = None
    names = ("t1c", "t1n", "t2w", "t2f")
    paths = [str(golden / "brats" / "inputs" / f"{name}.nii.gz") for name in names]
    image = parser.get_parsed_content("preprocessing")({"image": paths})["image"]
    with np.load(golden / "brats" / "preprocessed.npz") as stored:
        expected = stored["x"].astype(np.float32)
    assert np.allclose(image.numpy(), expected, rtol=1e-3, atol=1e-3), "the recording is float16"


def paths_of(folder):
    return tuple(str(folder / name) for name in SEQUENCE_FILES)


def test_tumor_of_an_unseen_phantom_is_segmented(expert, tmp_path):
    phantom = mri_phantom(300_001, has_tumor=True)
    folder = save_mri(phantom, tmp_path / "scan")
    result = expert.run(ExpertRequest(paths_of(folder), output_dir=str(tmp_path)))
    found, true = load_volume(result.label_map_path).array > 0, phantom.labels > 0
    assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.8
    assert "whole tumor is largest in axial slice" in result.notes[0]


def turned(affine):
    angles = np.radians((15, -10))
    about_z, about_x = np.eye(4), np.eye(4)
    about_z[:2, :2] = [[np.cos(angles[0]), -np.sin(angles[0])], [np.sin(angles[0]), np.cos(angles[0])]]
    about_x[1:3, 1:3] = [[np.cos(angles[1]), -np.sin(angles[1])], [np.sin(angles[1]), np.cos(angles[1])]]
    return about_x @ about_z @ affine


GEOMETRIES = {
    "LPS": lambda array, affine: stored_as(array, affine, "LPS"),
    "sagittal slices": lambda array, affine: stored_as(array, affine, "PSR"),
    "oblique": lambda array, affine: (array, turned(affine)),
    "thick oblique slices, LPI": lambda array, affine: stored_as(
        array[:, :, ::2], turned(affine) @ np.diag([1, 1, 2, 1.0]), "LPI"
    ),
}


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_label_map_fits_the_scan_in_every_geometry(expert, tmp_path, geometry):
    phantom = mri_phantom(300_001, has_tumor=True)  # the tumour lies on the right
    store = GEOMETRIES[geometry]
    for name, channel in zip(SEQUENCE_FILES, phantom.image, strict=True):
        save_volume(*store(channel, phantom.affine), tmp_path / name)
    true, affine = store(phantom.labels, phantom.affine)
    result = expert.run(ExpertRequest(paths_of(tmp_path), output_dir=str(tmp_path)))
    saved = nib.load(result.label_map_path)
    np.testing.assert_allclose(saved.affine, affine, atol=1e-4)
    found, true = np.asarray(saved.dataobj) > 0, true > 0
    assert found.shape == true.shape
    assert 2 * (found & true).sum() / (found.sum() + true.sum()) > 0.8
    row = next(row for row in result.measurements if row["name"] == "whole tumor")
    assert row["volume_ml"] == pytest.approx(true.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000, rel=0.2)
    assert row["side"] == "right"


def test_phantom_without_tumor_gets_no_label(expert, tmp_path):
    folder = save_mri(mri_phantom(300_002, has_tumor=False), tmp_path / "scan")
    result = expert.run(ExpertRequest(paths_of(folder), output_dir=str(tmp_path)))
    assert not np.asarray(nib.load(result.label_map_path).dataobj).any()
    assert result.notes == ["No tumor was found in the whole volume."]


def test_four_d_file_gives_the_same_label_map_as_four_files(expert, datalist_dir, request_for, tmp_path):
    four = expert.run(request_for(datalist_dir, stem="four"))
    one = expert.run(ExpertRequest((str(datalist_dir / "four.nii.gz"),), output_dir=str(tmp_path), stem="one"))
    maps = [np.asarray(nib.load(result.label_map_path).dataobj) for result in (four, one)]
    assert np.array_equal(*maps)
    assert maps[0].shape == (24, 28, 20)


def test_the_metadata_names_the_ids_of_the_label_map_from_1_on(bundle_root, expert, datalist_dir, request_for):
    metadata = json.loads((bundle_root / "configs" / "metadata.json").read_text())
    named = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert {int(label): name for label, name in named.items()} == LABEL_NAMES
    item = {**BratsRequest()(request_for(datalist_dir)), "request": "{}"}
    expert.workflow.dataset.data[0] = item
    expert.workflow.run()
    pred = expert.workflow.evaluator.state.output[0]["pred"]
    assert pred.shape == (1, 24, 28, 20)
    assert pred.dtype == torch.uint8
    assert set(pred.unique().tolist()) <= {0, *LABEL_NAMES}


def test_nano_network_fits_the_metadata(bundle_root):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle_root / "configs" / "metadata.json"),
        config_file=str(bundle_root / "configs" / "inference.json"),
        device="cpu",
        n=2,
    )


def test_training_writes_weights_and_goes_on_after_a_kill(bundle_root, datalist_dir, tmp_path):
    paths = {
        "dataset_dir": str(datalist_dir),
        "ckpt_dir": str(tmp_path / "ckpt"),
        "checkpoint_out": str(tmp_path / "nano.safetensors"),
    }
    first = open_workflow(bundle_root, ["train.json"], "train", **{**TINY, **paths, "epochs": 1})
    first.run()
    best = first.parser.get_parsed_content("exporter").best
    assert (tmp_path / "nano.safetensors").is_file()
    second = open_workflow(bundle_root, ["train.json"], "train", **TINY, **paths)
    epochs = []
    second.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: epochs.append(engine.state.epoch))
    second.run()
    assert epochs == [2]
    assert second.parser.get_parsed_content("exporter").best >= best
    assert (tmp_path / "ckpt" / "training.pt").is_file()


@pytest.mark.slow
def test_two_processes_train_and_evaluate_together(bundle_root, tmp_path):
    """The multi-GPU overlays on two CPU processes; the phantoms are written by one of them, for both."""
    tiny = {"spacing": 8.0, "roi_size": "[16,16,16]", "dataset_dir": "data"}
    times = {"epochs": 2, "val_interval": 1, "training_count": 4, "validation_count": 3}
    files = {"ckpt_dir": "ckpt", "checkpoint_out": "nano.safetensors"}
    printed = run_processes(
        2, bundle_root, ("train.json", "multi_gpu_train.json"), {**tiny, **files, **times}, tmp_path
    )
    assert printed.count("best weights are in nano.safetensors") == 1
    assert len(list((tmp_path / "data").iterdir())) == 7
    network = ConfigParser(json.loads((bundle_root / "configs" / "train.json").read_text())["network_def"])
    load_weights(network.get_parsed_content(""), tmp_path / "nano.safetensors")
    state = torch.load(tmp_path / "ckpt" / "training.pt", weights_only=True)
    assert state["trainer"]["epoch_length"] == 2  # 4 cases over 2 processes
    assert state["exporter"]["best"] > 0
    options = {**tiny, "test_count": 3, "output_dir": "eval", "checkpoint": tmp_path / "nano.safetensors"}
    run_processes(2, bundle_root, ("train.json", "evaluate.json", "multi_gpu_evaluate.json"), options, tmp_path)
    report = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert [case["case"] for case in report["cases"]] == [f"phantom_{200_000 + i}/label.nii.gz" for i in range(3)]
    assert report["tumor_case_count"] == 2  # seed 200001 is divisible by three


def test_full_size_network_can_be_fine_tuned(bundle_root, datalist_dir, tmp_path):
    torch.manual_seed(0)
    full = json.loads((bundle_root / "configs" / "size_full.json").read_text())["network_def"]
    start = ConfigParser(full).get_parsed_content("")
    torch.save(start.state_dict(), tmp_path / "released.pt")
    workflow = open_workflow(
        bundle_root,
        ["train.json", "size_full.json"],
        "train",
        **{**TINY, "epochs": 1, "spacing": "$None", "learning_rate": 1e-6},
        dataset_dir=str(datalist_dir),
        ckpt_dir=str(tmp_path / "ckpt"),
        checkpoint_out=str(tmp_path / "tuned.safetensors"),
        init_checkpoint=str(tmp_path / "released.pt"),
    )
    workflow.run()
    tuned = read_state_dict(tmp_path / "tuned.safetensors")
    for key, value in start.state_dict().items():
        assert torch.allclose(tuned[key], value, atol=1e-4), key


def test_evaluation_writes_metrics(bundle_root, datalist_dir, tmp_path):
    workflow = open_workflow(
        bundle_root,
        ["train.json", "evaluate.json"],
        "train",
        device="cpu",
        dataset_dir=str(datalist_dir),
        output_dir=str(tmp_path / "eval"),
    )
    workflow.run()
    report = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert report["case_count"] == report["tumor_case_count"] == 1
    assert set(report["dice"]) == {"tumor core", "whole tumor", "enhancing tumor"}
    assert report["cases"][0]["case"] == "dataset/label.nii.gz"


def test_evaluation_of_a_real_case_without_enhancing_label(bundle_root, shared, tmp_path):
    """BRATS_HG0015 (2012): its truth tells oedema (1) and core (2) only. The figures are those of docs/README.md."""
    case = shared / "data" / "mri" / "brats_hg0015"
    image = [str(case / f"BRATS_HG0015_{name}.mha") for name in ("FLAIR", "T1", "T1C", "T2")]  # names decide the order
    listed = [{"image": image, "label": str(case / "BRATS_HG0015_truth.mha")}]
    (tmp_path / "datalist.json").write_text(json.dumps({"test": listed}))
    workflow = open_workflow(
        bundle_root,
        ["train.json", "evaluate.json"],
        "train",
        device="cpu",
        dataset_dir=str(tmp_path),
        output_dir=str(tmp_path / "eval"),
        label_convention="brats2012",
    )
    workflow.run()
    report = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert report["dice"]["whole tumor"]["mean"] == pytest.approx(0.876, abs=0.01)
    assert report["dice"]["tumor core"]["mean"] == pytest.approx(0.750, abs=0.01)
    assert report["dice"]["enhancing tumor"] == report["hd95_mm"]["enhancing tumor"] == {"mean": None, "case_count": 0}
    assert report["hd95_mm"]["whole tumor"]["mean"] < 20


def run_command(bundle_root, folder, *arguments):
    command = [sys.executable, "-m", "monai.bundle", "run"]
    config = ["--config_file", str(bundle_root / "configs" / "inference.json"), "--device", "cpu", "--spacing", "8.0"]
    return subprocess.run(
        [*command, *config, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


def test_command_runs_from_another_folder(bundle_root, small_phantom, tmp_path):
    files = [str(small_phantom / name) for name in ("t2f.nii.gz", "t1c.nii.gz", "t2w.nii.gz", "t1n.nii.gz")]
    done = run_command(bundle_root, tmp_path, "--image", str(files), "--output_dir", "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The results are <image>." in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "brats_labels.nii.gz",
        "brats_overlay.png",
        "result.json",
    ]


def test_command_ends_with_one_line_when_a_sequence_is_missing(bundle_root, small_phantom, tmp_path):
    shutil.copy(small_phantom / "t1c.nii.gz", tmp_path)
    done = run_command(bundle_root, tmp_path, "--image", str(tmp_path), "--output_dir", "out")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: 1 of 4 MRI sequences found (t1c), missing: t1, t2")
