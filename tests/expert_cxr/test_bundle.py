import json
import subprocess
import sys

import pytest
import torch
from monai.bundle import ConfigParser, create_workflow, verify_net_in_out
from safetensors.torch import save_file

from cxr_expert.released import build_ensemble
from cxr_expert.released_table import RELEASED_MODELS
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import BundleExpert
from vila_m3_common.phantoms import CXR_PHANTOM_FINDINGS, cxr_phantom, save_radiograph
from vila_m3_common.prompts import CXR_FINDINGS


@pytest.fixture(scope="module")
def expert(bundle):
    opened = BundleExpert(bundle, {"device": "cpu"})
    yield opened
    opened.close()


def run_command(bundle, configs, folder, *options):
    files = str([str(bundle / "configs" / name) for name in configs])
    return subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "--config_file", files, "--device", "cpu", *options],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize(("name", "kind"), [("inference.json", "infer"), ("train.json", "train")])
def test_configs_have_the_standard_properties(bundle, tmp_path, name, kind):
    workflow = create_workflow(
        config_file=str(bundle / "configs" / name),
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        workflow_type=kind,
        dataset_dir=str(tmp_path),
    )
    assert not workflow.check_properties()


def test_card_stands_in_the_trained_cards(expert, shared):
    benchmarks = json.loads((shared / "golden" / "data_eval" / "benchmarks.json").read_text())
    assert expert.card.render() in benchmarks["model_list_texts"]["training_and_report"].split("\n")


def test_metadata_names_the_findings_in_the_order_of_the_heads(bundle):
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    assert channels == {str(index): finding for index, finding in enumerate(CXR_FINDINGS)}


def test_network_keeps_to_the_metadata(bundle):
    verify_net_in_out(
        net_id="network_def",
        meta_file=str(bundle / "configs" / "metadata.json"),
        config_file=str(bundle / "configs" / "inference.json"),
        device="cpu",
    )


def test_nano_weights_are_small(bundle):
    assert (bundle / "models" / "model.safetensors").stat().st_size < 2e6


@pytest.mark.parametrize("finding", ["Cardiomegaly", "Effusion", "Pneumothorax", "Mass"])
def test_expert_sees_what_a_phantom_shows(expert, tmp_path, finding):
    path = save_radiograph(cxr_phantom(seed=3_000_001, findings=[finding]), tmp_path / "film.png")
    result = expert.run(ExpertRequest((str(path),), question="What is seen?", output_dir=str(tmp_path), stem="q"))
    shown = {name for name, score in result.scores.items() if score > 0.5}
    assert shown & set(CXR_PHANTOM_FINDINGS) == {finding}
    assert f"{finding.lower()}: yes\n" in result.text
    assert result.text.endswith("when responding to this prompt:\nWhat is seen?")
    assert (tmp_path / "q_scores.png").is_file()


def test_the_only_finding_without_training_images_is_no_and_noted(expert, cxr_file, tmp_path):
    result = expert.run(ExpertRequest((str(cxr_file),), output_dir=str(tmp_path)))
    assert {name for name in CXR_FINDINGS if result.scores[name] == 0.0} == {"Fracture"}
    assert "no trained and calibrated head for fracture; a 'no' there is only a missing answer" in result.notes[0]


@pytest.mark.parametrize("name", ["full_size/00000001_000-Cardiomegaly.png", "full_size/cr_chest.dcm"])
def test_expert_reads_real_radiographs(expert, shared, tmp_path, name):
    path = shared / "data" / "cxr" / name
    result = expert.run(ExpertRequest((str(path),), output_dir=str(tmp_path)))
    assert result.text.startswith("The resulting predictions are:\natelectasis: no\n")
    assert all(0 <= score <= 1 for score in result.scores.values())


def test_served_variant_is_a_config_item(bundle, cxr_file, tmp_path):
    served = BundleExpert(bundle, {"device": "cpu", "feedback_variant": "served"})
    result = served.run(ExpertRequest((str(cxr_file),), question="Why?", output_dir=str(tmp_path)))
    served.close()
    assert result.text.endswith("pneumothorax: no\n.Use this result to respond to this prompt:\nWhy?")


def test_command_line_writes_the_result_from_another_directory(bundle, cxr_file, tmp_path):
    done = run_command(bundle, ["inference.json"], tmp_path, "--image", str(cxr_file), "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out" / "result.json").read_text())
    assert record["scores"]["Cardiomegaly"] > 0.5
    assert record["overlay"] == "cxr_scores.png"
    assert "cardiomegaly: yes" in done.stdout


def test_command_line_explains_a_missing_image(bundle, tmp_path):
    done = run_command(bundle, ["inference.json"], tmp_path, "--image", "nowhere.png")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1] == "error: nowhere.png does not exist; check the path"


