"""Label tables of chest X-ray data sets: which findings an image has by the data set's own word."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vila_m3_common.errors import UserError
from vila_m3_common.prompts import CXR_FINDINGS

from ..source import read_csv_rows

# Names of other data sets for the expert's findings.
SYNONYMS = {"Pleural Effusion": "Effusion", "Pleural Thickening": "Pleural_Thickening"}
_VALUES = {"1": True, "1.0": True, "0": False, "0.0": False}


def read_label_table(
    file: str | Path, image_column: str = "image", findings_column: str | None = None
) -> tuple[dict[str, dict[str, bool]], list[tuple[int, str]]]:
    """Read which findings are present and absent in each image.

    Args:
        file: CSV.
        image_column: names the image files.
        findings_column: lists the present findings, joined by ``|`` (``Finding Labels`` of ChestX-ray14); findings
            that the table names elsewhere are then absent. None takes one column per finding with 1 for present and
            0 for absent (CheXpert's layout); other values, such as -1 or nothing, are not known.

    Returns:
        Image -> finding -> whether it is present; and the broken rows, (number, reason).

    Raises:
        UserError: if a column is missing, or the table names no finding of the expert.
    """
    if not Path(file).is_file():
        raise UserError(f"label table {file} does not exist; give a CSV file, or null to take the expert's predictions")
    columns = [image_column, *([findings_column] if findings_column else [])]
    rows: dict[str, dict[str, bool]] = {}
    broken: list[tuple[int, str]] = []
    for number, row in read_csv_rows(Path(file), columns):
        if isinstance(row, str):
            broken.append((number, row))
        else:
            rows[row[image_column]] = _read_listed(row[findings_column]) if findings_column else _read_columns(row)
    known = {finding for row in rows.values() for finding in row}
    if not known:
        raise UserError(f"{file} names no finding that the expert knows: {', '.join(CXR_FINDINGS)}")
    if findings_column:
        rows = {image: {name: name in row for name in sorted(known)} for image, row in rows.items()}
    return rows, broken


def _read_listed(text: str) -> dict[str, bool]:
    names = (SYNONYMS.get(name.strip(), name.strip()) for name in text.split("|"))
    return {name: True for name in names if name in CXR_FINDINGS}


def _read_columns(row: Mapping[str, str]) -> dict[str, bool]:
    named = ((SYNONYMS.get(name, name), value.strip()) for name, value in row.items())
    return {name: _VALUES[value] for name, value in named if name in CXR_FINDINGS and value in _VALUES}
