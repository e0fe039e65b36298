"""Cases of the trigger benchmark, drawn by a seed: phantoms and films that no training saw, in wordings that none saw.

A case is a conversation up to an assistant turn, with the calls that this turn must hold. Kinds of cases:

``tables``       first questions in the wordings that training keeps apart (one in ten of its tables),
``later turns``  turns after an expert's feedback, and further questions of the same conversation,
``far wordings`` wordings that training keeps apart of other tables (``data/questions``, of expert conversations),
``real films``   questions about NIH films,
``no expert``    a single MRI sequence or an image of unknown modality: nobody may be called,
``decoys``       questions that belong to another modality: nobody may be called.

A case in a wording that training may have seen is left out: some tables are so small that none of theirs is kept apart.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from vila_m3_common import prompts
from vila_m3_common.conversation import Conversation
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.slices import grey_to_rgb
from vila_m3_common.standalone import make_output_dir
from vila_m3_common.trigger import parse_triggers
from vila_m3_common.volumes import load_picture

from ..answer import digest_of
from ..data.experts.wording import frames, pick, wordings
from ..data.record import Message, Record, format_row
from ..phantom_conversations import ConversationMaker, PhantomPool, Sample, build_pool
from ..questions import cxr_finding, draw, foreign_questions, from_table, is_held_out, tables
from ..resumable_files import write_atomically
from .nih import held_out_films

# First questions per phantom and modality. ``single MRI`` and ``unknown`` are the images that no expert reads.
QUOTAS = {"CT": 4, "MRI": 3, "CXR": 4, "single MRI": 1, "unknown": 1}


@dataclass(frozen=True)
class Case:
    """A conversation up to an assistant turn.

    Args:
        turns: the turns before it.
        wanted: that turn, as it should be.
        kind: see the module.
        modality: what the image is.
        patient: whose image it is.
    """

    turns: Conversation
    wanted: str
    kind: str
    modality: str
    patient: str


def _opening(modality: str, question: str, images: Sequence[np.ndarray], cards: str) -> Conversation:
    conversation = Conversation()
    conversation.add("user", prompts.opening(modality, question, cards), images)
    return conversation


def table_cases(maker: ConversationMaker, seed: int, rng: random.Random) -> Iterator[Case]:
    """Yield the first turn of conversations about one phantom, and a later one where there is one."""
    left = dict(QUOTAS)
    while any(left.values()):
        sample = maker(rng.randrange(2**31))
        if not left[sample.modality]:
            continue
        left[sample.modality] -= 1
        patient = f"{sample.modality.split()[-1]} phantom {seed}"
        kind = "no expert" if sample.kind == "decoy" else "tables"
        replies = [place for place, turn in enumerate(sample.conversation.turns) if turn.role == "assistant"]
        yield _cut(sample, replies[0], kind, patient)
        if len(replies) > 1:
            yield _cut(sample, rng.choice(replies[1:]), "later turns", patient)


def _cut(sample: Sample, place: int, kind: str, patient: str) -> Case:
    turns = sample.conversation.turns
    return Case(Conversation(turns[:place]), turns[place].text, kind, sample.modality, patient)


def far_cases(pool: PhantomPool, cards: str, seed: int, rng: random.Random) -> Iterator[Case]:
    """Yield questions in wordings that expert conversations are made of and that training keeps apart, one a kind."""
    group = rng.choice(sorted(frames()["groups"]))
    finding = rng.choice(sorted(tables()["cxr_findings"]))
    nouns = tables()["cxr_findings"][finding]
    asked = [
        ("CT", pick(wordings("describe"), rng, True), "everything"),
        ("CT", pick(wordings("group", [frames()["groups"][group]]), rng, True), group),
        ("MRI", pick(wordings("brain_segment"), rng, True), ""),
        ("MRI", pick(wordings("grade"), rng, True), ""),
        ("CXR", pick(wordings("multilabel"), rng, True), ""),
        ("CXR", pick(wordings("binary", nouns), rng, True), ""),
    ]
    for modality, question, argument in asked:
        turns = _opening(modality, question, _images(pool, modality, rng), cards)
        wanted = prompts.trigger_reply(modality, argument)
        yield Case(turns, wanted, "far wordings", modality, f"{modality} phantom {seed}")


def decoy_cases(pool: PhantomPool, cards: str, seed: int, rng: random.Random) -> Iterator[Case]:
    """Yield a question of another modality for each kind of image."""
    for modality, question in foreign_questions(rng, True).items():
        turns = _opening(modality, question, _images(pool, modality, rng), cards)
        yield Case(turns, "", "decoys", modality, f"{modality} phantom {seed}")


def _images(pool: PhantomPool, modality: str, rng: random.Random) -> list[np.ndarray]:
    if modality == "MRI":
        return [grey_to_rgb(grey) for grey in rng.choice(pool.mri)[0]]
    grey = rng.choice(pool.ct)[0] if modality == "CT" else rng.choice(pool.cxr)[0]
    return [grey_to_rgb(grey)]


def film_cases(nih_root: str, cards: str, count: int, rng: random.Random) -> Iterator[Case]:
    """Yield questions about real films, one film of each patient."""
    films = {film.patient: film for film in held_out_films(nih_root)}
    chosen = rng.sample(sorted(films), min(count, len(films)))
    for patient in chosen:
        maker: Callable[..., object] = rng.choice((cxr_finding, cxr_finding, from_table("cxr_describe", "describe")))
        question = draw(maker, rng, True)
        turns = _opening("CXR", question.text, [load_picture(films[patient].path)], cards)
        yield Case(turns, prompts.trigger_reply("CXR"), "real films", "CXR", f"NIH {patient}")


def all_cases(cards: str, phantom_count: int, first_seed: int, nih_root: str | None, film_count: int) -> Iterator[Case]:
    """Yield every case; everything random follows from ``first_seed``."""
    for seed in tqdm(range(first_seed, first_seed + phantom_count), desc="phantoms"):
        rng = random.Random(seed)
        pool = build_pool(1, seed, show_progress=False)
        yield from table_cases(ConversationMaker(pool, cards, held_out=True), seed, rng)
        yield from far_cases(pool, cards, seed, rng)
        yield from decoy_cases(pool, cards, seed, rng)
    if nih_root:
        yield from film_cases(nih_root, cards, film_count, random.Random(first_seed))


def is_unseen(case: Case, cards: str) -> bool:
    """Return whether training cannot have seen the wording of a case's last question."""
    place = max(place for place, turn in enumerate(case.turns.turns) if turn.role == "user")
    text = case.turns.turns[place].text
    if not place:
        text = text.removeprefix(cards).partition("\n")[2]
    return is_held_out(text)


