"""The studies folder of the tests."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np


def fill_studies(folder: Path, ct_file: Path, mri_file: Path, cxr_file: Path) -> Path:
    folder.mkdir()
    shutil.copy(ct_file, folder / "ct_1.nii.gz")
    flip_and_shift(ct_file, folder / "ct_2.nii.gz")
    shutil.copy(mri_file, folder / "mri.nii.gz")
    shutil.copy(cxr_file, folder / "cxr.png")
    (folder / "damaged.nii.gz").write_bytes(ct_file.read_bytes()[:2000])
    return folder


def flip_and_shift(source: Path, target: Path) -> None:
    """Write the same patient stored the other way round and elsewhere, so that geometry can be told."""
    image = nib.load(source)
    array = np.asarray(image.dataobj)[::-1]
    affine = image.affine.copy()
    affine[:3, 3] = (image.affine @ [array.shape[0] - 1, 0, 0, 1])[:3] + [40, -30, 20]
    affine[:3, 0] *= -1
    nib.save(nib.Nifti1Image(array, affine), target)
