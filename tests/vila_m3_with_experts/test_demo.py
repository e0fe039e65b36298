"""The images of the demonstration."""

from pathlib import Path

import nibabel as nib

from vila_m3_common.phantoms import CT_TUMORS, ct_phantom
from vila_m3_composite.demo import QUESTIONS, draw_phantoms


def test_every_image_has_questions_and_volumes_show_their_tumour(tmp_path: Path) -> None:
    cases = draw_phantoms(tmp_path)
    assert list(cases) == list(QUESTIONS)
    assert all(case.path.exists() for case in cases.values())
    ct, tumor = cases["ct"], ct_phantom(11, ["hepatic tumor"]).labels == CT_TUMORS["hepatic tumor"]
    assert nib.load(ct.path).shape == tumor.shape
    sizes = tumor.sum((0, 1))
    assert sizes[ct.slice_index] == sizes.max() > sizes[tumor.shape[2] // 2]
    assert cases["cxr"].slice_index is None