def to_record(case: Case, name: str, folder: Path) -> Record:
    """Write a case's pictures, each once, and return its record."""
    images = [_save(image, folder) for image in case.turns.images]
    messages = [Message(turn.role, turn.text) for turn in case.turns.turns]
    metadata = {
        "patient": case.patient,
        "kind": case.kind,
        "modality": case.modality,
        "wanted": [str(trigger) for trigger in parse_triggers(case.wanted)],
    }
    return Record(name, (*messages, Message("assistant", case.wanted)), tuple(images), metadata)


def _save(image: np.ndarray, folder: Path) -> str:
    name = f"{digest_of(image)[:20]}.png"
    if not (folder / name).is_file():
        Image.fromarray(np.ascontiguousarray(image)).save(folder / name)
    return name


@exits_with_message
def write_trigger_cases(
    output_dir: str,
    cards: str,
    phantom_count: int = 40,
    first_seed: int = 500_000,
    nih_root: str | None = None,
    film_count: int = 100,
) -> None:
    """Write ``cases.jsonl`` and ``images/``, the data set of the benchmark ``trigger``.

    Args:
        output_dir: the folder ``trigger`` below the benchmarks' ``data_root``.
        cards: text of the model cards.
        phantom_count: phantoms of each modality; about 30 cases each.
        first_seed: of the phantoms; training's must not overlap.
        nih_root: folder of NIH films with ``labels.csv``; None leaves real films out.
        film_count: films drawn at most, one of each patient.
    """
    if phantom_count < 1:
        raise UserError(f"phantom_count {phantom_count} gives no case; 40 gives about 1,200")
    folder = make_output_dir(output_dir)
    (folder / "images").mkdir(exist_ok=True)
    drawn = all_cases(cards, phantom_count, first_seed, nih_root, film_count)
    cases = (case for case in drawn if is_unseen(case, cards))
    records = [to_record(case, f"case-{number:05d}", folder / "images") for number, case in enumerate(cases)]
    write_atomically(folder / "cases.jsonl", "".join(f"{format_row(record)}\n" for record in records))
    told = {"phantom_count": phantom_count, "first_seed": first_seed, "cases": len(records)}
    write_atomically(folder / "cases.settings.json", json.dumps(told, indent=2) + "\n")
    print(f"{len(records)} cases written to {folder / 'cases.jsonl'}")
