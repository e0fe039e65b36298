"""Training on saved labels: which cases are used, with which ids, and what is published."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from filelock import FileLock

from vila_m3_common import phantoms
from vila_m3_common.errors import UserError
from vila_m3_composite.viewer import training
from vila_m3_composite.viewer.label_maps import read_names
from vila_m3_composite.viewer.models import ViewerModels
from vila_m3_composite.viewer.settings import ViewerSettings
from vila_m3_composite.viewer.training import LabelledCase, TrainOptions

BRATS = {"necrotic and non-enhancing tumor core": 1, "peritumoral edema": 2, "enhancing tumor": 4}


@pytest.fixture
def own_models(repository: Path, tmp_path: Path) -> ViewerModels:
    app = repository / "bundles/vila_m3_with_experts/monailabel_app"
    return ViewerModels(ViewerSettings.from_conf({"model_dir": str(tmp_path / "model"), "device": "cpu"}, app))


@pytest.fixture
def mri_case(mri_4d_file: Path, mri_phantom: phantoms.VolumePhantom, tmp_path: Path) -> LabelledCase:
    """A label numbered by a viewer: 1 edema, 2 core, 3 enhancing, 4 a structure that the expert does not know."""
    own = np.zeros_like(mri_phantom.labels)
    for source, target in ((2, 1), (1, 2), (4, 3)):
        own[mri_phantom.labels == source] = target
    own[0, 0, 0] = 4
    label = phantoms.save_volume(own, mri_phantom.affine, tmp_path / "label.nii.gz")
    names = {1: "Peritumoral Edema", 2: "necrotic and non-enhancing tumor core", 3: "enhancing tumor", 4: "vessel"}
    return LabelledCase("mri", mri_4d_file, label, names)


def test_one_epoch_publishes_weights_and_tells_of_it(
    own_models: ViewerModels, mri_case: LabelledCase, ct_file: Path, tmp_path: Path
) -> None:
    other = LabelledCase("ct", ct_file, mri_case.label, mri_case.names)
    stats = training.train(own_models, "expert_brats", [other, mri_case], BRATS, TrainOptions(epochs=1))
    assert (stats["epoch"], stats["total_epochs"], stats["case_count"]) == (1, 1, 1)
    assert stats["labels"] == [1, 2, 4]
    assert list(stats["left_out"]) == ["ct"]
    assert "the image is CT" in stats["left_out"]["ct"]
    assert 0 <= stats["best_metric"] <= 1
    assert own_models.trained_weights("expert_brats").is_file()
    assert training.read_stats(own_models, "expert_brats") == stats
    assert not (tmp_path / "model" / "expert_brats_training").exists()
    own_models.close()


def test_ids_of_a_viewer_become_the_experts(own_models: ViewerModels, mri_case: LabelledCase, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    card = own_models.expert("expert_brats").card
    prepared = training.prepare_cases(card, [mri_case], BRATS, tmp_path / "work")
    mapped = np.asarray(nib.load(prepared.entries[0]["label"]).dataobj)
    own = np.asarray(nib.load(mri_case.label).dataobj)
    assert [set(np.unique(mapped[own == label])) for label in (1, 2, 3, 4)] == [{2}, {1}, {4}, {0}]


def test_unusable_labels_are_named(own_models: ViewerModels, mri_case: LabelledCase, tmp_path: Path) -> None:
    moved = phantoms.save_volume(np.ones((4, 4, 4), np.uint8), np.eye(4), tmp_path / "other.nii.gz")
    cases = [
        LabelledCase("vessel", mri_case.image, mri_case.label, {1: "vessel"}),
        LabelledCase("grid", mri_case.image, moved),
    ]
    with pytest.raises(UserError, match="no label to train on.*vessel: .*but vessel; grid: .*is constant"):
        training.train(own_models, "expert_brats", cases, BRATS, TrainOptions())


def test_two_trainings_of_one_expert_are_refused(own_models: ViewerModels, mri_case: LabelledCase) -> None:
    own_models.settings.model_dir.mkdir()
    with (
        FileLock(own_models.settings.model_dir / "expert_brats.lock"),
        pytest.raises(UserError, match="a training of expert_brats is running; wait for its end or stop it"),
    ):
        training.train(own_models, "expert_brats", [mri_case], BRATS, TrainOptions())


@pytest.mark.parametrize(
    ("options", "told"), [({"epochs": 0}, "max_epochs is 0"), ({"val_split": 1.0}, "val_split is 1.0")]
)
def test_options_that_cannot_be(options: dict, told: str) -> None:
    with pytest.raises(UserError, match=told):
        TrainOptions(**options)


@pytest.mark.parametrize(
    ("count", "split", "sizes"), [(1, 0.2, (1, 1)), (2, 0.2, (1, 1)), (10, 0.2, (8, 2)), (3, 0.9, (1, 2))]
)
def test_some_cases_are_kept_for_validation(count: int, split: float, sizes: tuple, tmp_path: Path) -> None:
    entries = [{"image": str(number), "label": "l"} for number in range(count)]
    training.write_datalist(entries, split, tmp_path)
    lists = json.loads((tmp_path / "datalist.json").read_text())
    assert (len(lists["training"]), len(lists["validation"])) == sizes
    if count > 1:
        assert not [entry for entry in lists["training"] if entry in lists["validation"]]


def test_what_can_be_trained(models: ViewerModels) -> None:
    can = {name: training.can_be_trained(models, name) for name in models.roots}
    assert can == {"expert_vista3d": True, "expert_brats": True, "expert_cxr": False}


def test_names_of_a_saved_label_are_read() -> None:
    assert read_names({"label_info": [{"name": "liver", "idx": 2}, {"name": "no number"}, "text"]}) == {2: "liver"}
    assert read_names({"params": {"label_names": {"liver": 1}}}) == {1: "liver"}
    assert read_names({"label_info": None}) == {}
