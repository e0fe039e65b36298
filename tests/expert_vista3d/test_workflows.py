"""The configs: properties, hooks, inference, training with resumption, evaluation, from any folder."""

import json
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.bundle import ConfigParser, create_workflow, verify_net_in_out
from torchrun import run_processes

from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import BundleExpert
from vila_m3_common.phantoms import ct_phantom, save_volume
from vila_m3_common.weights import load_weights
from vista3d_expert.network import nano_vista3d

TINY = {
    "device": "cpu",
    "amp": False,
    "spacing": 8.0,
    "roi_size": [24, 24, 24],
    "epochs": 2,
    "val_interval": 1,
}


@pytest.fixture(scope="module")
def expert(bundle_root):
    opened = BundleExpert(bundle_root, {"device": "cpu"})
    yield opened
    opened.close()


@pytest.fixture
def dataset_dir(small_case, tmp_path):
    """A user's own data set: one phantom in all parts."""
    (tmp_path / "case").symlink_to(small_case)
    cases = [{"image": "case/image.nii.gz", "label": "case/label.nii.gz"}]
    (tmp_path / "datalist.json").write_text(json.dumps({"training": cases * 2, "validation": cases, "testing": cases}))
    return tmp_path


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
    [(["inference.json"], "infer"), (["train.json"], "train"), (["train.json", "evaluate.json"], "train")],
)
def test_monai_finds_its_properties(bundle_root, dataset_dir, tmp_path, names, workflow_type):
    overrides = {"device": "cpu", "dataset_dir": str(dataset_dir)}
    if workflow_type == "train":
        overrides["ckpt_dir"] = str(tmp_path / "ckpt")
    workflow = open_workflow(bundle_root, names, workflow_type, **overrides)
    assert workflow.check_properties() == []


def test_card_stands_in_the_trained_cards(expert, shared):
    benchmarks = json.loads((shared / "golden/data_eval/benchmarks.json").read_text())
    lines = benchmarks["model_list_texts"]["training_and_report"].split("\n")
    assert expert.card.render() in lines
    assert expert.card.study_modality == "CT"
    assert expert.card.report_ends_turn


def test_full_size_preprocessing_equals_the_recorded_input(bundle_root, shared):
    parser = ConfigParser()
    parser.read_config([str(bundle_root / "configs" / name) for name in ("inference.json", "size_full.json")])
    folder = shared / "golden/experts/vista3d"
    item = parser.get_parsed_content("preprocessing")({"image": str(folder / "inputs/ct_crop.nii.gz")})
    assert item["image"].shape == (1, 127, 127, 95)
    recorded = np.load(folder / "preprocessed_stride8_f32.npz")["x"]
    assert np.abs(item["image"].numpy()[:, ::8, ::8, ::8] - recorded).max() < 1e-4


@pytest.mark.parametrize("seed", [300_001, 300_002])
def test_liver_and_tumors_of_unseen_phantoms_are_found_and_only_there(expert, tmp_path, seed):
    for tumors in (["hepatic tumor"], []):
        phantom = ct_phantom(seed, tumors=tumors)
        path = save_volume(phantom.image, phantom.affine, tmp_path / "ct.nii.gz")
        result = expert.run(ExpertRequest((str(path),), "hepatic tumor", slice_index=44, output_dir=str(tmp_path)))
        labels = np.asarray(nib.load(result.label_map_path).dataobj)
        assert overlap(labels == 1, phantom.labels == 1) > 0.9
        assert ("hepatic tumor" in {row["name"] for row in result.measurements}) == bool(tumors)
        if tumors:
            assert overlap(labels == 26, phantom.labels == 26) > 0.5


def overlap(found: np.ndarray, true: np.ndarray) -> float:
    """Dice."""
    return float(2 * (found & true).sum() / (found.sum() + true.sum()))


def test_output_has_the_geometry_of_an_oblique_anisotropic_input(expert, tmp_path):
    phantom = ct_phantom(300_003, tumors=[], shape=(40, 36, 32), spacing=8.0)
    turned = np.flip(np.transpose(phantom.image, (2, 0, 1)), axis=1).copy()  # stored as S, L, A
    affine = np.array([[0, -8.0, 0, 150], [0, 0, 8.0, -140], [8.0, 0, 0, -120], [0, 0, 0, 1]])
    path = save_volume(turned, affine, tmp_path / "turned.nii.gz")
    result = expert.run(ExpertRequest((str(path),), "organs", output_dir=str(tmp_path)))
    labels = nib.load(result.label_map_path)
    assert labels.shape == turned.shape
    np.testing.assert_allclose(labels.affine, affine)
    lungs = np.isin(np.asarray(labels.dataobj), (29, 32))
    assert turned[lungs].mean() < -700


