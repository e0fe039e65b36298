"""Data for training and evaluation: phantoms, or the user's own ``datalist.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vila_m3_common.errors import UserError
from vila_m3_common.phantoms import ct_phantom, save_volume

from .labels import argument_ids, prompt_ids

# Seeds of the parts lie apart, so that no phantom is in two of them.
FIRST_SEEDS = {"training": 0, "validation": 100_000, "testing": 200_000}


def prepare_datalists(dataset_dir: str, counts: dict[str, int]) -> dict[str, list[dict[str, str]]]:
    """Return the cases of each part, with absolute paths.

    ``dataset_dir/datalist.json`` is used when it exists: ``{"training": [{"image": ..., "label": ...}],
    "validation": [...], "testing": [...]}`` with paths relative to ``dataset_dir`` and label maps in
    VISTA3D ids. Otherwise phantoms are written to ``dataset_dir`` once and used again later.

    Args:
        dataset_dir: folder of the data set; created for phantoms.
        counts: part (``training``, ``validation``, ``testing``) -> number of phantoms.

    Raises:
        UserError: if the user's list lacks one of the parts or a file.
    """
    folder = Path(dataset_dir)
    own_list = folder / "datalist.json"
    if own_list.is_file():
        return _read_datalist(own_list, list(counts))
    return {part: [write_phantom(folder, part, index) for index in _bar(part, count)] for part, count in counts.items()}


def _bar(part: str, count: int) -> tqdm:
    return tqdm(range(count), desc=f"{part} phantoms", unit="phantom", disable=count < 2, leave=False)


def write_phantom(folder: Path, part: str, index: int) -> dict[str, str]:
    """Write CT phantom number ``index`` of a part unless it is there; return its ``image`` and ``label`` paths."""
    seed = FIRST_SEEDS[part] + index
    image = folder / f"ct_{seed:06d}.nii.gz"
    label = folder / f"ct_{seed:06d}_labels.nii.gz"
    if not (image.is_file() and label.is_file()):
        phantom = ct_phantom(seed)
        save_volume(phantom.labels, phantom.affine, label)
        partial = save_volume(phantom.image, phantom.affine, image.with_name(f"partial_{image.name}"))
        partial.rename(image)
    return {"image": str(image.resolve()), "label": str(label.resolve())}


def _read_datalist(path: Path, parts: Sequence[str]) -> dict[str, list[dict[str, str]]]:
    try:
        datalist = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return {part: [_check_case(case, path) for case in _part_of(datalist, part, path)] for part in parts}


def _part_of(datalist: Any, part: str, path: Path) -> list[Any]:
    cases = datalist.get(part) if isinstance(datalist, dict) else None
    if not cases:
        raise UserError(f'{path} has no {part} cases; add "{part}": [{{"image": "...", "label": "..."}}]')
    return list(cases)


def _check_case(case: Any, path: Path) -> dict[str, str]:
    if not isinstance(case, dict) or not {"image", "label"} <= set(case):
        raise UserError(f'{path} holds the case {case!r}; a case is {{"image": "...", "label": "..."}}')
    found = {key: path.parent / case[key] for key in ("image", "label")}
    for file in found.values():
        if not file.exists():
            raise UserError(f"{path} names {file}, which does not exist; paths are relative to {path.parent}")
    return {key: str(file.resolve()) for key, file in found.items()}


def evaluation_items(cases: Sequence[dict[str, str]], arguments: Sequence[str]) -> list[dict[str, Any]]:
    """Return one item per case and argument of the model card: the image with that group's prompt.

    Args:
        cases: ``image`` and ``label`` paths.
        arguments: groups of the model card, such as ``hepatic tumor``.

    Raises:
        UserError: if an argument is no group of the card.
    """
    prompts = {argument: argument_ids(argument) for argument in arguments}
    return [{**case, "label_prompt": ids, "argument": argument} for case in cases for argument, ids in prompts.items()]


def validation_items(cases: Sequence[dict[str, str]], prompt: Sequence[str]) -> list[dict[str, Any]]:
    """Return one item per case, prompted with the classes, ids or groups of ``prompt``."""
    ids = prompt_ids(list(prompt))
    return [{**case, "label_prompt": ids} for case in cases]
