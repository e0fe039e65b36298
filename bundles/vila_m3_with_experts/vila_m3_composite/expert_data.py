"""Expert conversations made end to end: the opened experts on real studies, written as JSONL beside their pictures."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image
from tqdm import tqdm

from vila_m3.data.experts import brats, cxr, vista3d
from vila_m3.data.experts.wording import pick, segment_wordings, wordings
from vila_m3.data.record import Message, Record, format_row
from vila_m3.questions import is_held_out, tables
from vila_m3_common.conversation import IMAGE_TOKEN
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.expert import ExpertRequest, ExpertResult
from vila_m3_common.hooks import BundleExpert, close_experts, open_experts
from vila_m3_common.members import find_member
from vila_m3_common.slices import scale_min_max, take_slice, to_ras, window_ct
from vila_m3_common.volumes import load_picture

MODALITIES = ("CT", "MRI", "CXR")


def run_on(expert: BundleExpert, paths: Sequence[str], work: Path, argument: str, index: int | None) -> ExpertResult:
    """Run an expert on one study.

    Raises:
        UserError: if the expert could not answer.
    """
    result = expert.run(ExpertRequest(tuple(paths), argument, index, 2, "", str(work), "case"))
    if result.is_error:
        raise UserError(f"the expert failed: {result.text}")
    return result


def _save(picture: np.ndarray, folder: Path, name: str) -> str:
    Image.fromarray(np.ascontiguousarray(picture)).save(folder / name)
    return name


def _ras(path: str) -> np.ndarray:
    image = nib.Nifti1Image.from_filename(path)
    return np.asarray(to_ras(image.get_fdata(dtype=np.float32), np.asarray(image.affine)))


def ct_records(
    name: str, paths: Sequence[str], expert: BundleExpert, cards: str, folder: Path, rng: random.Random, held_out: bool
) -> Iterator[Record]:
    """Ask for everything in the middle slice of a CT, and for a segmentation of it."""
    volume = _ras(paths[0])
    index = volume.shape[2] // 2
    image = _save(window_ct(take_slice(volume, index)), folder, f"{name}_img.png")
    result = run_on(expert, paths, folder / "work", "everything", index)
    label = _save(result.images[0], folder, f"{name}_label.png") if result.images else ""
    if label:
        legend, question = list(result.legend.items()), pick(wordings("describe"), rng, held_out)
        yield vista3d.describe_record(f"{name}_what", image, label, question, "everything", legend, cards)
    requests = [row for row in segment_wordings("everything") if is_held_out(row[0]) == held_out]
    question, past, what = rng.choice(requests)
    report = f"I {past} {what} using <VISTA3D(everything)>."
    yield vista3d.segment_record(f"{name}_segment", image, question, report, cards)


def mri_records(
    name: str, paths: Sequence[str], expert: BundleExpert, cards: str, folder: Path, rng: random.Random, held_out: bool
) -> Iterator[Record]:
    """Ask what four sequences (T1c, T1, T2, FLAIR) are, and for a segmentation of the slice with most tumour."""
    result = run_on(expert, paths, folder / "work", "", None)
    labels = _ras(str(result.label_map_path))
    index = int(np.argmax((labels > 0).sum(axis=(0, 1)))) if labels.any() else labels.shape[2] // 2
    volumes = [_ras(path) for path in paths]
    greys = [scale_min_max(take_slice(volume, index), float(volume.min()), float(volume.max())) for volume in volumes]
    images = [_save(grey, folder, f"{name}_{number}.png") for number, grey in enumerate(greys)]
    yield brats.describe_record(f"{name}_what", images, "", pick(wordings("describe"), rng, held_out), cards)
    shown = run_on(expert, paths, folder / "work", "", index)
    present = [int(label) for label in np.unique(take_slice(labels, index)) if label]
    if shown.images and present:
        label_image = _save(shown.images[0], folder, f"{name}_label.png")
        question = pick(wordings("brain_segment"), rng, held_out)
        yield brats.segment_record(f"{name}_segment", images, label_image, question, cards, present)


def cxr_records(
    name: str, paths: Sequence[str], expert: BundleExpert, cards: str, folder: Path, rng: random.Random, held_out: bool
) -> Iterator[Record]:
    """Ask for all findings of a radiograph, and for one; the answers are the expert's own."""
    image = _save(load_picture(paths[0]), folder, f"{name}.png")
    scores = run_on(expert, paths, folder / "work", "", None).scores
    positive = [finding for finding, score in scores.items() if score > 0.5]
    asked = rng.choice(sorted(scores))
    noun = tables()["cxr_findings"][asked][0]
    pairs = {
        "multilabel": (pick(wordings("multilabel"), rng, held_out), cxr.multilabel_answer(positive)),
        "binary": (pick(wordings("binary", [noun]), rng, held_out), "yes" if asked in positive else "no"),
    }
    for kind, (question, answer) in pairs.items():
        messages = (Message("user", f"{question}\n{IMAGE_TOKEN}"), Message("assistant", answer))
        metadata = {"expert": "CXR", "question_type": kind}
        yield cxr.add_expert(Record(f"{name}_{kind}", messages, (image,), metadata), scores, cards)


