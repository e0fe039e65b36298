"""Predictions of the chest X-ray expert for a folder of films or the images of prepared data, one JSON file each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vila_m3.data.mixture import IndexedJsonl
from vila_m3.data.record import resolve_image
from vila_m3.resumable_files import write_atomically
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.hooks import BundleExpert, close_experts, open_experts
from vila_m3_common.members import find_member
from vila_m3_common.volumes import RADIOGRAPH_SUFFIXES

from .expert_studies import run_expert

EXPERT = "CXR"
SUFFIXES = (*RADIOGRAPH_SUFFIXES, ".dcm")


@dataclass(frozen=True)
class _Film:
    """An image to read, and where its name stands; ``reason`` says why a row names none."""

    name: str
    file: str
    row: int
    reason: str = ""


@exits_with_message
def save_predictions(
    files: Sequence[str],
    image_root: str,
    output_dir: str,
    bundle_root: str,
    expert_bundle: str,
    expert_overrides: Mapping[str, Any] | None = None,
) -> None:
    """Run the expert on radiographs and write ``<output_dir>/<image>.json``, finding -> probability.

    Predictions that are there are kept, so a killed run goes on where it was. Images that cannot be read stand in
    ``<output_dir>/rejected.jsonl`` with file, row and reason.

    Args:
        files: JSONL files whose images are read; none reads every film below ``image_root``.
        image_root: folder of the images.
        output_dir: folder of the predictions.
        bundle_root: root of the composite.
        expert_bundle: name or path of the expert's bundle.
        expert_overrides: config items to override in it.

    Raises:
        UserError: if a file cannot be read, a folder holds no films, or the bundle is no chest X-ray expert.
    """
    films = _named_films(files) if files else _films_below(Path(image_root))
    folder = Path(output_dir)
    work = folder / ".expert_work"
    work.mkdir(parents=True, exist_ok=True)
    experts = open_experts([find_member(expert_bundle, bundle_root)], expert_overrides)
    try:
        if EXPERT not in experts:
            raise UserError(f"bundle {expert_bundle} gives {', '.join(experts)}, not {EXPERT}; give expert_cxr")
        rejected = list(_predict_all(films, image_root, folder, experts[EXPERT], work))
    finally:
        close_experts(experts)
        shutil.rmtree(work, ignore_errors=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
    write_atomically(folder / "rejected.jsonl", "".join(lines))
    print(f"{folder}: {len(rejected)} images rejected, see rejected.jsonl")


def _films_below(root: Path) -> list[_Film]:
    """Return every film below a folder."""
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not names:
        raise UserError(f"{root} holds no films ({', '.join(SUFFIXES)}); give the folder of the images")
    return [_Film(name, name, 1) for name in names]


def _named_films(files: Sequence[str]) -> list[_Film]:
    """Return the images that JSONL files name, each once."""
    films: dict[str, _Film] = {}
    for file in files:
        rows = IndexedJsonl(file)
        for index in range(len(rows)):
            try:
                for name in rows[index].images:
                    films.setdefault(name, _Film(name, rows.path.name, index + 1))
            except UserError as error:
                films[f"{file}\n{index}"] = _Film("", rows.path.name, index + 1, str(error))
    return list(films.values())


def _predict_all(
    films: Sequence[_Film], image_root: str, folder: Path, expert: BundleExpert, work: Path
) -> Iterator[dict[str, Any]]:
    """Save what is not there yet; yield what cannot be."""
    for film in tqdm(films, desc=EXPERT, unit="film"):
        if reason := film.reason or _predict(film.name, image_root, folder, expert, work):
            yield {"file": film.file, "row": film.row, "reason": reason}


def _predict(name: str, image_root: str, folder: Path, expert: BundleExpert, work: Path) -> str:
    """Save the prediction of an image; return why that is not possible."""
    try:
        target = resolve_image(f"{name}.json", folder)
        if target.is_file():
            return ""
        scores = run_expert(expert, [str(resolve_image(name, image_root))], work, "").scores
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, json.dumps(scores))
    except (UserError, OSError) as error:
        return f"image {name}: {error}"
    return ""
