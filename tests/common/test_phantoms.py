from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from vila_m3_common import phantoms
from vila_m3_common.study import open_study


def test_a_seed_always_gives_the_same_phantom() -> None:
    first, second = (phantoms.ct_phantom(3, shape=(40, 36, 32), spacing=8.0) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.labels, second.labels)
    other = phantoms.ct_phantom(4, shape=(40, 36, 32), spacing=8.0)
    assert not np.array_equal(first.image, other.image)


def test_the_ct_has_organs_of_plausible_size_and_density(ct_phantom: phantoms.VolumePhantom) -> None:
    liver = ct_phantom.labels == 1
    assert 500 < liver.sum() * 4.5**3 / 1000 < 2500  # mL
    assert 40 < ct_phantom.image[liver].mean() < 140  # HU, portal venous phase
    assert ct_phantom.image.min() < -900


def test_the_tumour_count_is_that_of_the_labels(ct_phantom: phantoms.VolumePhantom) -> None:
    components = ndimage.label(ct_phantom.labels == 26, structure=np.ones((3, 3, 3)))[1]
    assert ct_phantom.tumor_counts == {"hepatic tumor": components}


def test_a_glioma_has_all_three_parts_and_its_absence_none() -> None:
    with_tumor = phantoms.mri_phantom(1, has_tumor=True, shape=(40, 48, 36), spacing=4.5)
    without = phantoms.mri_phantom(1, has_tumor=False, shape=(40, 48, 36), spacing=4.5)
    assert set(np.unique(with_tumor.labels)) == {0, 1, 2, 4}
    assert not without.labels.any()
    assert without.tumor_counts == {}
    assert (with_tumor.image[:, with_tumor.image[0] == 0] == 0).all()


@pytest.mark.parametrize("finding", phantoms.CXR_PHANTOM_FINDINGS)
def test_every_finding_changes_the_radiograph(finding: str) -> None:
    healthy, ill = phantoms.cxr_phantom(5, findings=[]), phantoms.cxr_phantom(5, findings=[finding])
    assert ill.findings == (finding,)
    assert np.abs(ill.image.astype(int) - healthy.image).mean() > 1


def test_written_phantoms_are_recognised(ct_file: Path, mri_folder: Path, cxr_file: Path) -> None:
    assert [open_study(path).modality for path in (ct_file, mri_folder, cxr_file)] == ["CT", "MRI", "CXR"]
