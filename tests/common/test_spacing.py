"""Resampling beside the text that MONAI Label puts into items."""

from pathlib import Path

import nibabel as nib
import numpy as np
from monai.transforms import LoadImage

from vila_m3_common.spacing import SpacingBesideTextd


def test_resampling_leaves_plain_text_entries_alone(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((6, 6, 6), np.float32), np.diag([2.0, 2, 2, 1])), path)
    image = LoadImage(ensure_channel_first=True)(path)
    item = SpacingBesideTextd("image", pixdim=(1.0, 1.0, 1.0))({"image": image, "image_path": str(path)})
    assert item["image"].shape == (1, 11, 11, 11)
    assert item["image_path"] == str(path)