MAKERS = {"CT": ("VISTA3D", ct_records), "MRI": ("BRATS", mri_records), "CXR": ("CXR", cxr_records)}


@exits_with_message
def make_expert_data(
    studies: Mapping[str, Sequence[Sequence[str]]],
    output_dir: str,
    bundle_root: str,
    expert_bundles: Sequence[str],
    cards: str,
    seed: int = 0,
    held_out: bool = False,
    expert_overrides: Mapping[str, Any] | None = None,
) -> None:
    """Run the experts on studies and write ``<output_dir>/<modality>.jsonl`` with the pictures beside it.

    Args:
        studies: ``CT``, ``MRI`` or ``CXR`` -> studies, each the list of its files (MRI: T1c, T1, T2, FLAIR).
        output_dir: folder of the output.
        bundle_root: root of the composite.
        expert_bundles: names or paths of the expert bundles.
        cards: text of the model cards.
        seed: of the choice of questions.
        held_out: whether to ask in wordings that training never sees.
        expert_overrides: config items to override in every expert bundle.

    Raises:
        UserError: for unknown modalities.
    """
    unknown = sorted(set(studies) - set(MODALITIES))
    if unknown:
        raise UserError(f"modality {', '.join(unknown)} is unknown; allowed: {', '.join(MODALITIES)}")
    folder = Path(output_dir)
    (folder / "work").mkdir(parents=True, exist_ok=True)
    experts = open_experts([find_member(name, bundle_root) for name in expert_bundles], expert_overrides)
    try:
        for modality, cases in studies.items():
            _write_modality(modality, cases, experts, cards, folder, seed, held_out)
    finally:
        close_experts(experts)
        shutil.rmtree(folder / "work", ignore_errors=True)


def _write_modality(
    modality: str,
    cases: Sequence[Sequence[str]],
    experts: Mapping[str, BundleExpert],
    cards: str,
    folder: Path,
    seed: int,
    held_out: bool,
) -> None:
    """One study that fails is told and left out; the others stay."""
    expert_name, maker = MAKERS[modality]
    path = folder / f"{modality.lower()}.jsonl"
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for number, paths in enumerate(tqdm(cases, desc=modality)):
            rng = random.Random(f"{seed}/{number}")
            name = f"{modality.lower()}_{number:05d}"
            try:
                records = list(maker(name, paths, experts[expert_name], cards, folder, rng, held_out))
            except (UserError, OSError) as error:
                tqdm.write(f"{name} is left out: {error}")
                continue
            file.writelines(f"{format_row(record)}\n" for record in records)
    os.replace(partial, path)
