"""Numbers come from TorchXRayVision 1.5.7, recorded in golden/experts/cxr."""

import json
import os
import zlib

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from xrv_files import save_released

from cxr_expert.network import CxrEnsemble, CxrMember, average_votes, normalize_operating_point
from cxr_expert.released import (
    build_densenet121,
    build_ensemble,
    build_resnet50,
    find_weights,
    load_released,
    rename_released,
)
from cxr_expert.released_table import CLASS_MODELS, RELEASE_URL, RELEASED_MODELS
from vila_m3_common.errors import UserError
from vila_m3_common.prompts import CXR_FINDINGS, cxr_feedback
from vila_m3_common.weights import read_state_dict

NAN = float("nan")


class Constant(torch.nn.Module):
    """A network that answers the same probabilities to every image."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.logit(torch.as_tensor(probabilities, dtype=torch.float32))

    def forward(self, image):
        return self.logits.expand(len(image), -1)


def member(probability=0.5, trained=CXR_FINDINGS, op_threshs=None):
    targets = [name if name in trained else "" for name in CXR_FINDINGS]
    return CxrMember(Constant([probability] * 18), 8, targets, op_threshs)


IMAGE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def golden(shared):
    return shared / "golden" / "experts" / "cxr"


@pytest.fixture(scope="module")
def facts(golden):
    return json.loads((golden / "facts.json").read_text())


@pytest.fixture(scope="module")
def densenet_state(golden):
    return read_state_dict(golden / "densenet121_seed0_fp16.safetensors")


@pytest.fixture(scope="module")
def resnet_state(golden):
    recipe = json.loads((golden / "resnet_weights_recipe.json").read_text())
    return {key: recipe_tensor(key, shape) for key, shape in recipe["keys_and_shapes"].items()}


def recipe_tensor(key, shape):
    """Make a tensor by the rule that resnet_weights_recipe.json states."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    z = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("running_var"):
        z = np.abs(z) * 0.2 + 0.9
    elif key.endswith("running_mean"):
        z = z * 0.1
    elif key == "fc.weight":
        z = z * 0.05
    elif key == "fc.bias":
        z = z * 0.5
    elif len(shape) == 4:
        z = z * np.sqrt(2 / np.prod(shape[1:])) / (512 if key == "conv1.weight" else 1)
    elif key.endswith("bias"):
        z = z * 0.1
    elif key.endswith("bn3.weight"):
        z = z * 0.05 + 0.3
    else:
        z = z * 0.1 + 1
    return torch.from_numpy(np.asarray(z).astype(np.float16)).float()


def test_released_table_equals_the_package(facts):
    assert set(RELEASED_MODELS) == set(facts["weights"])
    assert facts["default_pathologies"] == list(CXR_FINDINGS)
    for name, known in facts["weights"].items():
        released = RELEASED_MODELS[name]
        assert RELEASE_URL + released.file == known["url"]
        assert released.input_size == known["input_resolution"]
        pairs = zip(known["labels"], known["op_threshs"], strict=True)
        assert released.op_threshs == {label: point for label, point in pairs if label}


def test_class_models_equal_the_reference(golden):
    expected = json.loads((golden / "expert_text.json").read_text())["class_models"]
    assert {finding: set(names) for finding, names in CLASS_MODELS.items()} == {
        finding: set(names) for finding, names in expected.items()
    }


def test_large_files_name_the_released_assets(bundle):
    import yaml

    listed = yaml.safe_load((bundle / "large_files.yml").read_text())["large_files"]
    assert [(entry["path"], entry["url"]) for entry in listed] == [
        (f"models/{released.file}", RELEASE_URL + released.file) for released in RELEASED_MODELS.values()
    ]


