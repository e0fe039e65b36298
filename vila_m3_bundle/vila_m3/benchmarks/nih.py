"""Films of NIH ChestX-ray14 patients that the shipped chest X-ray classifier was not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from vila_m3_common.patients import is_held_out

from ..data.source import check_folder, find_file, read_csv_rows

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
