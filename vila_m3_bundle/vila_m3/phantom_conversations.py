"""Conversations about phantoms, with expert turns made from the phantoms' ground truth.

These train and test the nano VLM. Every text comes from ``vila_m3_common.prompts``, the functions that serve.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from tqdm import tqdm

from vila_m3_common import phantoms, prompts
from vila_m3_common.anatomy import GROUPS, NAMES, TUMORS
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError, check_choice
from vila_m3_common.overlay import assign_colors, blend
from vila_m3_common.slices import grey_to_rgb, scale_min_max, take_slice, window_ct

from .data.experts.wording import wordings
from .questions import (
    Question,
    ct_describe,
    ct_segment,
    ct_tumor,
    cxr_finding,
    cxr_prediction,
    draw,
    from_table,
    tables,
)

SINGLE_MRI_REPLY = (
    "This is a single MRI sequence. No available expert reads it: "
    "VISTA3D needs a CT, BRATS needs T1c, T1, T2 and FLAIR."
)
UNKNOWN_REPLY = "The modality of this image is not known, so no expert was triggered."
FOREIGN_REPLY = "This question does not fit this image, so no expert was triggered."
MODALITY_REPLIES = {"CT": "This is a CT image.", "MRI": "This is a brain MRI scan.", "CXR": "This is a chest x-ray."}
GRADE_REPLY = "The grade cannot be told from this result."
_ERROR_REASONS = (
    "it reads CT, but the image is MRI",
    "it needs four brain MRI sequences",
    "unknown VISTA3D argument; Valid: everything, hepatic tumor, organs",
    "the image could not be read",
    "its weights are missing",
)


# How often a conversation is about each kind of image; one about a radiograph costs least, as several share a picture.
SHARES = {"CT": 0.3, "MRI": 0.15, "CXR": 0.45, "other": 0.1}
# How often each kind of question about a CT is drawn.
CT_KINDS = {"tumor": 0.42, "describe": 0.2, "structure": 0.12, "segment": 0.18, "modality": 0.05, "vista2d": 0.03}
# How often each kind of question begins a conversation about a radiograph.
CXR_KINDS = {"finding": 0.55, "describe": 0.2, "prediction": 0.18, "modality": 0.07}
# Arguments of VISTA3D whose structures are asked for one by one.
STRUCTURE_GROUPS = ("organs", "skeleton", "muscles", "cardiovascular", "gastrointestinal")


def error_reply(name: str) -> str:
    """Return what the model says after an expert could not be run."""
    return f"The expert {name} could not be run, so there is no result to answer from."


def structures_reply(legend: Sequence[tuple[str, str]]) -> str:
    """Return the answer to "what is in the image" from a legend, worded as trained."""
    if not legend:
        return "This a CT image. VISTA3D found none of these structures in this slice."
    listed = ", ".join(f"{color}: {name}" for color, name in legend)
    return f"This a CT image. It contains several anatomical structures such as identified by VISTA3D: {listed}."


def findings_reply(positive: Sequence[str]) -> str:
    """Return the answer to "what are the findings" of a chest X-ray."""
    if not positive:
        return "There are no findings."
    return f"The findings are: {', '.join(map(prompts.spoken, positive))}."


# A picture (H, W) and the findings drawn into it.
Radiograph = tuple[np.ndarray, tuple[str, ...]]


@dataclass
class PhantomPool:
    """Slices of phantoms, drawn once and used in many conversations.

    Args:
        ct: (grey ``(H, W)`` uint8, label ids ``(H, W)``).
        mri: (four greys, BraTS labels).
        cxr: (grey, findings).
    """

    ct: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    mri: list[tuple[list[np.ndarray], np.ndarray]] = field(default_factory=list)
    cxr: list[Radiograph] = field(default_factory=list)


def build_pool(
    volume_count: int, first_seed: int, slices_per_volume: int = 6, show_progress: bool = True
) -> PhantomPool:
    """Draw ``volume_count`` phantoms of each modality and cut slices, half of them through tumours.

    Args:
        volume_count: phantoms per modality (four times as many radiographs).
        first_seed: phantom seeds start here; training and validation must not overlap.
        slices_per_volume: slices kept of each CT and MRI.
        show_progress: whether to draw a progress bar.
    """
    pool = PhantomPool()
    seeds = range(first_seed, first_seed + volume_count)
    for seed in tqdm(seeds, desc="phantoms", disable=not show_progress):
        ct = phantoms.ct_phantom(seed)
        for index in slice_indices(ct.labels, tuple(TUMORS.values()), slices_per_volume, seed):
            pool.ct.append((window_ct(take_slice(ct.image, index)), take_slice(ct.labels, index).copy()))
        mri = phantoms.mri_phantom(seed)
        for index in slice_indices(mri.labels, prompts.BRATS_LABELS, slices_per_volume, seed):
            greys = [scale_min_max(take_slice(image, index), 0, float(image.max())) for image in mri.image]
            pool.mri.append((greys, take_slice(mri.labels, index).copy()))
        pool.cxr += draw_radiographs(seed)
    return pool


def draw_radiographs(seed: int) -> list[Radiograph]:
    """Draw the four radiographs that a pool has for a phantom seed."""
    drawn = [phantoms.cxr_phantom(4 * seed + offset, size=128) for offset in range(4)]
    return [(radiograph.image, radiograph.findings) for radiograph in drawn]


def slice_indices(labels: np.ndarray, targets: Sequence[int], count: int, seed: int) -> list[int]:
    """Choose axial slices of a label map ``(X, Y, Z)``, up to half of them through one of ``targets``."""
    rng = random.Random(seed)
    depth = labels.shape[2]
    through_targets = np.flatnonzero(np.isin(labels, targets).any(axis=(0, 1))).tolist()
    chosen = rng.sample(through_targets, min(count // 2, len(through_targets)))
    return chosen + [rng.randrange(depth // 6, depth - depth // 6) for _ in range(count - len(chosen))]


@dataclass(frozen=True)
class Sample:
    """A conversation with the kind of its first question, for scores per kind."""

    conversation: Conversation
    modality: str
    kind: str


def _check_shares(given: Mapping[str, float] | None, usual: Mapping[str, float], what: str) -> dict[str, float]:
    shares = dict(usual if given is None else given)
    for name in shares:
        check_choice(name, list(usual), what)
    if not any(shares.values()) or min(shares.values()) < 0:
        raise UserError(f"shares {shares} draw nothing; give numbers from 0 on, one of them above it")
    return shares


class ConversationMaker:
    """Makes conversations from a pool.

    Args:
        pool: phantom slices.
        cards: text of the model cards.
        held_out: whether to use only the question wordings that training never sees.
        shares: how often each of ``CT``, ``MRI``, ``CXR`` and ``other`` (what no expert reads) is drawn, in any unit;
            None takes :data:`SHARES`.
        ct_kinds: how often each kind of question about a CT is drawn, likewise; None takes :data:`CT_KINDS`.
        cxr_kinds: how often each kind of question comes first about a radiograph, likewise; None takes
            :data:`CXR_KINDS`.

    Raises:
        UserError: for another name, or shares that are negative or all zero.
    """

    def __init__(
        self,
        pool: PhantomPool,
        cards: str,
        held_out: bool = False,
        shares: Mapping[str, float] | None = None,
        ct_kinds: Mapping[str, float] | None = None,
        cxr_kinds: Mapping[str, float] | None = None,
    ) -> None:
        self.pool = pool
        self.cards = cards
        self.held_out = held_out
        self.shares = _check_shares(shares, SHARES, "kind of phantom")
        self.ct_kinds = _check_shares(ct_kinds, CT_KINDS, "kind of question")
        self.cxr_kinds = _check_shares(cxr_kinds, CXR_KINDS, "kind of question")

    def __call__(self, seed: int) -> Sample:
        """Make one conversation; everything random follows from ``seed``."""
        rng = random.Random(seed)
        makers: dict[str, Callable[[random.Random], Sample]] = {
            "CT": self._ct,
            "MRI": self._mri,
            "CXR": self._cxr,
            "other": self._other,
        }
        (kind,) = rng.choices(list(self.shares), weights=list(self.shares.values()))
        return makers[kind](rng)

    def _draw(self, make: Callable[[random.Random], Question], rng: random.Random) -> Question:
        return draw(make, rng, self.held_out)

    # CT ------------------------------------------------------------------------------------------------------------

    def _ct(self, rng: random.Random) -> Sample:
        grey, labels = rng.choice(self.pool.ct)
        if rng.random() < 0.5:
            labels = random_labels(labels.shape, rng)
        conversation = Conversation()
        kinds = rng.choices(list(self.ct_kinds), weights=list(self.ct_kinds.values()), k=rng.choice((1, 1, 2, 3)))
        for position, kind in enumerate(kinds):
            question = self._ct_question(kind, labels, rng)
            self._ask(conversation, "CT", question.text, [grey_to_rgb(grey)], position == 0)
            self._answer_ct(conversation, question, grey, labels, rng)
        return Sample(conversation, "CT", kinds[0])

    def _ct_question(self, kind: str, labels: np.ndarray, rng: random.Random) -> Question:
        if kind == "structure":
            return self._draw(lambda generator: structure_question(labels, generator), rng)
        makers = {
            "tumor": ct_tumor,
            "describe": ct_describe,
            "segment": ct_segment,
            "modality": from_table("modality", "modality"),
            "vista2d": from_table("vista2d", "vista2d"),
        }
        return self._draw(makers[kind], rng)

    def _answer_ct(
        self, conversation: Conversation, question: Question, grey: np.ndarray, labels: np.ndarray, rng: random.Random
    ) -> None:
        if question.kind == "modality":
            conversation.add("assistant", MODALITY_REPLIES["CT"])
        elif question.kind == "vista2d":
            self._answer_vista2d(conversation)
        elif question.kind == "segment":
            conversation.add("assistant", question.reply)
        else:
            conversation.add("assistant", prompts.trigger_reply("CT", question.argument))
            if rng.random() < 0.03:
                self._fail(conversation, "VISTA3D", question, rng)
                return
            legend, picture = show_group(grey, labels, question.argument)
            conversation.add("expert", prompts.ct_feedback(legend, question.text, "trained"), [picture])
            conversation.add("assistant", _ct_reply(question, legend))

    def _answer_vista2d(self, conversation: Conversation) -> None:
        conversation.add("assistant", "Let me trigger <VISTA2D()>.")
        conversation.add("expert", prompts.not_available("VISTA2D", ("VISTA3D", "BRATS", "CXR")))
        conversation.add("assistant", "The expert VISTA2D is not available.")

    def _fail(self, conversation: Conversation, name: str, question: Question, rng: random.Random) -> None:
        conversation.add("expert", prompts.expert_error(name, rng.choice(_ERROR_REASONS), question.text))
        conversation.add("assistant", error_reply(name))

    # MRI -----------------------------------------------------------------------------------------------------------

    def _mri(self, rng: random.Random) -> Sample:
        greys, labels = rng.choice(self.pool.mri)
        if rng.random() < 0.3:
            labels = np.where(labels == rng.choice((1, 2, 4)), 0, labels)
        conversation = Conversation()
        kinds = rng.choices(
            ("tumor", "segment", "grade", "modality"), weights=(0.45, 0.2, 0.25, 0.1), k=rng.choice((1, 1, 2))
        )
        for position, kind in enumerate(kinds):
            question = self._draw(partial(_mri_question, kind=kind), rng)
            self._ask(conversation, "MRI", question.text, [grey_to_rgb(grey) for grey in greys], position == 0)
            self._answer_mri(conversation, question, greys[0], labels, rng)
        return Sample(conversation, "MRI", kinds[0])

    def _answer_mri(
        self, conversation: Conversation, question: Question, grey: np.ndarray, labels: np.ndarray, rng: random.Random
    ) -> None:
        if question.kind == "modality":
            conversation.add("assistant", MODALITY_REPLIES["MRI"])
            return
        is_report = question.kind == "segment"
        conversation.add("assistant", prompts.BRATS_REPORT if is_report else prompts.trigger_reply("MRI"))
        if rng.random() < 0.03:
            self._fail(conversation, "BRATS", question, rng)
            return
        present = sorted(set(np.unique(labels).tolist()) - {0})
        colors = assign_colors(present)
        text = prompts.brats_feedback(present, colors, question.text, "trained")
        conversation.add("expert", text, [blend(grey, labels, colors)])
        replies = {"segment": prompts.BRATS_REPORTED, "grade": GRADE_REPLY, "tumor": "yes" if present else "no"}
        conversation.add("assistant", replies[question.kind])

    # Chest X-ray ---------------------------------------------------------------------------------------------------

    def _cxr(self, rng: random.Random) -> Sample:
        grey, drawn = rng.choice(self.pool.cxr)
        scores = random_scores(drawn, rng)
        conversation = Conversation()
        (kind,) = rng.choices(list(self.cxr_kinds), weights=list(self.cxr_kinds.values()))
        question = self._cxr_question(kind, scores, rng)
        self._ask(conversation, "CXR", question.text, [grey_to_rgb(grey)], True)
        if kind == "modality":
            conversation.add("assistant", MODALITY_REPLIES["CXR"])
            return Sample(conversation, "CXR", kind)
        conversation.add("assistant", prompts.trigger_reply("CXR"))
        if rng.random() < 0.03:
            self._fail(conversation, "CXR", question, rng)
            return Sample(conversation, "CXR", kind)
        conversation.add("expert", prompts.cxr_feedback(scores, question.text, "trained"))
        conversation.add("assistant", _cxr_reply(question, scores))
        kinds = rng.choices(
            ("finding", "describe", "prediction"), weights=(0.6, 0.07, 0.33), k=rng.choice((0, 6, 12, 18))
        )
        for later in kinds:
            question = self._cxr_question(later, scores, rng)
            conversation.add("user", question.text)
            conversation.add("assistant", _cxr_reply(question, scores))
        return Sample(conversation, "CXR", kind)

    def _cxr_question(self, kind: str, scores: dict[str, float], rng: random.Random) -> Question:
        # Half of the questions are about findings that are there; of 18 drawn blindly most are not.
        positive = [name for name, score in scores.items() if score > 0.5]
        asked = rng.choice((positive, [name for name in scores if name not in positive])) or list(scores)
        makers = {
            "finding": lambda generator: cxr_finding(generator, asked),
            "prediction": lambda generator: cxr_prediction(generator, asked),
            "describe": from_table("cxr_describe", "describe"),
            "modality": from_table("modality", "modality"),
        }
        return self._draw(makers[kind], rng)

    # Images that no expert reads -----------------------------------------------------------------------------------

    def _other(self, rng: random.Random) -> Sample:
        maker = rng.choice((ct_tumor, ct_describe, ct_segment, cxr_finding, from_table("mri_tumor", "tumor")))
        question = self._draw(maker, rng)
        conversation = Conversation()
        if rng.random() < 0.6:
            greys, _ = rng.choice(self.pool.mri)
            self._ask(conversation, "single MRI", question.text, [grey_to_rgb(rng.choice(greys))], True)
            conversation.add("assistant", SINGLE_MRI_REPLY)
            return Sample(conversation, "single MRI", "decoy")
        grey, _ = rng.choice(self.pool.ct)
        self._ask(conversation, "unknown", question.text, [grey_to_rgb(grey)], True)
        conversation.add("assistant", UNKNOWN_REPLY)
        return Sample(conversation, "unknown", "decoy")

    def _ask(
        self, conversation: Conversation, form: str, text: str, images: Sequence[np.ndarray], is_first: bool
    ) -> None:
        if is_first:
            conversation.add("user", prompts.opening(form, text, self.cards), images)
        else:
            conversation.add("user", text)


def _mri_question(rng: random.Random, kind: str) -> Question:
    table = {"tumor": "mri_tumor", "segment": "mri_segment", "grade": "mri_grade"}.get(kind)
    # Grade and segmentation are also asked for in the wordings of expert conversations.
    name = {"segment": "brain_segment", "grade": "grade"}.get(kind)
    if name and rng.random() < 0.5:
        return Question(rng.choice(wordings(name)), kind)
    return from_table(table or rng.choice(("describe", "modality")), kind)(rng)


def _ct_reply(question: Question, legend: Sequence[tuple[str, str]]) -> str:
    if question.kind == "describe":
        return structures_reply(legend)
    return "yes" if question.target in {name for _, name in legend} else "no"


def _cxr_reply(question: Question, scores: dict[str, float]) -> str:
    positive = [name for name, score in scores.items() if score > 0.5]
    if question.kind == "describe":
        return findings_reply(positive)
    answer = "yes" if question.target in positive else "no"
    return prompts.prediction(question.target, answer) if question.kind == "prediction" else answer


def group_ids(argument: str) -> set[int]:
    """Return the label ids that VISTA3D marks for an argument; parent classes stand for their parts."""
    ids = set(GROUPS[argument])
    return ids | (set(TUMORS.values()) & ids)


def show_group(grey: np.ndarray, labels: np.ndarray, argument: str) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Return legend and overlay picture of one label group in a slice."""
    ids = group_ids(argument)
    kept = np.where(np.isin(labels, list(ids)), labels, 0)
    colors = assign_colors(np.unique(kept).tolist())
    legend = [(color, NAMES[label]) for label, color in colors.items()]
    return legend, blend(grey, kept, colors)