def test_densenet_with_released_names_gives_the_recorded_logits(golden, facts, densenet_state):
    assert {key: list(value.shape) for key, value in densenet_state.items()} == facts["densenet_keys_and_shapes"]
    network = build_densenet121().eval()
    network.load_state_dict(rename_released(densenet_state))
    pictures = [np.load(golden / f"prep_{name}.npz")["xray_resizer_224"] for name in "abcde"]
    with torch.no_grad():
        logits = network(torch.from_numpy(np.stack(pictures)))
    expected = np.load(golden / "densenet_outputs.npz")["raw_on_xray_resizer_224"]
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-5)


def test_densenet_member_gives_the_recorded_operating_point_scores(golden, densenet_state, load_image):
    outputs = np.load(golden / "densenet_outputs.npz")
    network = CxrMember(build_densenet121(), 224, op_threshs=outputs["op_threshs_made_up"].tolist()).eval()
    network.network.load_state_dict(rename_released(densenet_state))
    for row, name in enumerate(("a_1024_L.png", "c_988x860_L.png")):
        image = load_image(golden / "inputs" / name)[None]
        index = list(outputs["order"]).index("ac"[row])
        with torch.no_grad():
            logits, scores = network(image).numpy()[0], network.scores(image).numpy()[0]
        np.testing.assert_allclose(logits, outputs["raw_auto_resize_from_crop"][index], atol=1e-5)
        np.testing.assert_allclose(scores, outputs["op_norm_auto_resize_from_crop"][index], atol=1e-5)


def test_resnet_with_released_names_gives_the_recorded_logits(golden, resnet_state, load_image):
    checks = json.loads((golden / "resnet_weights_recipe.json").read_text())["checks"]
    assert float(resnet_state["fc.weight"].sum()) == pytest.approx(checks["fc.weight"]["sum"], abs=1e-3)
    outputs = np.load(golden / "resnet_outputs.npz")
    network = build_ensemble(["resnet50-res512-all"]).classifiers["resnet50-res512-all"].eval()
    network.network.load_state_dict(rename_released(resnet_state))
    picture = torch.from_numpy(np.load(golden / "prep_a.npz")["xray_resizer_512"].astype(np.float32))[None]
    crop = load_image(golden / "inputs" / "b_300_L.png")[None]
    with torch.no_grad():
        # The 512 picture was recorded in float16.
        np.testing.assert_allclose(network(picture).numpy()[0], outputs["raw_on_xray_resizer_512"][0], atol=1e-3)
        np.testing.assert_allclose(network(crop).numpy()[0], outputs["raw_auto_resize_from_crop"][1], atol=1e-5)
        scores = network.scores(crop).numpy()[0]
    np.testing.assert_allclose(scores, outputs["released_op_norm_auto_resize_from_crop"][1], atol=1e-5)


def test_operating_point_probes_equal_the_package(golden):
    outputs = np.load(golden / "densenet_outputs.npz")
    points = torch.from_numpy(outputs["op_threshs_made_up"])
    probes = normalize_operating_point(torch.from_numpy(outputs["op_norm_probe_in"]), points)
    np.testing.assert_allclose(probes.numpy(), outputs["op_norm_probe_out"], atol=1e-6)
    at_point = normalize_operating_point(points[None], points)
    np.testing.assert_array_equal(at_point.numpy(), outputs["op_norm_at_threshold"])


def test_reference_mode_averages_as_the_reference(golden):
    recorded = json.loads((golden / "expert_text.json").read_text())
    ensemble = CxrEnsemble(
        {name: member() for name in recorded["model_order"]}, untrained_heads_vote=True, class_models=CLASS_MODELS
    )
    for run in recorded["runs"].values():
        scores = torch.tensor([run["per_model"][name] for name in recorded["model_order"]], dtype=torch.float64)
        mean = average_votes(scores[:, None], ensemble.votes())[0]
        np.testing.assert_allclose(mean.numpy(), [run["averaged"][name] for name in CXR_FINDINGS], atol=1e-7)


