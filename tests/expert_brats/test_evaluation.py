"""Dice, HD95, sensitivity and specificity against values worked out by hand."""

import pytest
import torch
from monai.data import MetaTensor

from brats_expert.evaluation import measure_case, summarize
from vila_m3_common.errors import UserError


def regions(core=(), whole=(), enhancing=(), spacing=2.0):
    """Rows of voxels along x, the same in every plane."""
    volume = torch.zeros(3, 10, 4, 4)
    for channel, columns in enumerate((core, whole, enhancing)):
        for column in columns:
            volume[channel, column] = 1
    affine = torch.diag(torch.tensor([spacing, spacing, spacing, 1.0]))
    return MetaTensor(volume, affine=affine, meta={"filename_or_obj": "/data/case7/label.nii.gz"})


def test_dice_and_hd95_of_shifted_regions():
    truth = regions(core=(2, 3), whole=(1, 2, 3, 4), enhancing=(3,))
    row = measure_case(regions(core=(3, 4), whole=(1, 2, 3, 4), enhancing=(5,)), truth)
    assert row["dice"] == {"tumor core": 0.5, "whole tumor": 1.0, "enhancing tumor": 0.0}
    # 2 mm voxels: the enhancing plane lies two voxels away, the core one
    assert row["hd95_mm"] == {"tumor core": 2.0, "whole tumor": 0.0, "enhancing tumor": 4.0}
    assert (row["case"], row["has_tumor"], row["is_found"]) == ("case7/label.nii.gz", True, True)


def test_regions_that_are_empty_have_no_distance_and_only_truth_decides_over_dice():
    row = measure_case(regions(), regions(whole=(2,)))
    assert row["dice"] == {"tumor core": None, "whole tumor": 0.0, "enhancing tumor": None}
    assert set(row["hd95_mm"].values()) == {None}
    assert not row["is_found"]


def test_a_region_that_the_data_does_not_label_has_neither_dice_nor_distance():
    tumor = regions(core=(2,), whole=(1, 2, 3), enhancing=(2,))
    truth = tumor.clone()
    truth[2] = torch.nan
    row = measure_case(tumor, truth)
    assert row["dice"] == {"tumor core": 1.0, "whole tumor": 1.0, "enhancing tumor": None}
    assert row["hd95_mm"] == {"tumor core": 0.0, "whole tumor": 0.0, "enhancing tumor": None}
    assert summarize([row])["dice"]["enhancing tumor"] == {"mean": None, "case_count": 0}


def test_hd95_can_be_left_out():
    assert "hd95_mm" not in measure_case(regions(), regions(), with_hd95=False)


def test_summary_counts_found_tumors_and_quiet_healthy_cases():
    tumor, healthy = regions(core=(1,), whole=(1, 2), enhancing=(1,)), regions()
    cases = [
        measure_case(tumor, tumor),
        measure_case(healthy, tumor),
        measure_case(healthy, healthy),
        measure_case(healthy, healthy),
        measure_case(tumor, healthy),
    ]
    summary = summarize(cases)
    assert (summary["case_count"], summary["tumor_case_count"]) == (5, 2)
    assert summary["sensitivity"] == 0.5
    assert summary["specificity"] == pytest.approx(2 / 3)
    assert summary["dice"]["whole tumor"] == {"mean": 0.5, "case_count": 2}
    assert summary["hd95_mm"]["whole tumor"] == {"mean": 0.0, "case_count": 1}


def test_summary_without_healthy_cases_claims_no_specificity():
    tumor = regions(whole=(1,))
    assert summarize([measure_case(tumor, tumor)])["specificity"] is None


def test_summary_of_nothing_is_an_error():
    with pytest.raises(UserError, match="no case was evaluated"):
        summarize([])