def structure_question(labels: np.ndarray, rng: random.Random) -> Question:
    """Ask whether one structure is visible; half of the time it is."""
    argument = rng.choice(STRUCTURE_GROUPS)
    present = sorted(set(np.unique(labels).tolist()) & set(GROUPS[argument]))
    label = rng.choice(present if present and rng.random() < 0.5 else GROUPS[argument])
    if label in TUMORS.values():
        label = GROUPS[argument][0]
    text = rng.choice(tables()["structure_frames"]).format(name=NAMES[label])
    return Question(text, "structure", argument, NAMES[label])


def random_labels(shape: tuple[int, ...], rng: random.Random) -> np.ndarray:
    """Scatter discs of random structures, so that legends of every kind are read, not only the phantoms'.

    Every group has its own number of them, from none to a long list, as an expert's turn tells one group.
    """
    labels = np.zeros(shape, np.uint8)
    candidates = []
    for group in STRUCTURE_GROUPS:
        known = sorted(set(GROUPS[group]) - set(TUMORS.values()))
        candidates += rng.sample(known, min(len(known), rng.choice((0, 1, 1, 2, 3, 4, 6, 8))))
    rng.shuffle(candidates)
    candidates += [label for label in TUMORS.values() if rng.random() < 0.6]
    for label in candidates:
        row, column = rng.uniform(0.15, 0.85) * shape[0], rng.uniform(0.15, 0.85) * shape[1]
        radius = rng.uniform(0.03, 0.12) * shape[0]
        labels[disc(shape, row, column, radius)] = label
    return labels


def disc(shape: tuple[int, ...], row: float, column: float, radius: float) -> np.ndarray:
    """Return the pixels ``(H, W)`` of a picture that lie within a radius of a place, all in pixels."""
    rows, columns = np.ogrid[: shape[0], : shape[1]]
    inside: np.ndarray = (rows - row) ** 2 + (columns - column) ** 2 <= radius**2
    return inside


def random_scores(drawn: Sequence[str], rng: random.Random) -> dict[str, float]:
    """Scores for all findings: sometimes the phantom's own, mostly random, so that reading is learnt."""
    if rng.random() < 0.15:
        positive = set(drawn)
    else:
        rate = rng.choice((0.1, 0.3, 0.5, 0.7))
        positive = {name for name in prompts.CXR_TRAINED_ORDER if rng.random() < rate}
    return {name: 0.9 if name in positive else 0.1 for name in prompts.CXR_TRAINED_ORDER}
