"""The cases that training and evaluation read: the user's own list, or phantoms that are written once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from monai.data import load_decathlon_datalist
from tqdm import tqdm

from vila_m3_common.errors import UserError
from vila_m3_common.phantoms import mri_phantom, save_mri, save_volume
from vila_m3_common.training import is_main_process

# First phantom seed of each section; far apart, so that no section ever shares a phantom with another.
SECTION_SEEDS = {"training": 0, "validation": 100_000, "test": 200_000}
_SEQUENCE_FILES = ("t1c.nii.gz", "t1n.nii.gz", "t2w.nii.gz", "t2f.nii.gz")


def list_cases(dataset_dir: str | Path, section: str, phantom_count: int) -> list[dict[str, Any]]:
    """Return the cases of one section.

    ``dataset_dir/datalist.json`` is used when it is there: Decathlon form, ``image`` a list of four files
    (T1c, T1, T2, FLAIR) or one 4-D file, ``label`` a label map, paths relative to the folder.
    Otherwise phantoms are used; those that are not in the folder yet are written, by the main process
    of a training on several GPUs.

    Args:
        dataset_dir: folder of the list, or of the phantoms.
        section: ``training``, ``validation`` or ``test``; a list without ``test`` is tested on ``validation``.
        phantom_count: how many phantoms the section has.

    Returns:
        Mappings with ``image`` and ``label``.

    Raises:
        UserError: if the section is unknown, not in the list, empty, or one of its files is missing.
    """
    if section not in SECTION_SEEDS:
        raise UserError(f"unknown section {section!r}; allowed: {', '.join(SECTION_SEEDS)}")
    datalist = Path(dataset_dir) / "datalist.json"
    if datalist.is_file():
        return _listed_cases(datalist, section)
    seeds = range(SECTION_SEEDS[section], SECTION_SEEDS[section] + phantom_count)
    if is_main_process():
        missing = [seed for seed in seeds if not _phantom_folder(dataset_dir, seed).is_dir()]
        for seed in tqdm(missing, desc=f"writing {section} phantoms", disable=not missing):
            _write_phantom(_phantom_folder(dataset_dir, seed), seed)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()  # the others wait until the main process has written
    return [_phantom_case(_phantom_folder(dataset_dir, seed)) for seed in seeds]


def _listed_cases(datalist: Path, section: str) -> list[dict[str, Any]]:
    try:
        cases = load_decathlon_datalist(str(datalist), data_list_key=section, base_dir=str(datalist.parent))
    except ValueError as error:
        if section == "test":
            return _listed_cases(datalist, "validation")
        raise UserError(f"{datalist} cannot be used for {section}: {error}") from error
    if not cases:
        raise UserError(f"{datalist} lists no {section} cases; add some, or remove the file to use phantoms")
    for case in cases:
        for key in ("image", "label"):
            files = case.get(key) or []
            _check_files(files if isinstance(files, list) else [files], key, datalist)
    return cases


def _check_files(files: list[str], key: str, datalist: Path) -> None:
    if not files:
        raise UserError(f"a case of {datalist} has no {key!r}; every case needs image and label")
    absent = [file for file in files if not Path(file).exists()]
    if absent:
        raise UserError(f"{absent[0]}, listed in {datalist}, does not exist; paths are relative to the list's folder")


def _phantom_folder(dataset_dir: str | Path, seed: int) -> Path:
    return Path(dataset_dir) / f"phantom_{seed:06d}"


def _phantom_case(folder: Path) -> dict[str, Any]:
    return {"image": [str(folder / name) for name in _SEQUENCE_FILES], "label": str(folder / "label.nii.gz")}


def _write_phantom(folder: Path, seed: int) -> None:
    """Write under another name first: a folder that exists is complete, also after a kill."""
    phantom = mri_phantom(seed, has_tumor=seed % 3 != 0)
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    save_mri(phantom, part)
    save_volume(phantom.labels, phantom.affine, part / "label.nii.gz")
    part.rename(folder)
