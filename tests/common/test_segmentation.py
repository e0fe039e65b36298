from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from vila_m3_common import phantoms, slices
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.segmentation import SegmentationView, slice_notes, view_segmentation
from vila_m3_common.volumes import load_volume

NAMES = {1: "liver", 3: "spleen", 26: "hepatic tumor"}


@pytest.fixture
def view(ct_phantom: phantoms.VolumePhantom, ct_file: Path, tmp_path: Path) -> SegmentationView:
    labels = np.where(np.isin(ct_phantom.labels, (1, 3, 26)), ct_phantom.labels, 0)
    request = ExpertRequest((str(ct_file),), slice_index=0, output_dir=str(tmp_path), stem="run1")
    volume = load_volume(ct_file)
    grey = slices.window_ct(volume.array)
    return view_segmentation(labels, volume, grey, NAMES, request, "VISTA3D", ("hepatic tumor",), is_ct=True)


def test_files_are_named_after_the_call(view: SegmentationView, tmp_path: Path) -> None:
    assert view.label_map_path == tmp_path / "run1_labels.nii.gz"
    assert view.overlay_path == tmp_path / "run1_overlay.png"
    assert view.overlay_path.stat().st_size > 1000


def test_the_label_map_is_in_the_geometry_of_the_input(view: SegmentationView, ct_file: Path) -> None:
    labels, image = nib.load(view.label_map_path), nib.load(ct_file)
    assert labels.shape == image.shape
    assert labels.get_data_dtype() == np.uint8
    np.testing.assert_allclose(labels.affine, image.affine)


def test_every_label_is_measured_also_outside_the_slice(view: SegmentationView) -> None:
    assert [row["name"] for row in view.measurements] == ["liver", "spleen", "hepatic tumor"]
    liver = view.measurements[0]
    assert 40 < liver["mean_hu"] < 130
    assert liver["volume_ml"] > 200


def test_a_finding_outside_the_slice_is_pointed_out(view: SegmentationView) -> None:
    assert 26 not in view.colors
    assert len(view.notes) == 1
    assert "hepatic tumor is largest in axial slice" in view.notes[0]
    assert "outside the slice that the VLM saw (0); ask again with that slice_index" in view.notes[0]


def test_a_finding_inside_the_slice_is_only_located() -> None:
    rows = [{"name": "hepatic tumor", "slice_axis": "axial", "largest_slice": 7}]
    assert slice_notes(rows, ("hepatic tumor",), {"hepatic tumor"}, 5) == ["hepatic tumor is largest in axial slice 7."]
    assert slice_notes(rows, ("lung tumor",), set(), 5) == []
