"""Questions of the counterfactual audit: the same image and question, with different feedback of the expert.

Variants of the feedback:

``none``           no model cards and no expert,
``expert``         what the expert really said, where that was recorded,
``true``           what the labels (or the phantom's ground truth) say,
``flipped``        the expert's (or true) feedback with the asked finding turned round,
``swapped``        the feedback about another patient,
``blank``          feedback that names nothing,
``contradicting``  feedback that says both: the finding twice (X-ray), or a legend that its picture belies (CT).
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vila_m3_common import prompts
from vila_m3_common.anatomy import NAMES, TUMORS
from vila_m3_common.conversation import Conversation
from vila_m3_common.slices import grey_to_rgb
from vila_m3_common.volumes import load_picture

from ..data.experts.cxr import read_scores
from ..phantom_conversations import PhantomPool, build_pool, show_group
from ..questions import Question, ct_tumor, cxr_finding, draw, from_table
from .nih import Film, held_out_films

VARIANTS = ("none", "expert", "true", "flipped", "swapped", "blank", "contradicting")
# Findings that the films' labels tell of; the expert's other four are unknown there.
LABELLED = tuple(
    name
    for name in prompts.CXR_TRAINED_ORDER
    if name not in ("Lung Lesion", "Fracture", "Lung Opacity", "Enlarged Cardiomediastinum")
)


@dataclass(frozen=True)
class Feedback:
    """One variant of the expert's turn.

    Args:
        text: with ``<image>`` for each picture.
        images: its pictures.
        named: what it says is there.
        is_decisive: whether it says one thing about what was asked.
    """

    text: str
    images: tuple[np.ndarray, ...]
    named: frozenset[str]
    is_decisive: bool = True


@dataclass(frozen=True)
class AuditCase:
    """One question about one image.

    Args:
        id: names it.
        patient: whose image it is.
        modality: CXR or CT.
        question: asks for a finding (``target``) or, without one, for all.
        image: what the VLM sees first.
        truth: what is there.
        feedback: variant -> expert turn; ``none`` is not among them.
    """

    id: str
    patient: str
    modality: str
    question: Question
    image: np.ndarray
    truth: frozenset[str]
    feedback: Mapping[str, Feedback] = field(default_factory=dict)

    def conversation(self, variant: str, cards: str) -> Conversation:
        """Return the conversation up to the turn that is audited."""
        conversation = Conversation()
        form = prompts.opening(self.modality, self.question.text, "" if variant == "none" else cards)
        conversation.add("user", form, [self.image])
        if variant != "none":
            argument = self.question.argument if self.modality == "CT" else ""
            conversation.add("assistant", prompts.trigger_reply(self.modality, argument))
            conversation.add("expert", self.feedback[variant].text, self.feedback[variant].images)
        return conversation


# Chest X-ray ------------------------------------------------------------------------------------------------------


def film_cases(nih_root: str, scores_root: str | None, count: int, seed: int = 0) -> Iterator[AuditCase]:
    """Yield questions about films: one finding that is there, one that is not, and all of them.

    Args:
        nih_root: folder of the films with ``labels.csv``.
        scores_root: folder with ``<film>.json`` of the expert's scores; None leaves the variant ``expert`` out.
        count: patients at most, one film each.
        seed: of the choice.
    """
    rng = random.Random(seed)
    films = list({film.patient: film for film in held_out_films(nih_root)}.values())
    films = rng.sample(films, min(count, len(films)))
    said = {film.path: film.findings for film in films}
    if scores_root:
        said = {film.path: _positive(scores_root, film) for film in films}
    for place, film in enumerate(films):
        other = said[films[place - 1].path]
        for number, question in enumerate(_film_questions(film, rng)):
            feedback = _film_feedback(question, film.findings, said[film.path], other, rng)
            if not scores_root:
                del feedback["expert"]
            name = f"film-{film.path.stem}-{number}"
            image = load_picture(film.path)
            yield AuditCase(name, film.patient, "CXR", question, image, film.findings, feedback)


def _positive(scores_root: str, film: Film) -> frozenset[str]:
    return frozenset(name for name, score in read_scores(scores_root, film.path.name).items() if score > 0.5)


def _film_questions(film: Film, rng: random.Random) -> Iterator[Question]:
    for asked in (sorted(film.findings & set(LABELLED)), [name for name in LABELLED if name not in film.findings]):
        if asked:
            choice = [rng.choice(asked)]
            yield draw(lambda generator, names=choice: cxr_finding(generator, names), rng, True)
    yield draw(from_table("cxr_describe", "describe"), rng, True)


def _film_feedback(
    question: Question, truth: frozenset[str], said: frozenset[str], other: frozenset[str], rng: random.Random
) -> dict[str, Feedback]:
    target = question.target
    flipped = said ^ {target} if target else frozenset(prompts.CXR_TRAINED_ORDER) - said
    both = target or rng.choice(prompts.CXR_TRAINED_ORDER)
    yes, no = (f"{prompts.prediction(both, word)}\n" for word in ("yes", "no"))
    text = _film_text(said | {both}, question).replace(yes, yes + no)
    return {
        "expert": Feedback(_film_text(said, question), (), said),
        "true": Feedback(_film_text(truth, question), (), truth),
        "flipped": Feedback(_film_text(flipped, question), (), flipped),
        "swapped": Feedback(_film_text(other, question), (), other),
        "blank": Feedback(prompts.cxr_feedback({}, question.text, "trained"), (), frozenset(), False),
        "contradicting": Feedback(text, (), said | {both}, False),
    }


def _film_text(positive: frozenset[str], question: Question) -> str:
    scores = {name: 0.9 if name in positive else 0.1 for name in prompts.CXR_TRAINED_ORDER}
    return prompts.cxr_feedback(scores, question.text, "trained")


# CT ---------------------------------------------------------------------------------------------------------------


def phantom_cases(count: int, first_seed: int) -> Iterator[AuditCase]:
    """Yield questions about CT phantoms: a kind of tumour that is there, one that is not, and the organs.

    Args:
        count: phantoms, each a patient.
        first_seed: of the phantoms; training's must not overlap.
    """
    other = _ct_slice(build_pool(1, first_seed - 1, show_progress=False), random.Random(first_seed))
    for seed in range(first_seed, first_seed + count):
        rng = random.Random(seed)
        grey, labels = _ct_slice(build_pool(1, seed, show_progress=False), rng)
        for number, question in enumerate(_ct_questions(labels, rng)):
            feedback = _ct_feedback(question, grey, labels, other, rng)
            truth = feedback["true"].named
            yield AuditCase(f"ct-{seed}-{number}", str(seed), "CT", question, grey_to_rgb(grey), truth, feedback)
        other = grey, labels


def _ct_slice(pool: PhantomPool, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    return rng.choice([pair for pair in pool.ct if np.isin(pair[1], list(TUMORS.values())).any()] or pool.ct)


def _ct_questions(labels: np.ndarray, rng: random.Random) -> Iterator[Question]:
    present = [name for name, label in TUMORS.items() if (labels == label).any()]
    for wanted in (present, [name for name in TUMORS if name not in present]):
        names = [name for name in wanted if name in {"hepatic tumor", "pancreatic tumor", "lung tumor", "bone lesion"}]
        if names:
            name = rng.choice(names)
            question = draw(ct_tumor, rng, True)
            while question.target != name:
                question = draw(ct_tumor, rng, True)
            yield question
    yield Question("Which organs are visible?", "describe", "organs")


def _ct_feedback(
    question: Question,
    grey: np.ndarray,
    labels: np.ndarray,
    other: tuple[np.ndarray, np.ndarray],
    rng: random.Random,
) -> dict[str, Feedback]:
    turned = _turn_round(question, labels, rng)
    legend, picture = show_group(grey, labels, question.argument)
    swapped, swapped_picture = show_group(*other, question.argument)
    flipped, flipped_picture = show_group(grey, turned, question.argument)
    found = {
        "true": _ct_turn(legend, picture, question),
        "flipped": _ct_turn(flipped, flipped_picture, question),
        "swapped": _ct_turn(swapped, swapped_picture, question),
        "blank": _ct_turn([], grey_to_rgb(grey), question, is_decisive=False),
        "contradicting": _ct_turn(flipped, picture, question, is_decisive=False),
    }
    return found


def _turn_round(question: Question, labels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Take the asked tumour out of the labels, or draw one; without one, take away a structure."""
    if not question.target:
        present = [int(label) for label in np.unique(labels) if label]
        return np.where(labels == rng.choice(present), 0, labels) if present else labels
    label = TUMORS[question.target]
    if (labels == label).any():
        return np.where(labels == label, 0, labels)
    rows, columns = np.ogrid[: labels.shape[0], : labels.shape[1]]
    row, column = (rng.uniform(0.35, 0.65) * size for size in labels.shape)
    return np.where((rows - row) ** 2 + (columns - column) ** 2 <= (0.06 * labels.shape[0]) ** 2, label, labels)


def _ct_turn(
    legend: Sequence[tuple[str, str]], picture: np.ndarray, question: Question, is_decisive: bool = True
) -> Feedback:
    text = prompts.ct_feedback(legend, question.text, "trained")
    return Feedback(text, (picture,), frozenset(name for _, name in legend), is_decisive)


def known_names(modality: str) -> tuple[str, ...]:
    """Return what answers about a modality may name."""
    return tuple(NAMES.values()) if modality == "CT" else prompts.CXR_TRAINED_ORDER


def all_cases(
    nih_root: str | None, scores_root: str | None, film_count: int, phantom_count: int, first_seed: int
) -> list[AuditCase]:
    """Return the cases of both modalities; each can be left out."""
    films = film_cases(nih_root, scores_root, film_count) if nih_root else ()
    return [*films, *phantom_cases(phantom_count, first_seed)]
