import logging
import sys
import threading
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from toy_bundle import HOOKS, write_bundle

from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import BundleExpert, close_experts, open_experts, quiet, read_metadata


@pytest.fixture
def request_for_ct(ct_file: Path, tmp_path: Path) -> ExpertRequest:
    return ExpertRequest(
        (str(ct_file),), slice_index=20, question="Is bone there?", output_dir=str(tmp_path), stem="toy"
    )


def test_a_bundle_without_hooks_becomes_an_expert(tmp_path: Path, request_for_ct: ExpertRequest) -> None:
    expert = BundleExpert(write_bundle(tmp_path / "bone_ct"))
    assert expert.card.render() == (
        "<BONE_CT(args)> Modality: CT, Task: segmentation, Overview: Labels what is denser than 100 HU, "
        "Accuracy: mean_dice: 0.9, Valid args are: None"
    )
    assert not expert.is_loaded
    result = expert.run(request_for_ct)
    assert expert.is_loaded
    assert result.text == (
        "The results are <image>. The colors in this image describe red: bone. "
        "Use this result to respond to this prompt:\nIs bone there?."
    )
    assert result.legend == {"red": "bone"}
    assert [image.shape for image in result.images] == [(64, 72, 3)]
    expert.close()


def test_the_label_map_lies_on_the_inputs_grid(tmp_path: Path, request_for_ct: ExpertRequest, ct_file: Path) -> None:
    expert = BundleExpert(write_bundle(tmp_path / "bone_ct"))
    result = expert.run(request_for_ct)
    image, labels = nib.load(ct_file), nib.load(result.label_map_path)
    np.testing.assert_array_equal(np.asarray(labels.dataobj), image.get_fdata() >= 100)
    np.testing.assert_allclose(labels.affine, image.affine)
    (row,) = result.measurements
    assert row["volume_ml"] == pytest.approx((image.get_fdata() >= 100).sum() * 4.5**3 / 1000, abs=1e-3)


def test_a_bundle_is_run_often_and_built_once(tmp_path: Path, request_for_ct: ExpertRequest) -> None:
    expert = BundleExpert(write_bundle(tmp_path / "bone_ct"))
    first = expert.run(request_for_ct)
    network = expert.workflow.network_def
    second = expert.run(request_for_ct)
    assert expert.workflow.network_def is network
    assert first.text == second.text


def test_declared_hooks_are_used(tmp_path: Path, request_for_ct: ExpertRequest) -> None:
    expert = BundleExpert(write_bundle(tmp_path / "toy", inference=HOOKS))
    assert expert.card.name == "TOY"
    assert expert.run(request_for_ct) > 0


def test_declaring_only_some_hooks_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "toy", inference={"model_card": HOOKS["model_card"]})
    message = r"bundle toy declares only the hooks \['model_card'\]; add to its config: expert_request \(callable"
    with pytest.raises(UserError, match=message):
        BundleExpert(folder)


def test_a_card_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "toy", inference={**HOOKS, "model_card": "a card"})
    with pytest.raises(UserError, match="model_card of bundle toy is a str, not a ModelCard"):
        BundleExpert(folder)


def test_a_bundle_of_another_release_is_refused(tmp_path: Path) -> None:
    folder = write_bundle(tmp_path / "toy", metadata={"vila_m3_common_version": "9.9"})
    with pytest.raises(UserError, match=r"bundle toy needs vila_m3_common 9.9, but .* is already imported"):
        BundleExpert(folder)


def test_folders_that_are_no_bundles_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expert bundle .*absent does not exist; check expert_bundles"):
        read_metadata(tmp_path / "absent")
    with pytest.raises(UserError, match="is no MONAI bundle: configs/metadata.json is missing"):
        read_metadata(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/metadata.json").write_text("{")
    with pytest.raises(UserError, match="metadata.json is not valid JSON"):
        read_metadata(tmp_path)
    (tmp_path / "configs/metadata.json").write_text("{}")
    with pytest.raises(UserError, match="has no configs/inference.json; it cannot be used as an expert"):
        BundleExpert(tmp_path)


def test_two_experts_of_one_name_are_refused(tmp_path: Path) -> None:
    folders = [write_bundle(tmp_path / name, inference=HOOKS) for name in ("one", "two")]
    with pytest.raises(UserError, match="two and .*one both call themselves TOY; keep one of them"):
        open_experts(folders)


def test_a_closed_expert_says_so_and_can_be_closed_again(tmp_path: Path, request_for_ct: ExpertRequest) -> None:
    experts = open_experts([write_bundle(tmp_path / "toy", inference=HOOKS)])
    close_experts(experts)
    close_experts(experts)
    with pytest.raises(RuntimeError, match="expert toy has been closed"):
        experts["TOY"].run(request_for_ct)


def test_overrides_reach_the_config(tmp_path: Path) -> None:
    expert = BundleExpert(write_bundle(tmp_path / "toy"), overrides={"bundle_root": "elsewhere"})
    assert expert.workflow.parser["bundle_root"] == "elsewhere"


def test_quiet_silences_warnings_inside_and_drops_repeated_paths() -> None:
    ignite = logging.getLogger("ignite")
    with quiet():
        assert not ignite.isEnabledFor(logging.WARNING)
        assert ignite.isEnabledFor(logging.ERROR)
        sys.path.append(sys.path[0])
    assert ignite.isEnabledFor(logging.WARNING)
    assert len(sys.path) == len(set(sys.path))


def test_quiet_of_several_threads_ends_with_the_last_one() -> None:
    """Neither log lines nor warnings of the process stay switched off, whichever thread ends first."""
    before, filters = logging.root.manager.disable, list(warnings.filters)
    first_ends, second_is_in = threading.Event(), threading.Event()

    def second() -> None:
        with quiet():
            second_is_in.set()
            assert first_ends.wait(10)
            assert logging.root.manager.disable >= logging.WARNING

    thread = threading.Thread(target=second)
    with quiet():
        thread.start()
        assert second_is_in.wait(10)
    assert logging.root.manager.disable >= logging.WARNING
    first_ends.set()
    thread.join()
    assert logging.root.manager.disable == before
    assert list(warnings.filters) == filters
