"""Data for training and evaluation: phantoms, or the user's own ``datalist.json``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from tqdm import tqdm

from vila_m3_common.errors import UserError
from vila_m3_common.phantoms import ct_phantom, save_volume

from .labels import NewClasses, argument_ids, label_table, prompt_ids

# Seeds of the parts lie apart, so that no phantom is in two of them.
FIRST_SEEDS = {"training": 0, "validation": 100_000, "testing": 200_000}


def prepare_datalists(
    dataset_dir: str,
    counts: dict[str, int],
    data_list: str | None = None,
    fold: int = 0,
    more_cases: str | None = None,
    more_times: int = 1,
) -> dict[str, list[dict[str, str]]]:
    """Return the cases of each part, with absolute paths.

    ``dataset_dir/datalist.json`` is used when it exists: ``{"training": [{"image": ..., "label": ...}],
    "validation": [...], "testing": [...]}`` with paths relative to ``dataset_dir``; a case may carry
    ``dataset_name``, which chooses its class mapping (see :class:`.transforms.MapClassesd`). Without
    ``validation`` the training cases of one ``fold`` are validated, as in the Model Zoo's lists. When there is
    no list, phantoms are written to ``dataset_dir`` once, by one of several processes, and used again later.

    Args:
        dataset_dir: folder of the data set; created for phantoms.
        counts: part (``training``, ``validation``, ``testing``) -> number of phantoms.
        data_list: the list, if it is another file than ``dataset_dir/datalist.json``.
        fold: the ``fold`` of the cases to validate when the list has no ``validation`` part.
        more_cases: another list, whose cases are added to those of the first part, ``more_times`` times over.
            Its paths are relative to its own folder.
        more_times: how often; a few real scans weigh little among many phantoms.

    Raises:
        UserError: if a list lacks one of the parts or a file.
    """
    folder = Path(dataset_dir)
    own_list = Path(data_list) if data_list else folder / "datalist.json"
    if data_list or own_list.is_file():
        lists = _read_datalist(own_list, folder, list(counts), fold)
    else:
        with idist.one_rank_first(local=True):
            lists = {part: [write_phantom(folder, part, i) for i in _bar(part, n)] for part, n in counts.items()}
    if more_cases:
        first = next(iter(counts))
        added = _read_datalist(Path(more_cases), Path(more_cases).parent, [first], fold)[first]
        lists[first] = [*lists[first], *added * more_times]
    return lists


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


def _read_datalist(path: Path, folder: Path, parts: Sequence[str], fold: int) -> dict[str, list[dict[str, str]]]:
    try:
        datalist = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"data list {path} cannot be read ({error.strerror}); check the path") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    datalist = _split_folds(datalist, fold) if isinstance(datalist, dict) else {}
    return {part: [_check_case(case, path, folder) for case in _part_of(datalist, part, path)] for part in parts}


def _split_folds(datalist: dict[str, Any], fold: int) -> dict[str, Any]:
    """Take the training cases of one fold for validation when there is no such part."""
    training = datalist.get("training") or []
    if datalist.get("validation") or not any(isinstance(case, dict) and "fold" in case for case in training):
        return datalist
    held_out = [case for case in training if isinstance(case, dict) and case.get("fold") == fold]
    return {**datalist, "training": [case for case in training if case not in held_out], "validation": held_out}


def _part_of(datalist: dict[str, Any], part: str, path: Path) -> list[Any]:
    cases = datalist.get(part)
    if not cases:
        raise UserError(f'{path} has no {part} cases; add "{part}": [{{"image": "...", "label": "..."}}]')
    return list(cases)


def _check_case(case: Any, path: Path, folder: Path) -> dict[str, str]:
    if not isinstance(case, dict) or not {"image", "label"} <= set(case):
        raise UserError(f'{path} holds the case {case!r}; a case is {{"image": "...", "label": "..."}}')
    found = {key: folder / case[key] for key in ("image", "label")}
    for file in found.values():
        if not file.exists():
            raise UserError(f"{path} names {file}, which does not exist; paths are relative to {folder}")
    named = {"dataset_name": str(case["dataset_name"])} if "dataset_name" in case else {}
    return {**{key: str(file.resolve()) for key, file in found.items()}, **named}


def evaluation_items(
    cases: Sequence[dict[str, str]], arguments: Sequence[str], new_classes: NewClasses = None
) -> list[dict[str, Any]]:
    """Return one item per case and argument: the image with that prompt.

    Args:
        cases: ``image`` and ``label`` paths.
        arguments: groups of the model card, such as ``hepatic tumor``, or classes.
        new_classes: see :func:`.labels.read_new_classes`.

    Raises:
        UserError: if an argument is neither.
    """
    groups = label_table().groups  # first, because "hepatic tumor" is a group with the liver, and a class
    prompts = {
        argument: argument_ids(argument) if argument in groups else prompt_ids([argument], new_classes)
        for argument in arguments
    }
    return [{**case, "label_prompt": ids, "argument": argument} for case in cases for argument, ids in prompts.items()]


def validation_items(
    cases: Sequence[dict[str, str]], prompt: Sequence[Any], new_classes: NewClasses = None
) -> list[dict[str, Any]]:
    """Return one item per case, prompted with the classes, ids or groups of ``prompt``."""
    ids = prompt_ids(list(prompt), new_classes)
    return [{**case, "label_prompt": ids} for case in cases]
