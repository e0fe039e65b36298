"""Expert conversations made end to end: the opened experts on real studies, written as JSONL beside their pictures."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from vila_m3.data.checks import RowChecks
from vila_m3.data.experts import DATA_SETS, brats, cxr, vista3d
from vila_m3.data.experts.labels import read_label_table
from vila_m3.data.experts.wording import describe_wordings, pick, segment_wordings, tumor_wordings, wordings
from vila_m3.data.prepare import prepare
from vila_m3.data.record import Message, Record, load_image
from vila_m3.data.source import Item, Pending, Rejected, RowProblem
from vila_m3.questions import is_held_out, tables
from vila_m3.resumable_files import write_atomically
from vila_m3_common.anatomy import TUMORS
from vila_m3_common.conversation import IMAGE_TOKEN
from vila_m3_common.errors import UserError, check_choice, exits_with_message
from vila_m3_common.hooks import BundleExpert, close_experts, open_experts
from vila_m3_common.members import find_member
from vila_m3_common.prompts import BRATS_LABELS, ct_report
from vila_m3_common.slices import scale_min_max, take_slice, window_ct

from .expert_studies import (
    Segmentation,
    centre_slices,
    ras_volume,
    run_expert,
    save_picture,
    segment,
    spread_slices,
    study_digest,
)

EXPERTS = {"CT": "VISTA3D", "MRI": "BRATS", "CXR": "CXR"}
QUESTIONS = {
    "CT": ("describe", "tumor", "segment"),
    "MRI": ("describe", "grade", "segment"),
    "CXR": ("multilabel", "binary"),
}
REFERENCE_SLICES = "reference"
# Folder of what an unfinished run has chosen.
SLICES = ".slices"


@dataclass
class Settings:
    """What is asked, and how.

    Args:
        cards: text of the model cards.
        questions: modality -> kinds of questions, see ``QUESTIONS``.
        arguments: VISTA3D's arguments that are asked with; None takes all of the card.
        slices: slices of each volume: a number spreads them over the volume (over the tumour where there is one), and
            ``reference`` takes those of the original: through the centre of every part larger than 1 mL on CT, with
            all three labels on MRI.
        labels: ``{"file": CSV, "image_column": ..., "findings_column": ...}``, see :func:`read_label_table`; its
            labels are then the truth about radiographs, in place of the expert's predictions.
        contrast_only: show T1c in the places of all four sequences, as the original's export does.
        seed: of the choice of questions.
        split: names the output; any but ``train`` asks in wordings that training never sees.
    """

    cards: str
    questions: Mapping[str, Sequence[str]] = field(default_factory=lambda: QUESTIONS)
    arguments: Sequence[str] | None = None
    slices: int | str = 1
    labels: Mapping[str, Any] | None = None
    contrast_only: bool = False
    seed: int = 0
    split: str = "train"

    def __post_init__(self) -> None:
        if self.slices != REFERENCE_SLICES and (not isinstance(self.slices, int) or self.slices < 1):
            raise UserError(f"slices {self.slices!r} is neither a number from 1 on nor {REFERENCE_SLICES!r}")
        for modality, kinds in self.questions.items():
            check_choice(modality, list(QUESTIONS), "modality")
            for kind in kinds:
                check_choice(kind, QUESTIONS[modality], f"kind of question about {modality}")
        valid = list(tables()["ct_segment"]["objects"])
        self.arguments = [check_choice(name, valid, "argument of VISTA3D") for name in self.arguments or valid]

    def pick(self, candidates: Sequence[str], rng: random.Random) -> str:
        """Choose a wording of this split's side."""
        return pick(candidates, rng, self.split != "train")

    @cached_property
    def truths(self) -> tuple[dict[str, dict[str, bool]], list[tuple[int, str]]] | None:
        """The labels of radiographs and the broken rows of their table; None without a table."""
        return read_label_table(**self.labels) if self.labels else None

    def describe(self) -> dict[str, Any]:
        """Return what a run must share with the one that it continues."""
        kept = {name: value for name, value in vars(self).items() if name not in ("cards", "truths")}
        return {**kept, "cards": hashlib.sha256(self.cards.encode()).hexdigest()}


