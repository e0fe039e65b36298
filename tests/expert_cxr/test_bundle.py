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


def test_findings_that_no_phantom_shows_are_no_and_noted(expert, cxr_file, tmp_path):
    result = expert.run(ExpertRequest((str(cxr_file),), output_dir=str(tmp_path)))
    untrained = set(CXR_FINDINGS) - set(CXR_PHANTOM_FINDINGS) - {"Lung Opacity", "Lung Lesion"}
    assert {name for name in CXR_FINDINGS if result.scores[name] == 0.0} == untrained
    assert "no trained and calibrated head for atelectasis, infiltration, emphysema" in result.notes[0]


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
    done = run_command(
        bundle, ["inference.json", "evaluate.json"], tmp_path, "--phantom_count", "40", "--output_dir", "out"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["image_count"] == 40
    assert report["mean_auroc"] > 0.9
    assert set(report["findings"]) == {*CXR_PHANTOM_FINDINGS, "Lung Opacity", "Lung Lesion"}


def test_evaluation_reads_a_labels_csv(bundle, tmp_path):
    names = [path.name for path in (save_radiograph(cxr_phantom(n), tmp_path / f"{n}.png") for n in range(4))]
    rows = [f"{name},{'Effusion' if index else 'No Finding'},{index}\n" for index, name in enumerate(names)]
    (tmp_path / "labels.csv").write_text("Image Index,Finding Labels,Patient ID\n" + "".join(rows))
    options = ["--data_root", ".", "--labels_csv", "labels.csv", "--min_positives", "1", "--output_dir", "out"]
    done = run_command(bundle, ["inference.json", "evaluate.json"], tmp_path, *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["findings"]["Effusion"]["positives"] == 3
    assert report["mean_auroc"] == report["findings"]["Effusion"]["auroc"]


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