def test_evaluation_writes_metrics_of_phantoms(bundle, tmp_path):
    options = ["--phantom_count", "40", "--output_dir", "out"]
    done = run_command(bundle, ["evaluate.json"], tmp_path, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (report["image_count"], report["models"]) == (40, ["nano"])
    assert report["mean_auroc"] > 0.9
    assert {name for name, row in report["findings"].items() if row["positives"]} == {
        *CXR_PHANTOM_FINDINGS,
        "Lung Opacity",
        "Lung Lesion",
    }
    assert "mean AUROC of findings with at least 8 positives" in done.stdout


def test_evaluation_reads_a_labels_csv(bundle, tmp_path):
    names = [path.name for path in (save_radiograph(cxr_phantom(n), tmp_path / f"{n}.png") for n in range(4))]
    rows = [f"{name},{'Effusion' if index else 'No Finding'},{index}\n" for index, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("Image Index,Finding Labels,Patient ID\n" + "".join(rows))
    options = ["--data_root", ".", "--labels_csv", "labels.csv", "--min_positives", "1", "--output_dir", "out"]
    done = run_command(bundle, ["evaluate.json"], tmp_path, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    row = report["findings"]["Effusion"]
    assert row["positives"] == 3
    assert report["mean_auroc"] == row["auroc"]
    assert report["mean_auroc_interval"] == row["auroc_interval"]
    assert row["auroc_interval"][0] <= row["auroc"] <= row["auroc_interval"][1]


def test_evaluation_is_the_inference_on_labelled_data(bundle):
    """evaluate.json stands alone, so what it shares with inference.json is written twice."""
    inference, evaluation = (
        json.loads((bundle / "configs" / f"{name}.json").read_text()) for name in ("inference", "evaluate")
    )
    shared = ("bundle_root", "checkpoint", "calibration_file", "device", "network_def", "network", "calibration")
    shared += ("preprocessing", "dataset", "dataloader", "inferer", "postprocessing")
    assert {name: evaluation[name] for name in shared} == {name: inference[name] for name in shared}
    assert {**evaluation["evaluator"]} == {**inference["evaluator"], "key_val_metric": "@key_metric"}


def test_training_builds_the_network_of_inference(bundle):
    inference, training = (
        json.loads((bundle / "configs" / f"{name}.json").read_text()) for name in ("inference", "train")
    )
    nano = inference["network_def"]["members"]["nano"]
    assert training["network_def"]["network"] == nano["network"]
    assert training["input_size"] == nano["input_size"]


def test_full_size_ensemble_is_evaluated_by_its_overlay(bundle, tmp_path):
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / name) for name in ("evaluate.json", "size_full.json")])
    parser.update({"models": ["densenet121-res224-all"], "models_dir": str(tmp_path)})
    assert list(parser.get_parsed_content("network_def").classifiers) == ["densenet121-res224-all"]
    assert parser.get_parsed_content("calibration_file") == f"{tmp_path}/calibration_full.json"


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_calibration_is_fitted_saved_and_applied(bundle, cxr_file, tmp_path, method):
    options = ["--phantom_count", "80", "--min_positives", "4", "--method", method]
    done = run_command(
        bundle, ["inference.json", "calibrate.json"], tmp_path, *options, "--calibration_out", "fitted.json"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "cxr_calibration" / "calibration.json").read_text())
    assert figures["image_count"] == 80
    assert set(figures["findings"]["Effusion"]["after"]) == {"f1", "brier", "ece"}
    assert (tmp_path / "cxr_calibration" / "reliability.png").is_file()
    calibrated = BundleExpert(bundle, {"device": "cpu", "calibration_file": str(tmp_path / "fitted.json")})
    result = calibrated.run(ExpertRequest((str(cxr_file),), output_dir=str(tmp_path)))
    calibrated.close()
    rows = {row["name"]: row for row in result.measurements}
    assert rows["effusion"]["probability"] > rows["effusion"]["threshold"]
    assert result.scores["Effusion"] > 0.5


def full_size(bundle, tmp_path, **options):
    parser = ConfigParser()
    parser.read_config([str(bundle / "configs" / name) for name in ("inference.json", "size_full.json")])
    parser.update({"models_dir": str(tmp_path), "device": "cpu", **options})
    return parser


def test_full_size_overlay_loads_released_files_by_name(bundle, cxr_file, load_image, tmp_path):
    name = "densenet121-res224-all"
    state = build_ensemble([name]).classifiers[name].network.state_dict()
    released = {
        key.replace(".layers.", ".").replace("class_layers.out", "classifier"): value for key, value in state.items()
    }
    save_file(released, (tmp_path / RELEASED_MODELS[name].file).with_suffix(".safetensors"))
    network = full_size(bundle, tmp_path, models=[name]).get_parsed_content("network")
    with torch.no_grad():
        scores = network(load_image(cxr_file)[None])
    assert scores.shape == (1, 18)
    assert network.untrained_findings == ()
    assert torch.equal(network.classifiers[name].network.class_layers.out.weight, state["class_layers.out.weight"])


def test_full_size_overlay_has_all_eight_models_and_the_reference_mode(bundle, tmp_path):
    network = full_size(bundle, tmp_path, untrained_heads_vote=True).get_parsed_content("network_def")
    assert list(network.classifiers) == list(RELEASED_MODELS)
    assert network.untrained_heads_vote
    sizes = {name: member.input_size for name, member in network.classifiers.items()}
    assert sizes.pop("resnet50-res512-all") == 512
    assert set(sizes.values()) == {224}