def test_full_ensemble_votes_only_with_trained_and_calibrated_heads(facts):
    targets = {name: known["labels"] for name, known in facts["weights"].items()}
    points = {name: known["op_threshs"] for name, known in facts["weights"].items()}
    members = {name: CxrMember(Constant([0.5] * 18), 8, targets[name], points[name]) for name in targets}
    ensemble = CxrEnsemble(members, class_models=CLASS_MODELS)
    voters = {
        finding: {name for name, vote in zip(members, column, strict=True) if vote}
        for finding, column in zip(CXR_FINDINGS, ensemble.votes().T.tolist(), strict=True)
    }
    assert voters["Pneumothorax"] == {"resnet50-res512-all"}
    assert voters["Fracture"] == {"densenet121-res224-all", "densenet121-res224-chex", "resnet50-res512-all"}
    assert "resnet50-res512-all" not in voters["Lung Lesion"]
    assert ensemble.untrained_findings == ()


def test_untrained_head_does_not_move_the_mean():
    trained = CXR_FINDINGS[1:]
    scores = CxrEnsemble({"a": member(0.2), "b": member(0.9, trained)})(IMAGE)[0]
    assert scores[0] == pytest.approx(0.2)
    assert scores[1] == pytest.approx(0.55)


def test_members_of_one_size_share_the_resized_picture():
    seen = []

    class Watching(Constant):
        def forward(self, image):
            seen.append(image)
            return super().forward(image)

    members = {name: CxrMember(Watching([0.5] * 18), size) for name, size in (("a", 8), ("b", 4), ("c", 8))}
    CxrEnsemble(members)(torch.rand(1, 1, 16, 16))
    assert [image.shape[-1] for image in seen] == [8, 4, 8]
    assert seen[0].data_ptr() == seen[2].data_ptr()


def test_finding_that_nobody_was_trained_for_scores_zero():
    ensemble = CxrEnsemble({"a": member(0.9, CXR_FINDINGS[:3])})
    assert ensemble.untrained_findings == CXR_FINDINGS[3:]
    assert ensemble(IMAGE)[0, 3:].eq(0).all()


def test_untrained_heads_vote_on_request():
    ensemble = CxrEnsemble({"a": member(0.2, ())}, untrained_heads_vote=True)
    assert ensemble.untrained_findings == ()
    assert ensemble(IMAGE)[0, 0] == pytest.approx(0.2)


def test_restriction_is_lifted_where_it_leaves_nobody():
    ensemble = CxrEnsemble({"a": member(0.3)}, class_models={"Mass": ["b"]})
    assert ensemble.untrained_findings == ()


def test_head_without_operating_point_has_no_vote_beside_heads_with_one():
    points = [0.1] * 17 + [NAN]
    assert member(op_threshs=points).voting_heads.tolist() == [True] * 17 + [False]


def test_trained_heads_travel_with_the_weights():
    trained = member(trained=("Mass", "Edema"))
    fresh = member()
    fresh.load_state_dict(trained.state_dict())
    assert [name for name in fresh.targets if name] == ["Edema", "Mass"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["Mass"], "1 targets were given for 18 findings"), (["Mass"] + [""] * 17, "'Mass' stands at the head of")],
)
def test_targets_must_fit_the_heads(targets, message):
    with pytest.raises(ValueError, match=message):
        CxrMember(Constant([0.5] * 18), 8, targets)


def test_stretched_radiograph_is_refused():
    with pytest.raises(ValueError, match="the radiograph is 30 x 40; crop it to a square first"):
        member()(torch.zeros(1, 1, 30, 40))


def test_unknown_released_model_names_the_near_match():
    with pytest.raises(UserError, match="unknown chest X-ray model 'densenet121-res224-al'; did you mean"):
        build_ensemble(["densenet121-res224-al"])


def test_released_weights_load_by_name_with_a_file_per_member(tmp_path, densenet_state):
    name = "densenet121-res224-nih"
    wrapped = {f"model.{key}": value for key, value in densenet_state.items()} | {"op_threshs": torch.zeros(18)}
    path = (tmp_path / RELEASED_MODELS[name].file).with_suffix(".safetensors")
    save_file(wrapped, path)
    assert find_weights(name, tmp_path) == path
    network = load_released(build_ensemble([name]), tmp_path)
    loaded = network.classifiers[name].network.class_layers.out.weight
    assert torch.equal(loaded, densenet_state["classifier.weight"].float())
    assert not network.training


