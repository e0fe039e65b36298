"""Films of NIH ChestX-ray14 patients that the shipped chest X-ray classifier was not trained on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vila_m3_common.errors import exits_with_message
from vila_m3_common.patients import is_held_out
from vila_m3_common.prompts import CXR_TRAINED_ORDER
from vila_m3_common.standalone import make_output_dir

from ..data.source import check_folder, find_file, read_csv_rows
from ..resumable_files import write_atomically

# Share of the patients that the classifier's training kept apart (its ``val_fraction``), by the checksum of their ids.
HELD_OUT_SHARE = 0.2


@dataclass(frozen=True)
class Film:
    """One radiograph.

    Args:
        path: its file.
        patient: whose it is.
        findings: text-mined labels, spelt as in the expert's list.
    """

    path: Path
    patient: str
    findings: frozenset[str]


def held_out_films(root: str | Path, share: float = HELD_OUT_SHARE) -> list[Film]:
    """Return the films of the patients that were kept apart, in the order of ``labels.csv``.

    Args:
        root: folder with ``labels.csv`` (columns ``Image Index``, ``Finding Labels``, ``Patient ID``) and the films.
        share: of the patients.

    Raises:
        UserError: if the folder, the file or a column is missing.
    """
    folder = check_folder(root)
    rows = read_csv_rows(find_file(folder, "labels.csv"), ["Image Index", "Finding Labels", "Patient ID"])
    films = [_film(folder, row) for _, row in rows if not isinstance(row, str)]
    return [film for film in films if is_held_out(film.patient, share)]


def _film(folder: Path, row: Mapping[str, str]) -> Film:
    labels = frozenset(row["Finding Labels"].split("|")) - {"No Finding"}
    return Film(folder / row["Image Index"], row["Patient ID"], labels)


@exits_with_message
def write_oracle_findings(root: str, output_dir: str) -> None:
    """Write what an expert that is never wrong would find: ``<output_dir>/<film>.json`` for the films kept apart.

    Findings that the labels tell of are 1, all others of the expert's list 0. Set beside the expert's own findings it
    shows how much of the answers' faults are the expert's.

    Args:
        root: folder with ``labels.csv`` and the films.
        output_dir: folder of the findings, for a benchmark's ``expert``.

    Raises:
        UserError: if a folder, a file or a column is missing.
    """
    folder = make_output_dir(output_dir)
    films = held_out_films(root)
    for film in films:
        scores = {name: float(name in film.findings) for name in CXR_TRAINED_ORDER}
        write_atomically(folder / f"{film.path.name}.json", json.dumps(scores))
    print(f"{folder}: true findings of {len(films)} films")
