"""Training the VLM on what its experts really say: phantoms labelled by the opened expert bundles."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from tqdm import tqdm

from vila_m3.phantom_conversations import ConversationMaker, PhantomPool, slice_indices
from vila_m3_common import phantoms, prompts
from vila_m3_common.anatomy import TUMORS
from vila_m3_common.expert import ExpertRequest, ExpertResult
from vila_m3_common.hooks import BundleExpert, close_experts, open_experts
from vila_m3_common.members import find_member
from vila_m3_common.slices import scale_min_max, take_slice, window_ct


def make_live_conversations(
    volume_count: int,
    first_seed: int,
    cards: str,
    bundle_root: str,
    expert_bundles: Sequence[str],
    held_out: bool = False,
    expert_overrides: Mapping[str, Any] | None = None,
    slices_per_volume: int = 6,
) -> ConversationMaker:
    """Run the experts on phantoms and return the maker of conversations about their results.

    Args:
        volume_count: phantoms per modality (four times as many radiographs).
        first_seed: seeds of training and validation must not overlap.
        cards: text of the model cards.
        bundle_root: root of the composite.
        expert_bundles: names or paths of the expert bundles; VISTA3D, BRATS and CXR must be among them.
        held_out: whether to use only question wordings that training never sees.
        expert_overrides: config items to override in every expert bundle.
        slices_per_volume: slices kept of each CT and MRI.
    """
    experts = open_experts([find_member(name, bundle_root) for name in expert_bundles], expert_overrides)
    work = Path(tempfile.mkdtemp())
    pool = PhantomPool()
    try:
        for seed in tqdm(range(first_seed, first_seed + volume_count), desc="experts on phantoms"):
            _add_ct(pool, experts["VISTA3D"], seed, work, slices_per_volume)
            _add_mri(pool, experts["BRATS"], seed, work, slices_per_volume)
            for offset in range(4):
                _add_cxr(pool, experts["CXR"], 4 * seed + offset, work)
    finally:
        close_experts(experts)
        shutil.rmtree(work, ignore_errors=True)
    return ConversationMaker(pool, cards, held_out)


def _run(expert: BundleExpert, paths: Sequence[Path], work: Path, argument: str = "") -> ExpertResult:
    return expert.run(ExpertRequest(tuple(str(path) for path in paths), argument, None, 2, "", str(work), "live"))


def _labels(result: ExpertResult) -> np.ndarray:
    assert result.label_map_path is not None
    return np.asarray(nib.Nifti1Image.from_filename(result.label_map_path).dataobj).astype(np.uint8)


def _add_ct(pool: PhantomPool, expert: BundleExpert, seed: int, work: Path, count: int) -> None:
    """Everything, then each kind of tumour laid over it, as separate calls would show them."""
    phantom = phantoms.ct_phantom(seed)
    path = phantoms.save_volume(phantom.image, phantom.affine, work / "ct.nii.gz")
    labels = _labels(_run(expert, [path], work, "everything"))
    for name, label in TUMORS.items():
        labels[_labels(_run(expert, [path], work, name)) == label] = label
    for index in slice_indices(labels, tuple(TUMORS.values()), count, seed):
        pool.ct.append((window_ct(take_slice(phantom.image, index)), take_slice(labels, index).copy()))


def _add_mri(pool: PhantomPool, expert: BundleExpert, seed: int, work: Path, count: int) -> None:
    phantom = phantoms.mri_phantom(seed)
    folder = phantoms.save_mri(phantom, work / "mri")
    labels = _labels(_run(expert, [folder / f"{name}.nii.gz" for name in ("t1c", "t1n", "t2w", "t2f")], work))
    for index in slice_indices(labels, prompts.BRATS_LABELS, count, seed):
        greys = [scale_min_max(take_slice(image, index), 0, float(image.max())) for image in phantom.image]
        pool.mri.append((greys, take_slice(labels, index).copy()))


def _add_cxr(pool: PhantomPool, expert: BundleExpert, seed: int, work: Path) -> None:
    phantom = phantoms.cxr_phantom(seed, size=128)
    result = expert.run(
        ExpertRequest((str(phantoms.save_radiograph(phantom, work / "cxr.png")),), output_dir=str(work), stem="live")
    )
    pool.cxr.append((phantom.image, tuple(name for name, score in result.scores.items() if score > 0.5)))