def test_plain_state_dict_of_the_resnet_loads_as_released(tmp_path, resnet_state):
    name = "resnet50-res512-all"
    torch.save(resnet_state, tmp_path / RELEASED_MODELS[name].file)
    network = load_released(build_ensemble([name]), tmp_path)
    assert torch.equal(network.classifiers[name].network.conv1.weight, resnet_state["conv1.weight"])


@pytest.fixture(scope="module")
def released_folder(tmp_path_factory, densenet_state, resnet_state):
    """All eight files as released, with the stand-in weights that expert_text.json was recorded with."""
    recorded_order = sorted(name for name in RELEASED_MODELS if "densenet" in name)
    folder = tmp_path_factory.mktemp("released")
    for index, name in enumerate(recorded_order):
        state = {key: value.float() if value.is_floating_point() else value for key, value in densenet_state.items()}
        for key in ("classifier.weight", "classifier.bias"):
            state[key] = state[key].roll(index, dims=0)
        # The releases are older than the zip layout; both are read.
        save_released(state, folder / RELEASED_MODELS[name].file, is_legacy=index % 2 == 0)
    torch.save(resnet_state, folder / RELEASED_MODELS["resnet50-res512-all"].file)
    return folder


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_eight_files_as_released_give_the_recorded_scores_and_text(golden, released_folder, load_image):
    """The reference's mode: untrained heads vote, and eight findings are left to chosen models."""
    recorded = json.loads((golden / "expert_text.json").read_text())
    ensemble = load_released(build_ensemble(untrained_heads_vote=True), released_folder)
    # One grey picture, one that is not square, and one in colour.
    for key in "ace":
        run = recorded["runs"][key]
        (path,) = (golden / "inputs").glob(f"{key}_*.png")
        with torch.no_grad():
            each = torch.stack([member.scores(load_image(path)[None]) for member in ensemble.classifiers.values()])
        mean = average_votes(each, ensemble.votes())[0].numpy()
        for name, scores in zip(ensemble.classifiers, each[:, 0].numpy(), strict=True):
            np.testing.assert_allclose(scores, run["per_model"][name], atol=1e-5, err_msg=f"{name} on {key}")
        np.testing.assert_allclose(mean, [run["averaged"][finding] for finding in CXR_FINDINGS], atol=1e-5)
        assert cxr_feedback(dict(zip(CXR_FINDINGS, mean, strict=True)), "", "served").startswith(run["text"])


def test_densenet_file_that_asks_for_a_call_is_refused_and_nothing_runs(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    name = "densenet121-res224-all"
    torch.save({"features": Attack()}, tmp_path / RELEASED_MODELS[name].file)
    with pytest.raises(UserError, match=r"refused, and nothing in them was run: it asks for \w+\.system"):
        load_released(build_ensemble([name]), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_missing_released_file_names_the_download_command(tmp_path):
    with pytest.raises(UserError, match="do not exist; get them with `python -m monai.bundle download_large_files"):
        load_released(build_ensemble(["densenet121-res224-all"]), tmp_path)


def test_weights_of_another_network_are_named(tmp_path, resnet_state):
    name = "densenet121-res224-pc"
    save_file(resnet_state, (tmp_path / RELEASED_MODELS[name].file).with_suffix(".safetensors"))
    with pytest.raises(UserError, match=r"do not fit densenet121-res224-pc: \d+ tensors are missing.*\(bn1.bias, "):
        load_released(build_ensemble([name]), tmp_path)


def test_resnet_has_the_released_names():
    assert set(build_resnet50().state_dict()) >= {"conv1.weight", "layer4.2.bn3.running_var", "fc.bias"}