@dataclass
class Study:
    """A study on its way through an expert; keeps the last segmentation.

    Args:
        name: such as ``ct_00003``.
        number: from 1.
        paths: files of the study.
        expert: reads it.
        folder: of the pictures.
        work: of the expert's own files.
        settings: see there.
    """

    name: str
    number: int
    paths: Sequence[str]
    expert: BundleExpert
    folder: Path
    work: Path
    settings: Settings
    _last: tuple[str, Segmentation] | None = None

    def segmentation(self, argument: str) -> Segmentation:
        """Return what the expert finds for an argument; run once as long as no other is asked for in between."""
        if self._last is None or self._last[0] != argument:
            self._last = None  # not two label maps in memory
            self._last = (argument, segment(self.expert, self.paths, self.work, argument))
        return self._last[1]

    @cached_property
    def volumes(self) -> list[np.ndarray]:
        """The study's volumes in RAS order."""
        return [ras_volume(path) for path in self.paths]

    @cached_property
    def scores(self) -> dict[str, float]:
        """Finding -> probability."""
        return run_expert(self.expert, self.paths, self.work, "").scores

    def slices(self, argument: str, wanted: Sequence[int], needs_all: bool) -> list[int]:
        """Return the slices to export; kept in a file, so that a resumed run need not ask the expert again.

        Args:
            argument: of the expert.
            wanted: labels that decide which slices are best; none for any.
            needs_all: whether the reference's rule is that all of them are present.

        Raises:
            UserError: if the study cannot be read or the expert fails, now or when the file was written.
        """
        slices = self.settings.slices
        key = f"{study_digest(self.paths)}_{slices}_{argument.replace(' ', '_') or 'none'}.json"
        path = self.folder / SLICES / key
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            try:
                chosen: dict[str, Any] = {"slices": self._choose_slices(argument, wanted, needs_all)}
            except (UserError, OSError) as error:
                chosen = {"problem": str(error)}
            write_atomically(path, json.dumps(chosen))
        kept = json.loads(path.read_text())
        if "problem" in kept:
            raise UserError(kept["problem"])
        return list(kept["slices"])

    def _choose_slices(self, argument: str, wanted: Sequence[int], needs_all: bool) -> list[int]:
        found = self.segmentation(argument)
        areas = np.stack([(found.labels == label).sum(axis=(0, 1)) for label in wanted or (0,)])
        if self.settings.slices != REFERENCE_SLICES:
            return spread_slices(areas.sum(axis=0) * bool(wanted), int(self.settings.slices))
        return np.flatnonzero(areas.all(axis=0)).tolist() if needs_all else centre_slices(found)


Rows = Iterator[tuple[str, Callable[[random.Random], Record]]]


def ct_rows(study: Study) -> Rows:
    """Ask, with every argument, for the content of slices, for tumours and how many, and for a segmentation."""
    settings = study.settings
    for argument in settings.arguments or ():
        tumor = [TUMORS[argument]] if argument in TUMORS else []
        kind = "tumor" if tumor else "describe"
        for index in study.slices(argument, tumor, needs_all=False):
            place = f"{argument.replace(' ', '_')}_{index:04d}"
            if kind in settings.questions["CT"]:
                maker = _ask_tumor if tumor else _ask_structures
                yield f"{place}_{kind}", partial(maker, study, index, argument)
            if "segment" in settings.questions["CT"]:
                yield f"{place}_segment", partial(_request_structures, study, index, argument)


def _ct_picture(study: Study, index: int) -> tuple[np.ndarray, str]:
    grey = window_ct(take_slice(study.volumes[0], index))
    return grey, save_picture(grey, study.folder, f"{study.name}_{index:04d}_img.png")


def _ct_overlay(study: Study, index: int, argument: str, grey: np.ndarray) -> tuple[list[tuple[str, str]], str]:
    found = study.segmentation(argument)
    name = f"{study.name}_{index:04d}_{argument.replace(' ', '_')}_label.png"
    return found.legend(index), save_picture(found.overlay(grey, index), study.folder, name)


def _ask_structures(study: Study, index: int, argument: str, rng: random.Random) -> Record:
    grey, image = _ct_picture(study, index)
    legend, label = _ct_overlay(study, index, argument, grey)
    if not legend:
        raise RowProblem(f"the expert found nothing of {argument} in slice {index}")
    question = study.settings.pick(describe_wordings(argument), rng)
    return vista3d.describe_record("", image, label, question, argument, legend, study.settings.cards)