def test_items_with_an_image_path_as_monai_label_gives_them_run(expert, small_case, tmp_path):
    expert.workflow.dataset.data[0] = {
        "image": str(small_case / "image.nii.gz"),
        "image_path": str(small_case / "image.nii.gz"),
        "label_prompt": "['spleen']",
    }
    expert.workflow.run()
    assert set(np.unique(expert.workflow.evaluator.state.output[0]["pred"])) <= {0, 3}


def test_nano_network_fits_the_metadata(bundle_root):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle_root / "configs" / "metadata.json"),
        config_file=str(bundle_root / "configs" / "inference.json"),
        device="cpu",
        n=2,
        extra_forward_args={"class_vector": torch.tensor([[26]])},
    )


def test_training_writes_weights_and_goes_on_after_a_kill(bundle_root, dataset_dir, tmp_path):
    paths = {
        "dataset_dir": str(dataset_dir),
        "ckpt_dir": str(tmp_path / "ckpt"),
        "checkpoint_out": str(tmp_path / "nano.safetensors"),
    }
    first = open_workflow(bundle_root, ["train.json"], "train", **TINY, **paths)
    first.trainer.add_event_handler(Events.EPOCH_COMPLETED(once=1), first.trainer.terminate)
    first.run()
    assert (tmp_path / "ckpt" / "training.pt").is_file()
    assert (tmp_path / "nano.safetensors").is_file()
    second = open_workflow(bundle_root, ["train.json"], "train", **TINY, **paths)
    epochs = []
    second.trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: epochs.append(engine.state.epoch))
    second.run()
    assert epochs == [2]


def test_evaluation_writes_metrics_per_argument_and_class(bundle_root, dataset_dir, tmp_path):
    open_workflow(
        bundle_root,
        ["train.json", "evaluate.json"],
        "train",
        device="cpu",
        spacing=8.0,
        roi_size=[40, 40, 40],
        dataset_dir=str(dataset_dir),
        output_dir=str(tmp_path / "eval"),
        arguments=["hepatic tumor", "bone lesion"],
    ).run()
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert set(metrics) == {"hepatic tumor", "bone lesion"}
    assert metrics["hepatic tumor"]["classes"]["hepatic tumor"]["present_count"] == 1
    assert metrics["bone lesion"]["classes"]["bone lesion"]["absent_count"] == 1


@pytest.mark.parametrize(("epochs", "least_dice"), [(1, 0.0), pytest.param(20, 0.5, marks=pytest.mark.slow)])
def test_a_new_class_is_fine_tuned_evaluated_and_asked_for(bundle_root, dataset_dir, tmp_path, epochs, least_dice):
    """The liver of the phantom plays a class that VISTA3D does not have; 40 crops are enough for a start."""
    nano = ConfigParser.load_config_file(bundle_root / "configs/train.json")["network_def"]
    tuned = str(tmp_path / "tuned.safetensors")
    overrides = {
        **TINY,
        "network_def": nano,
        "dataset_dir": str(dataset_dir),
        "roi_size": [40, 40, 40],
        "label_mappings": {"default": [[1, 200], [3, 3]]},
        "new_classes": {"200": "strange organ"},
    }
    open_workflow(
        bundle_root,
        ["train.json", "finetune.json"],
        "train",
        **{**overrides, "epochs": epochs, "val_interval": epochs, "learning_rate": 0.004},
        init_checkpoint=str(bundle_root / "models/model.safetensors"),
        checkpoint_out=tuned,
        ckpt_dir=str(tmp_path / "ckpt"),
    ).run()
    evaluation = {"checkpoint": tuned, "output_dir": str(tmp_path / "eval"), "arguments": ["strange organ", "spleen"]}
    open_workflow(bundle_root, ["train.json", "evaluate.json"], "train", **overrides, **evaluation).run()
    metrics = json.loads((tmp_path / "eval" / "metrics.json").read_text())
    assert metrics["strange organ"]["classes"]["strange organ"]["dice"] >= least_dice
    assert set(metrics["spleen"]["classes"]) == {"spleen"}
    prompt = {"checkpoint": tuned, "label_prompt": "strange organ", "new_classes": {"200": "strange organ"}}
    expert = BundleExpert(bundle_root, {"device": "cpu", "spacing": 8.0, "roi_size": [40, 40, 40], **prompt})
    result = expert.run(ExpertRequest((str(dataset_dir / "case/image.nii.gz"),), output_dir=str(tmp_path)))
    expert.close()
    assert least_dice == 0 or [row["name"] for row in result.measurements] == ["strange organ"]


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(bundle_root, tmp_path):
    """Three phantoms, which one process writes for both, two questions each."""
    overrides = {
        "dataset_dir": tmp_path / "data",
        "testing_count": 3,
        "arguments": "['hepatic tumor','bone lesion']",
        "spacing": 8.0,
        "roi_size": "[24, 24, 24]",
    }
    together = ("train.json", "evaluate.json", "multi_gpu_evaluate.json")
    printed = run_processes(2, bundle_root, together, {**overrides, "output_dir": tmp_path / "two"}, tmp_path)
    assert printed.count("written to") == 1
    alone = {key: value for key, value in overrides.items() if key not in ("arguments", "roi_size", "dataset_dir")}
    open_workflow(
        bundle_root,
        ["train.json", "evaluate.json"],
        "train",
        **alone,
        device="cpu",
        dataset_dir=str(tmp_path / "data"),
        roi_size=[24, 24, 24],
        arguments=["hepatic tumor", "bone lesion"],
        output_dir=str(tmp_path / "one"),
    ).run()
    results = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")]
    assert results[0] == results[1]
    assert results[0]["hepatic tumor"]["classes"]["hepatic tumor"]["present_count"] >= 1


