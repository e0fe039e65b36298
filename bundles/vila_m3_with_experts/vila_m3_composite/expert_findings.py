"""The chest X-ray expert's findings of a folder of films, saved for evaluation and data preparation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vila_m3.resumable_files import write_atomically
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.hooks import close_experts, open_experts
from vila_m3_common.members import find_member
from vila_m3_common.standalone import make_output_dir
from vila_m3_common.volumes import RADIOGRAPH_SUFFIXES

from .expert_data import run_on

SUFFIXES = (*RADIOGRAPH_SUFFIXES, ".dcm")


@exits_with_message
def write_findings(
    images: str,
    output_dir: str,
    bundle_root: str,
    expert_bundle: str = "expert_cxr",
    expert_overrides: Mapping[str, Any] | None = None,
) -> None:
    """Run the expert on every film below a folder and write ``<output_dir>/<film>.json``, finding -> probability.

    Films that have their file are left out, so that a run that was cut off goes on.

    Args:
        images: folder of the films, at any depth.
        output_dir: where to write, with the same sub-folders.
        bundle_root: root of the composite.
        expert_bundle: name or path of the expert bundle.
        expert_overrides: config items to override in it.

    Raises:
        UserError: if there are no films.
    """
    root = Path(images)
    films = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not films:
        raise UserError(f"{root} holds no films ({', '.join(SUFFIXES)}); give the folder of the images")
    folder = make_output_dir(output_dir)
    work = folder / "work"
    work.mkdir(exist_ok=True)
    experts = open_experts([find_member(expert_bundle, bundle_root)], expert_overrides)
    (expert,) = experts.values()
    failed = 0
    try:
        for film in tqdm(films, desc=expert.card.name, unit="film"):
            target = folder / f"{film.relative_to(root).as_posix()}.json"
            if target.is_file():
                continue
            try:
                scores = run_on(expert, [str(film)], work, "", None).scores
            except (UserError, OSError) as error:
                failed += 1
                tqdm.write(f"{film.name} is left out: {error}")
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, json.dumps(scores))
    finally:
        close_experts(experts)
        shutil.rmtree(work, ignore_errors=True)
    print(f"{len(films) - failed} of {len(films)} films have their findings in {folder}")
