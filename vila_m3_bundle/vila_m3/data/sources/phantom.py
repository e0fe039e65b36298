"""Conversations about phantoms: synthetic CT, brain MRI and chest X-ray whose tumours, sizes and counts are known.

Three kinds are made. Most are those of :class:`vila_m3.phantom_conversations.ConversationMaker`: every modality, with
the expert's turn from the ground truth. Others ask of a CT how many tumours it shows and how large they are, or ask
what does not fit the image, so that no expert may be called.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from vila_m3_common import phantoms, prompts
from vila_m3_common.anatomy import NAMES, TUMORS
from vila_m3_common.conversation import IMAGE_TOKEN, Conversation
from vila_m3_common.errors import UserError, check_choice
from vila_m3_common.measure import measure_labels
from vila_m3_common.slices import grey_to_rgb, take_slice, window_ct

from ...answer import digest_of
from ...phantom_conversations import (
    FOREIGN_REPLY,
    ConversationMaker,
    PhantomPool,
    Radiograph,
    Sample,
    build_pool,
    disc,
    draw_radiographs,
    group_ids,
    random_scores,
    show_group,
    slice_indices,
)
from ...questions import foreign_questions
from ..experts.cxr import finding_messages
from ..experts.wording import pick, tumor_wordings, wordings
from ..record import Message, Record
from ..source import Item, Located

# Seeds of the phantoms of each split; smaller ones draw those of tests and of the demo.
FIRST_SEEDS = {"train": 100_000, "validate": 200_000, "test": 300_000}
# Phantoms whose tumours are counted are others than those of the first kind.
COUNTED_OFFSET = 50_000
# Slices of each CT in which tumours are counted.
SLICES = 6
_TOUCHING = np.ones((3, 3))


def read_phantoms(
    split: str,
    images: str | Path,
    cards: str,
    count: int,
    counted_count: int,
    foreign_count: int,
    volume_count: int,
    seed: int = 0,
    shares: Mapping[str, float] | None = None,
    measured_share: float = 0.5,
    invented_share: float = 0.0,
    ct_kinds: Mapping[str, float] | None = None,
    cxr_kinds: Mapping[str, float] | None = None,
) -> Iterator[Item]:
    """Yield conversations, and write their pictures below ``images``, each once.

    Args:
        split: train, validate or test; each has phantoms of its own, and all but train ask in held-out wordings.
        images: folder of the pictures, which are named by their content.
        cards: text of the model cards.
        count: conversations of the first kind.
        counted_count: conversations about number and size of tumours.
        foreign_count: questions of another modality.
        volume_count: phantoms of each modality, and as many CTs to count in.
        seed: of the conversations.
        shares: of the kinds of images in conversations of the first kind, see :class:`.ConversationMaker`.
        measured_share: of the conversations about number and size in which the expert's turn tells measurements.
        invented_share: of them whose tumours are scattered anew, see :func:`invent_tumors`; of train alone.
        ct_kinds: of the questions about a CT, see :class:`.ConversationMaker`.
        cxr_kinds: of the first questions about a radiograph, likewise.

    Raises:
        UserError: for an unknown split, no phantom, negative counts, or shares of an unknown kind.
    """
    counts = (count, counted_count, foreign_count)
    folder = _check_made(split, images, counts, volume_count)
    told_shares = (measured_share, invented_share)
    samples = _samples(split, cards, counts, volume_count, seed, (shares, ct_kinds, cxr_kinds), told_shares)
    for number, sample in enumerate(samples, start=1):
        yield Located(number, _to_record(sample, number, folder, split))


def _check_made(split: str, images: str | Path, counts: Sequence[int], volume_count: int) -> Path:
    """Return the folder of the pictures, made where it is missing."""
    check_choice(split, list(FIRST_SEEDS), "split")
    if volume_count < 1 or min(counts) < 0:
        raise UserError(
            f"{' + '.join(map(str, counts))} conversations about {volume_count} phantoms cannot be made; give at least "
            "one phantom and no negative number"
        )
    folder = Path(images)
    (folder / split).mkdir(parents=True, exist_ok=True)
    return folder


def read_forms(
    split: str, images: str | Path, cards: str, count: int, volume_count: int, seed: int = 0
) -> Iterator[Item]:
    """Yield questions for one finding in the forms of benchmarks, answered as the expert's turn says.

    Args:
        split: train, validate or test, each with phantoms of its own; the forms are the same.
        images: folder of the pictures, which are named by their content.
        cards: text of the model cards.
        count: questions.
        volume_count: seeds of phantoms, four radiographs each.
        seed: of the questions.

    Raises:
        UserError: for an unknown split, no phantom, or a negative count.
    """
    folder = _check_made(split, images, [count], volume_count)
    rng = random.Random(f"forms/{split}/{seed}")
    first = FIRST_SEEDS[split]
    films = [film for drawn in range(first, first + volume_count) for film in draw_radiographs(drawn)]
    for number in range(1, count + 1):
        yield Located(number, _to_record(ask_finding(films, cards, rng), number, folder, split, "phantom_forms"))


def _samples(
    split: str,
    cards: str,
    counts: Sequence[int],
    volume_count: int,
    seed: int,
    drawn_shares: Sequence[Mapping[str, float] | None],
    told_shares: tuple[float, float],
) -> Iterator[Sample]:
    first, held_out = FIRST_SEEDS[split], split != "train"
    rng = random.Random(f"{split}/{seed}")
    count, counted_count, foreign_count = counts
    if count or foreign_count:
        pool = build_pool(volume_count, first)
        maker = ConversationMaker(pool, cards, held_out, *drawn_shares)
        yield from (maker(1_000_000 * seed + number) for number in range(count))
        yield from (ask_foreign(pool, cards, rng, held_out) for _ in range(foreign_count))
    if counted_count:
        seeds = range(first + COUNTED_OFFSET, first + COUNTED_OFFSET + volume_count)
        counted = [found for number in seeds for found in counted_slices(number)]
        measured_share, invented_share = told_shares
        for _ in range(counted_count):
            found = rng.choice(counted)
            if invented_share and not held_out and rng.random() < invented_share:
                found = invent_tumors(found, rng)
            yield count_tumors(found, cards, rng, held_out, measured_share)


def ask_foreign(pool: PhantomPool, cards: str, rng: random.Random, held_out: bool) -> Sample:
    """Ask what only an expert of another modality could answer.

    Args:
        pool: of the images.
        cards: text of the model cards.
        rng: chooses image and question.
        held_out: whether to use only wordings that training never sees.
    """
    modality, question = rng.choice(list(foreign_questions(rng, held_out).items()))
    greys = {
        "CT": lambda: [rng.choice(pool.ct)[0]],
        "MRI": lambda: rng.choice(pool.mri)[0],
        "CXR": lambda: [rng.choice(pool.cxr)[0]],
    }[modality]()
    conversation = Conversation()
    conversation.add("user", prompts.opening(modality, question, cards), [grey_to_rgb(grey) for grey in greys])
    conversation.add("assistant", FOREIGN_REPLY)
    return Sample(conversation, modality, "foreign")


def ask_finding(films: Sequence[Radiograph], cards: str, rng: random.Random) -> Sample:
    """Ask for one finding of a radiograph as benchmarks do; the answer is the expert's, whatever the picture shows.

    Args:
        films: radiographs to choose from.
        cards: text of the model cards.
        rng: chooses film, findings, question and form.
    """
    grey, drawn = rng.choice(films)
    scores = random_scores(drawn, rng)
    is_present = rng.random() < 0.5
    finding = rng.choice([name for name, score in scores.items() if (score > 0.5) == is_present] or list(scores))
    form = rng.choice(("binary", *prompts.EXPERT_FORMS))
    conversation = Conversation()
    for message in finding_messages(form, [], finding, scores, cards):
        conversation.add(message.role, message.text, [grey_to_rgb(grey)] * message.text.count(IMAGE_TOKEN))
    conversation.add("assistant", "yes" if scores[finding] > 0.5 else "no")
    return Sample(conversation, "CXR", form)


def _to_record(sample: Sample, number: int, folder: Path, split: str, dataset: str = "phantom") -> Record:
    metadata = {"dataset": dataset, "split": split, "modality": sample.modality, "question_type": sample.kind}
    conversation = sample.conversation
    messages = tuple(Message(turn.role, turn.text, turn.in_context) for turn in conversation.turns)
    names = tuple(_write_picture(image, folder, split) for image in conversation.images)
    return Record(f"phantom_{number:06d}", messages, names, metadata)


def _write_picture(image: np.ndarray, folder: Path, split: str) -> str:
    name = f"{split}/{digest_of(image)[:24]}.png"
    if not (folder / name).is_file():
        Image.fromarray(image).save(folder / name)
    return name


@dataclass(frozen=True)
class CountedSlice:
    """A CT slice, and what is known of the tumours in it and in its study.

    Args:
        grey: ``(H, W)`` uint8.
        labels: ``(H, W)`` ids of VISTA3D.
        measured: rows of :func:`vila_m3_common.measure.measure_labels` of the study.
    """

    grey: np.ndarray
    labels: np.ndarray
    measured: Sequence[Mapping[str, Any]]

    def count(self, tumor: str) -> int:
        """Return how many parts of a kind of tumour the slice shows; parts that touch at a corner are one."""
        return int(ndimage.label(self.labels == TUMORS[tumor], _TOUCHING)[1])


def counted_slices(seed: int) -> list[CountedSlice]:
    """Draw a CT phantom and cut slices, half of them through tumours."""
    phantom = phantoms.ct_phantom(seed)
    measured = measure_labels(phantom.labels, phantom.affine, NAMES)
    return [
        CountedSlice(window_ct(take_slice(phantom.image, index)), take_slice(phantom.labels, index).copy(), measured)
        for index in slice_indices(phantom.labels, tuple(TUMORS.values()), SLICES, seed)
    ]


def invent_tumors(found: CountedSlice, rng: random.Random) -> CountedSlice:
    """Scatter tumours over the labels of a slice in place of its own, and invent what the study measures.

    A few phantoms have few tumours, which are sooner remembered than counted; the picture itself stays as it is.

    Args:
        found: the slice.
        rng: draws kinds, numbers, places and measurements.
    """
    labels = np.where(np.isin(found.labels, list(TUMORS.values())), 0, found.labels)
    measured = [_scale(row, rng.uniform(0.5, 1.6)) for row in found.measured if row["name"] not in TUMORS]
    taken = np.zeros(labels.shape, bool)
    for name in rng.sample(list(phantoms.CT_TUMORS), rng.randrange(1, 4)):
        number = sum(_add_disc(labels, taken, TUMORS[name], rng) for _ in range(rng.randrange(1, 6)))
        longest = round(rng.uniform(5, 90), 1)
        row = {
            "name": name,
            "label": TUMORS[name],
            "volume_ml": round(math.exp(rng.uniform(-1, 5)), 3),
            "component_count": number + rng.choice((0, 0, 0, 1, 2)),
            "longest_diameter_mm": longest,
            "perpendicular_diameter_mm": round(longest * rng.uniform(0.6, 1), 1),
        }
        measured += [row] if row["component_count"] else []
    return replace(found, labels=labels, measured=measured)


def _scale(row: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """Return a row as of a larger or smaller body."""
    lengths = {
        name: round(row[name] * factor ** (1 / 3), 1) for name in ("longest_diameter_mm", "perpendicular_diameter_mm")
    }
    return {**row, **lengths, "volume_ml": round(row["volume_ml"] * factor, 3)}


def _add_disc(labels: np.ndarray, taken: np.ndarray, label: int, rng: random.Random) -> bool:
    """Draw a disc where none is near, and say whether there was room."""
    radius = rng.uniform(0.02, 0.07) * labels.shape[0]
    row, column = (rng.uniform(0.15, 0.85) * side for side in labels.shape)
    near = disc(labels.shape, row, column, radius + 2)
    if taken[near].any():
        return False
    labels[disc(labels.shape, row, column, radius)] = label
    taken |= near
    return True


def count_tumors(
    found: CountedSlice, cards: str, rng: random.Random, held_out: bool, measured_share: float = 0.5
) -> Sample:
    """Ask for a kind of tumour, then how many there are and, where the expert's turn tells measurements, how large.

    Without measurements the number is that of the slice, as the overlay shows it; with them it is that of the study,
    as they tell it.

    Args:
        found: the slice.
        cards: text of the model cards.
        rng: chooses the tumour, the wordings, and whether the number is asked for at once.
        held_out: whether to use only wordings that training never sees.
        measured_share: how often the expert's turn tells measurements.
    """
    shown = [name for name in phantoms.CT_TUMORS if found.count(name)]
    tumor = rng.choice(shown) if shown and rng.random() < 0.85 else rng.choice(list(phantoms.CT_TUMORS))
    row = next((row for row in found.measured if row["name"] == tumor), None)
    tells = rng.random() < measured_share
    asks_at_once = rng.random() < 0.5
    in_study = row["component_count"] if row else 0
    number = in_study if tells else found.count(tumor)
    asked = wordings("tumor_count", [f"{tumor}s"]) if asks_at_once else tumor_wordings(tumor)
    question = pick(asked, rng, held_out)
    conversation = Conversation()
    conversation.add("user", prompts.opening("CT", question, cards), [grey_to_rgb(found.grey)])
    conversation.add("assistant", prompts.trigger_reply("CT", tumor))
    legend, picture = show_group(found.grey, found.labels, tumor)
    feedback = prompts.ct_feedback(legend, question, "trained")
    told = [row for row in found.measured if tells and row["label"] in group_ids(tumor)]
    conversation.add("expert", prompts.add_measurements(feedback, told, question), [picture])
    counted = prompts.tumor_count({tumor: number}) if number else prompts.no_tumors(tumor)
    if asks_at_once:
        conversation.add("assistant", counted)
    else:
        conversation.add("assistant", "yes" if number else "no")
        if number:
            conversation.add("user", pick(wordings("count"), rng, held_out))
            conversation.add("assistant", counted)
    asks_size = tells and row is not None and rng.random() < 0.5
    if asks_size and row:
        conversation.add("user", pick(wordings("size"), rng, held_out))
        conversation.add("assistant", prompts.tumor_size(row))
    return Sample(conversation, "CT", "size" if asks_size else "count")
