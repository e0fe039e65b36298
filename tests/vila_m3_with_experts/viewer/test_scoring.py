"""Uncertainty, agreement with saved labels, and which image comes next."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from vila_m3_common.errors import UserError
from vila_m3_common.study import open_study
from vila_m3_composite.viewer import scoring
from vila_m3_composite.viewer.models import ViewerModels


def test_a_sure_expert_scores_low(models: ViewerModels, mri_4d_file: Path, ct_file: Path) -> None:
    assert 0 <= scoring.uncertainty(models, "expert_brats", mri_4d_file, variants=1) < 0.5
    with pytest.raises(UserError, match="the image is CT"):
        scoring.uncertainty(models, "expert_brats", ct_file)
    with pytest.raises(UserError, match="variants is 0"):
        scoring.uncertainty(models, "expert_brats", mri_4d_file, variants=0)


def test_variants_change_the_foreground_only(mri_4d_file: Path, tmp_path: Path) -> None:
    study = open_study(mri_4d_file)
    image = np.asarray(nib.load(mri_4d_file).dataobj)
    first, second, again = (
        np.asarray(nib.load(scoring.write_variant(study, tmp_path / name, number)[0]).dataobj)
        for name, number in (("a", 0), ("b", 1), ("c", 0))
    )
    assert first.shape == image.shape
    assert np.array_equal(first[image == 0], image[image == 0])
    assert np.array_equal(first, again), "a seed makes them the same every time"
    assert not np.array_equal(first, second)
    inside = image != 0
    assert 0 < np.abs(first - image)[inside].mean() < 0.1 * image[inside].max()


def test_agreement_is_the_mean_dice() -> None:
    first, second = np.array([1, 1, 2, 0]), np.array([1, 0, 2, 3])
    assert scoring.dice_by_label(first, second) == {1: pytest.approx(2 / 3), 2: 1.0, 3: 0.0}
    assert scoring.agreement(first, second) == pytest.approx(5 / 9)
    assert scoring.agreement(np.zeros(3), np.zeros(3)) == 1.0


def test_structures_are_compared_by_name() -> None:
    final, original = np.array([2, 2, 1, 0]), np.array([1, 1, 26, 0])
    names = {1: "hepatic tumor", 2: "Liver"}
    assert scoring.dice_by_name(final, names, original, {1: "liver", 26: "hepatic tumor"}) == {
        "hepatic tumor": 1.0,
        "Liver": 1.0,
    }
    assert scoring.dice_by_name(np.array([1]), {}, np.array([1]), {1: "liver"}) == {"liver": 1.0}
    assert scoring.dice_by_name(np.array([3]), {3: "spleen"}, np.array([3]), {3: "liver"}) == {"spleen": 0.0}


def row(score: float | None) -> dict:
    return {"uncertainty": {"expert_vista3d": {"score": score}}}


def test_the_most_uncertain_image_that_was_not_served_comes_next() -> None:
    images = {"a": row(0.1), "b": row(0.4), "c": row(None), "d": {}}
    experts = ["expert_vista3d", "expert_brats"]
    assert scoring.most_uncertain(images, experts, {}) == ("b", 0.4)
    assert scoring.most_uncertain(images, experts, {"b": 5}) == ("a", 0.1)
    assert scoring.most_uncertain(images, experts, {"b": 5, "a": 9}) == ("b", 0.4)
    assert scoring.most_uncertain(images, ["expert_brats"], {"a": 1}) == ("b", None)
