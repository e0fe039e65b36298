"""From an ExpertRequest to the dataset item, and what is refused on the way."""

import nibabel as nib
import numpy as np
import pytest

from brats_expert.expert import expert_request
from vila_m3_common.errors import UserError
from vila_m3_common.expert import ExpertRequest


def write(path, shape, affine=None, value=None):
    array = np.arange(np.prod(shape), dtype=np.int16).reshape(shape) if value is None else np.full(shape, value)
    nib.save(nib.Nifti1Image(array.astype(np.int16), np.eye(4) if affine is None else affine), path)
    return str(path)


def test_four_files_keep_their_order(small_phantom, request_for):
    request = request_for(small_phantom)
    assert expert_request(request) == {"image": list(request.image_paths)}


def test_one_file_with_four_channels_is_read_as_such(tmp_path):
    path = write(tmp_path / "scan.nii.gz", (5, 6, 7, 4))
    assert expert_request(ExpertRequest((path,))) == {"image": path}


def test_one_sequence_alone_is_refused(tmp_path):
    path = write(tmp_path / "t1c.nii.gz", (5, 6, 7))
    with pytest.raises(UserError, match=r"t1c.nii.gz has shape \(5, 6, 7\); BRATS needs \(x, y, z, 4\)"):
        expert_request(ExpertRequest((path,)))


def test_two_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="BRATS was given 2 images; give four files"):
        expert_request(ExpertRequest(("a", "b")))


def test_sequences_of_other_shape_are_refused(tmp_path):
    paths = [write(tmp_path / f"{index}.nii.gz", (5, 6, 7 + (index == 2))) for index in range(4)]
    with pytest.raises(UserError, match=r"2.nii.gz \(5, 6, 8\) and 0.nii.gz \(5, 6, 7\) do not lie on the same grid"):
        expert_request(ExpertRequest(tuple(paths)))


def test_sequences_at_another_position_are_refused(tmp_path):
    moved = np.eye(4)
    moved[0, 3] = 12
    paths = [write(tmp_path / f"{index}.nii.gz", (5, 6, 7), moved if index == 3 else None) for index in range(4)]
    with pytest.raises(UserError, match=r"3\.nii\.gz .* do not lie on the same grid; register the sequences"):
        expert_request(ExpertRequest(tuple(paths)))


def test_four_d_file_among_the_sequences_is_refused(tmp_path):
    paths = [write(tmp_path / f"{index}.nii.gz", (5, 6, 7, 4)) for index in range(4)]
    with pytest.raises(UserError, match=r"0.nii.gz has shape \(5, 6, 7, 4\); each of the four sequences is 3-D"):
        expert_request(ExpertRequest(tuple(paths)))


def test_constant_channel_is_named(tmp_path):
    array = np.random.default_rng(0).integers(1, 99, (5, 6, 7, 4)).astype(np.int16)
    array[..., 2] = 0
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "scan.nii.gz")
    with pytest.raises(UserError, match=r"channel 2 \(t2\) of scan.nii.gz is constant"):
        expert_request(ExpertRequest((str(tmp_path / "scan.nii.gz"),)))
