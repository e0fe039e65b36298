"""Radiographs with labels: phantoms, a CSV in the form of NIH ChestX-ray14, or a ``datalist.json``.

An item is ``{"image": path, "label": (18,) float32}``; a label is 1, 0, or NaN where nobody knows. Items of a CSV
have a third entry, ``patient``.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
from tqdm import tqdm

from vila_m3_common.errors import UserError, exits_with_message, near_match_hint
from vila_m3_common.patients import is_held_out
from vila_m3_common.phantoms import cxr_phantom, save_radiograph
from vila_m3_common.prompts import CXR_FINDINGS

Item = dict[str, Any]

# The first seed of each section; sections never share a phantom.
PHANTOM_SEEDS = {"training": 0, "validation": 1_000_000, "testing": 2_000_000}
# Findings that follow from others, after the hierarchy of CheXpert (Irvin et al., AAAI 2019).
RELATED_FINDINGS = {
    "Lung Opacity": ("Consolidation", "Mass", "Nodule", "Edema", "Atelectasis", "Infiltration", "Pneumonia"),
    "Lung Lesion": ("Nodule", "Mass"),
}
# What the opacities of a phantom could be called as well.
_AMBIGUOUS_ON_PHANTOMS = ("Infiltration", "Pneumonia", "Atelectasis")
# What the labels of NIH ChestX-ray14 say something about (Wang et al., CVPR 2017).
NIH_FINDINGS = CXR_FINDINGS[:14]
_CSV_COLUMNS = ("Image Index", "Finding Labels", "Patient ID")


@exits_with_message
def training_items(
    dataset_dir: str,
    phantom_counts: Mapping[str, int],
    data_root: str | None = None,
    labels_csv: str | None = None,
    val_fraction: float = 0.2,
    csv_repeats: int = 1,
    mixes_phantoms: bool = False,
) -> dict[str, list[Item]]:
    """Return the items of ``training`` and ``validation``; a mistake of the user ends the command.

    Taken are the rows of ``labels_csv``, or else ``<dataset_dir>/datalist.json``, or else phantoms.

    Args:
        dataset_dir: folder with the user's list, and for the phantoms.
        phantom_counts: how many phantoms each of the two sections has.
        data_root: folder with the pictures that ``labels_csv`` names.
        labels_csv: see :func:`read_labels_csv`. In training, findings that follow from its labels are added.
        val_fraction: share of the patients of ``labels_csv`` that is kept for validation.
        csv_repeats: how often an epoch shows each training row of ``labels_csv``.
        mixes_phantoms: whether the training phantoms are added to the rows of ``labels_csv``. The validation stays
            with the rows, since a mixture would reward telling the two sorts of pictures apart.
    """
    if labels_csv:
        parts = split_by_patient(read_labels_csv(_need_data_root(data_root), labels_csv), val_fraction)
        rows = [{"image": item["image"], "label": add_related(item["label"])} for item in parts["training"]]
        phantom_count = phantom_counts["training"] if mixes_phantoms else 0
        return {
            "training": rows * csv_repeats + write_phantoms(dataset_dir, "training", phantom_count),
            "validation": parts["validation"],
        }
    datalist = Path(dataset_dir) / "datalist.json"
    if datalist.is_file():
        return {section: read_datalist(datalist, section) for section in ("training", "validation")}
    return {section: write_phantoms(dataset_dir, section, count) for section, count in phantom_counts.items()}


@exits_with_message
def evaluation_items(
    dataset_dir: str,
    phantom_count: int,
    data_root: str | None = None,
    labels_csv: str | None = None,
    val_fraction: float = 1.0,
) -> list[Item]:
    """Return the items to evaluate; a mistake of the user ends the command.

    Args:
        dataset_dir: as for training; of a list the section ``testing``, or else ``validation``, is taken.
        phantom_count: how many phantoms to draw; they are in neither section of the training.
        data_root: as for training.
        labels_csv: as for training.
        val_fraction: 1.0 takes every patient of ``labels_csv``; the value of a training on the same file takes
            the patients that it kept for validation.
    """
    if labels_csv:
        rows = read_labels_csv(_need_data_root(data_root), labels_csv)
        return split_by_patient(rows, val_fraction, needs_both=False)["validation"]
    datalist = Path(dataset_dir) / "datalist.json"
    if datalist.is_file():
        has_testing = "testing" in json.loads(datalist.read_text())
        return read_datalist(datalist, "testing" if has_testing else "validation")
    return write_phantoms(dataset_dir, "testing", phantom_count)


def _need_data_root(data_root: str | None) -> Path:
    if not data_root:
        raise UserError("labels_csv was given without data_root; add --data_root <folder with the pictures>")
    return Path(data_root)


def label_vector(known: Iterable[str], present: Collection[str]) -> np.ndarray:
    """Return ``(18,)`` float32: 1 for findings that are present, 0 for other known ones, NaN for the rest."""
    known = set(known)
    values = [float(finding in present) if finding in known else np.nan for finding in CXR_FINDINGS]
    return np.array(values, dtype=np.float32)


def trained_targets(items: Sequence[Item]) -> list[str]:
    """Return the 18 target names of a training: empty where the items do not hold both a yes and a no."""
    labels = np.stack([item["label"] for item in items])
    has_both = (labels == 1).any(axis=0) & (labels == 0).any(axis=0)
    return [finding if flag else "" for finding, flag in zip(CXR_FINDINGS, has_both, strict=True)]


def write_phantoms(dataset_dir: str | Path, section: str, count: int) -> list[Item]:
    """Draw the phantoms of a section once; a second call, or a second process of a training, finds them on disk.

    Args:
        dataset_dir: they are written to ``<dataset_dir>/phantoms/<section>``.
        section: a key of ``PHANTOM_SEEDS``.
        count: how many.
    """
    folder = Path(dataset_dir) / "phantoms" / section
    names = [f"{PHANTOM_SEEDS[section] + index:07d}.png" for index in range(count)]
    with idist.one_rank_first(local=True):
        findings = _draw_missing(folder, names, section)
    return [{"image": str(folder / name), "label": phantom_label(findings[name])} for name in names]


def _draw_missing(folder: Path, names: Sequence[str], section: str) -> dict[str, list[str]]:
    listing = folder / "findings.json"
    findings: dict[str, list[str]] = json.loads(listing.read_text()) if listing.is_file() else {}
    missing = [name for name in names if name not in findings]
    for name in tqdm(missing, desc=f"drawing {section} phantoms", disable=not missing):
        phantom = cxr_phantom(int(Path(name).stem))
        save_radiograph(phantom, folder / name)
        findings[name] = list(phantom.findings)
    if missing:
        listing.write_text(json.dumps(findings))
    return findings


def phantom_label(findings: Collection[str]) -> np.ndarray:
    """Return the label of a phantom: what is drawn and what follows from it is present, the rest absent.

    Unknown are other names that an opacity could have, and fractures, since the bones are drawn without detail.
    """
    opacities = set(findings) & {"Consolidation", "Edema"}
    unknown = {*_AMBIGUOUS_ON_PHANTOMS} if opacities else set()
    known = [name for name in CXR_FINDINGS if name not in unknown and name != "Fracture"]
    related = [name for name, causes in RELATED_FINDINGS.items() if set(causes) & set(findings)]
    return label_vector(known, [*findings, *related])


def add_related(label: np.ndarray) -> np.ndarray:
    """Fill in the unknown findings that follow from the known ones: a lung lesion is a nodule or a mass."""
    values = dict(zip(CXR_FINDINGS, label, strict=True))
    for name, causes in RELATED_FINDINGS.items():
        known = [values[cause] for cause in causes if not np.isnan(values[cause])]
        if np.isnan(values[name]) and known:
            values[name] = max(known)
    return np.array(list(values.values()), dtype=np.float32)


def read_datalist(path: Path, section: str) -> list[Item]:
    """Read a section of a Decathlon-style list: ``{"training": [{"image": ..., "label": {"Mass": 1}}]}``.

    Findings that a label leaves out are unknown. Relative paths start at the list's folder.

    Raises:
        UserError: if the list is no JSON, or a section, image, or finding does not exist.
    """
    try:
        entries = json.loads(path.read_text()).get(section)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not entries:
        raise UserError(f"{path} has no section {section!r}; it needs 'training' and 'validation', neither empty")
    for entry in entries:
        _check_findings(entry["label"], path)
        if not (path.parent / entry["image"]).is_file():
            raise UserError(f"{path} names {entry['image']}, which does not exist; check the path")
    return [
        {
            "image": str(path.parent / entry["image"]),
            "label": label_vector(entry["label"], [name for name, value in entry["label"].items() if value]),
        }
        for entry in entries
    ]


def read_labels_csv(data_root: Path, labels_csv: str | Path) -> list[Item]:
    """Read labels in the form of NIH ChestX-ray14 for the pictures that lie in ``data_root``.

    The columns are ``Image Index`` (file name), ``Finding Labels`` (separated by ``|``, or ``No Finding``) and
    ``Patient ID``. Rows whose picture is not there are left out, so that the full list serves a part of the set.

    Returns:
        Items with a third entry ``patient``. The 14 NIH findings are known, the other four unknown.

    Raises:
        UserError: if the file or a column is missing, a finding is unknown, or none of the pictures is there.
    """
    path = Path(labels_csv)
    if not path.is_file():
        raise UserError(f"labels_csv {path} does not exist; check the path")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    missing = [column for column in _CSV_COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise UserError(f"{path.name} lacks the columns {missing}; needed are {list(_CSV_COLUMNS)}")
    items = [_csv_item(row, data_root, path) for row in rows if (data_root / row["Image Index"]).is_file()]
    if not items:
        raise UserError(f"none of the {len(rows)} pictures of {path.name} lies in {data_root}; check data_root")
    return items


def _csv_item(row: Mapping[str, str], data_root: Path, path: Path) -> Item:
    present = [name.strip() for name in row["Finding Labels"].split("|")]
    present = [name for name in present if name not in ("", "No Finding")]
    _check_findings(present, path)
    return {
        "image": str(data_root / row["Image Index"]),
        "label": label_vector(NIH_FINDINGS, present),
        "patient": row["Patient ID"],
    }


def _check_findings(names: Iterable[str], path: Path) -> None:
    for name in names:
        if name not in CXR_FINDINGS:
            hint = near_match_hint(name, CXR_FINDINGS)
            raise UserError(f"unknown finding {name!r} in {path.name}; {hint}valid: {', '.join(CXR_FINDINGS)}")


def split_by_patient(items: Sequence[Item], val_fraction: float, needs_both: bool = True) -> dict[str, list[Item]]:
    """Split into training and validation so that a patient's pictures stay together.

    :func:`vila_m3_common.patients.is_held_out` decides, so that a patient never changes sides when others are added.

    Raises:
        UserError: if a needed part comes out empty.
    """
    parts: dict[str, list[Item]] = {"training": [], "validation": []}
    for item in items:
        parts["validation" if is_held_out(str(item["patient"]), val_fraction) else "training"].append(item)
    empty = [name for name in parts if not parts[name] and (needs_both or name == "validation")]
    if empty:
        raise UserError(f"val_fraction {val_fraction} leaves no picture for {' and '.join(empty)}; choose another")
    return parts