@pytest.mark.slow
def test_two_processes_train_together(bundle_root, dataset_dir, tmp_path):
    """By the command of several GPUs, here with two processes of the CPU; only the first one writes."""
    datalist = json.loads((dataset_dir / "datalist.json").read_text())
    datalist["validation"] *= 2  # every process needs a case
    (dataset_dir / "datalist.json").write_text(json.dumps(datalist))
    overrides = {
        "dataset_dir": dataset_dir,
        "ckpt_dir": tmp_path / "ckpt",
        "checkpoint_out": tmp_path / "nano.safetensors",
        "amp": False,
        "spacing": 8.0,
        "roi_size": "[24, 24, 24]",
        "epochs": 2,
        "val_interval": 1,
    }
    printed = run_processes(2, bundle_root, ("train.json", "multi_gpu_train.json"), overrides, tmp_path)
    assert printed.count("best weights are in") == 1
    load_weights(nano_vista3d(), tmp_path / "nano.safetensors")
    state = torch.load(tmp_path / "ckpt/training.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 2  # the two training cases are shared, one for each process


def run_command(bundle_root, folder, *arguments):
    command = [sys.executable, "-m", "monai.bundle", "run"]
    config = ["--config_file", str(bundle_root / "configs" / "inference.json"), "--device", "cpu"]
    return subprocess.run(
        [*command, *config, *arguments], cwd=folder, capture_output=True, text=True, timeout=500, check=False
    )


def test_command_runs_from_another_folder(bundle_root, ct_file, tmp_path):
    prompt = ["--label_prompt", "['liver','hepatic tumor']"]
    done = run_command(bundle_root, tmp_path, "--image", str(ct_file), *prompt, "--output_dir", "out")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "The results are <image>. The colors in this image describe red: liver" in done.stdout
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "result.json",
        "vista3d_labels.nii.gz",
        "vista3d_overlay.png",
    ]


@pytest.mark.parametrize(
    ("prompt", "written"),
    [
        ({"argument": "hepatoma"}, "The results are <image>"),
        (
            {"points": "[[12, 17, 20], [2, 2, 2]]", "point_labels": "[1, 0]"},
            "note: Points: the point branch of the nano",
        ),
    ],
)
def test_the_command_takes_other_words_and_points(bundle_root, small_case, tmp_path, capsys, prompt, written):
    paths = {"image": str(small_case / "image.nii.gz"), "output_dir": str(tmp_path / "out")}
    cheap = {"device": "cpu", "spacing": 8.0, "roi_size": [40, 40, 40]}
    open_workflow(bundle_root, ["inference.json"], "infer", **paths, **cheap, **prompt).run()
    assert written in capsys.readouterr().out
    assert (tmp_path / "out" / "result.json").is_file()


def test_command_ends_with_one_line_for_an_unknown_class(bundle_root, ct_file, tmp_path):
    done = run_command(bundle_root, tmp_path, "--image", str(ct_file), "--label_prompt", "livr", "--output_dir", "out")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: unknown VISTA3D class 'livr'; did you mean 'liver'?")