def _ask_tumor(study: Study, index: int, argument: str, rng: random.Random) -> Record:
    grey, image = _ct_picture(study, index)
    legend, label = _ct_overlay(study, index, argument, grey)
    count = study.segmentation(argument).count_parts(index, TUMORS[argument])
    question = study.settings.pick(tumor_wordings(argument), rng)
    count_question = study.settings.pick(wordings("count"), rng)
    counts = {argument: count} if count else {}
    cards = study.settings.cards
    return vista3d.tumor_record("", image, label, question, argument, legend, counts, count_question, cards)


def _request_structures(study: Study, index: int, argument: str, rng: random.Random) -> Record:
    image = _ct_picture(study, index)[1]
    is_held_out_split = study.settings.split != "train"
    requests = [row for row in segment_wordings(argument) if is_held_out(row[0]) == is_held_out_split]
    question, past, what = rng.choice(requests)
    return vista3d.segment_record("", image, question, ct_report(past, what, argument), study.settings.cards)


def mri_rows(study: Study) -> Rows:
    """Ask what four sequences (T1c, T1, T2, FLAIR) are, for the glioma's grade, and for a segmentation."""
    for index in study.slices("", BRATS_LABELS, needs_all=True):
        for kind in study.settings.questions["MRI"]:
            yield f"{index:04d}_{kind}", partial(_ask_mri, study, index, kind)


def _ask_mri(study: Study, index: int, kind: str, rng: random.Random) -> Record:
    settings, found = study.settings, study.segmentation("")
    greys = [scale_min_max(take_slice(v, index), float(v.min()), float(v.max())) for v in study.volumes]
    names = [f"{study.name}_{index:04d}_{number}.png" for number in range(len(greys))]
    saved = [save_picture(grey, study.folder, name) for grey, name in zip(greys, names, strict=True)]
    images = brats.sequences(saved, settings.contrast_only)
    if kind == "describe":
        return brats.describe_record("", images, "", settings.pick(wordings("describe"), rng), settings.cards)
    present = [label for label in found.present(index) if label in BRATS_LABELS]
    if not present:
        raise RowProblem(f"the expert found no tumour in slice {index}")
    label = save_picture(found.overlay(greys[0], index), study.folder, f"{study.name}_{index:04d}_label.png")
    if kind == "segment":
        question = settings.pick(wordings("brain_segment"), rng)
        return brats.segment_record("", images, label, question, settings.cards, present)
    question, is_low = settings.pick(wordings("grade"), rng), brats.read_grade(study.paths[0])
    return brats.grade_record("", images, label, question, is_low, settings.cards, present)


def cxr_rows(study: Study) -> Rows:
    """Ask for all findings of a radiograph, and whether it shows one of them."""
    for kind in study.settings.questions["CXR"]:
        yield kind, partial(_ask_cxr, study, kind)


def _ask_cxr(study: Study, kind: str, rng: random.Random) -> Record:
    settings = study.settings
    truth = _truth(study)
    image = save_picture(load_image(Path(study.paths[0])), study.folder, f"{study.name}.png")
    if kind == "multilabel":
        question = settings.pick(wordings("multilabel"), rng)
        answer = cxr.multilabel_answer([finding for finding, is_present in truth.items() if is_present])
    else:
        asked = rng.choice(sorted(truth))
        question = settings.pick(wordings("binary", [tables()["cxr_findings"][asked][0]]), rng)
        answer = "yes" if truth[asked] else "no"
    messages = (Message("user", f"{question}\n{IMAGE_TOKEN}"), Message("assistant", answer))
    metadata = {"expert": "CXR", "question_type": kind, "truth": "labels" if settings.truths else "expert"}
    return cxr.add_expert(Record("", messages, (image,), metadata), study.scores, settings.cards)


def _truth(study: Study) -> dict[str, bool]:
    """Return finding -> whether it is present: by the data set's labels where there are some, else by the expert."""
    if study.settings.truths is None:
        return {finding: score > 0.5 for finding, score in study.scores.items()}
    truth = study.settings.truths[0].get(Path(study.paths[0]).name)
    if not truth:
        raise RowProblem("the image has no labels in the label table")
    return truth


MAKERS: dict[str, Callable[[Study], Rows]] = {"CT": ct_rows, "MRI": mri_rows, "CXR": cxr_rows}


def read_studies(
    modality: str, cases: Sequence[Sequence[str]], expert: BundleExpert, folder: Path, work: Path, settings: Settings
) -> Iterator[Item]:
    """Yield a row per question; one study that cannot be read is refused, the others stay.

    Args:
        modality: CT, MRI or CXR.
        cases: files of each study.
        expert: of the modality.
        folder: of the pictures; exists.
        work: of the expert's own files; exists.
        settings: see there.
    """
    for number, reason in settings.truths[1] if modality == "CXR" and settings.truths else ():
        yield Rejected(number, reason, "label table")
    for number, paths in enumerate(cases, start=1):
        name = f"{modality.lower()}_{number - 1:05d}"
        study = Study(name, number, paths, expert, folder, work, settings)
        try:
            for place, make in MAKERS[modality](study):
                yield Pending(number, _Row(study, f"{name}_{place}", make), name)
        except (UserError, OSError) as error:
            yield Rejected(number, str(error), name)


@dataclass
class _Row:
    """One question to be asked of a study."""

    study: Study
    name: str
    make: Callable[[random.Random], Record]

    def __call__(self) -> Record:
        rng = random.Random(f"{self.study.settings.seed}/{self.name}")
        try:
            record = self.make(rng)
        except RowProblem:
            raise
        except (UserError, OSError) as error:
            raise RowProblem(str(error)) from error
        own = {"split": self.study.settings.split, "patient": study_digest(self.study.paths)}
        return replace(record, id=self.name, metadata={**record.metadata, **own})


@exits_with_message
def make_expert_data(
    studies: Mapping[str, Sequence[Sequence[str]]],
    output_dir: str,
    bundle_root: str,
    expert_bundles: Sequence[str],
    settings: Settings,
    expert_overrides: Mapping[str, Any] | None = None,
) -> None:
    """Run the experts on studies and write ``<output_dir>/<data set>_<split>.jsonl`` and the pictures.

    The data sets are named as ``mixture_m3.json`` expects them (``DATA_SETS``); pictures stand in a folder of that
    name. Refused questions and studies stand in ``<data set>_<split>.rejected.jsonl`` under the study's number. A
    killed run goes on with the next question.

    Args:
        studies: ``CT``, ``MRI`` or ``CXR`` -> studies, each the list of its files (MRI: T1c, T1, T2, FLAIR).
        output_dir: folder of the output.
        bundle_root: root of the composite.
        expert_bundles: names or paths of the expert bundles.
        settings: what is asked.
        expert_overrides: config items to override in every expert bundle.

    Raises:
        UserError: for unknown modalities, or experts that are not among the bundles.
    """
    for modality in studies:
        check_choice(modality, list(DATA_SETS), "modality")
    experts = open_experts([find_member(name, bundle_root) for name in expert_bundles], expert_overrides)
    work = Path(output_dir) / f".expert_work_{settings.split}"
    work.mkdir(parents=True, exist_ok=True)
    try:
        for modality, cases in studies.items():
            if not cases:
                continue
            if EXPERTS[modality] not in experts:
                raise UserError(f"no bundle gives the expert {EXPERTS[modality]}; add one to expert_bundles")
            _write_modality(modality, cases, experts[EXPERTS[modality]], Path(output_dir), work, settings)
    finally:
        close_experts(experts)
        shutil.rmtree(work, ignore_errors=True)


def _write_modality(
    modality: str,
    cases: Sequence[Sequence[str]],
    expert: BundleExpert,
    output: Path,
    work: Path,
    settings: Settings,
) -> None:
    folder = output / DATA_SETS[modality] / settings.split
    folder.mkdir(parents=True, exist_ok=True)
    cases = [[paths] if isinstance(paths, str) else list(paths) for paths in cases]
    options = {**settings.describe(), "studies": study_digest([study_digest(paths) for paths in cases])}
    rows = read_studies(modality, cases, expert, folder, work, settings)
    checks = RowChecks(folder.parent)
    prepare(rows, DATA_SETS[modality], settings.split, output, checks, options=options, save_every=1)
    shutil.rmtree(folder / SLICES, ignore_errors=True)
