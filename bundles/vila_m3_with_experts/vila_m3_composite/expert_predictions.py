"""Predictions of the chest X-ray expert for the images of prepared data, saved beside each other as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vila_m3.data.mixture import IndexedJsonl
from vila_m3.data.record import resolve_image
from vila_m3.resumable_files import write_atomically
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.hooks import BundleExpert, close_experts, open_experts
from vila_m3_common.members import find_member

from .expert_studies import run_expert

EXPERT = "CXR"


@exits_with_message
def save_predictions(
    files: Sequence[str],
    image_root: str,
    output_dir: str,
    bundle_root: str,
    expert_bundle: str,
    expert_overrides: Mapping[str, Any] | None = None,
) -> None:
    """Run the expert on every image of JSONL files and write ``<output_dir>/<image>.json``, finding -> probability.

    Predictions that are there are kept, so a killed run goes on where it was. Images that cannot be read stand in
    ``<output_dir>/rejected.jsonl`` with file, row and reason.

    Args:
        files: JSONL files.
        image_root: folder of their images.
        output_dir: folder of the predictions.
        bundle_root: root of the composite.
        expert_bundle: name or path of the expert's bundle.
        expert_overrides: config items to override in it.

    Raises:
        UserError: if a file cannot be read, or the bundle is no chest X-ray expert.
    """
    folder = Path(output_dir)
    work = folder / ".expert_work"
    work.mkdir(parents=True, exist_ok=True)
    experts = open_experts([find_member(expert_bundle, bundle_root)], expert_overrides)
    try:
        if EXPERT not in experts:
            raise UserError(f"bundle {expert_bundle} gives {', '.join(experts)}, not {EXPERT}; give expert_cxr")
        rejected = list(_predict_all(files, image_root, folder, experts[EXPERT], work))
    finally:
        close_experts(experts)
        shutil.rmtree(work, ignore_errors=True)
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
    write_atomically(folder / "rejected.jsonl", "".join(lines))
    print(f"{folder}: {len(rejected)} images rejected, see rejected.jsonl")


def _predict_all(
    files: Sequence[str], image_root: str, folder: Path, expert: BundleExpert, work: Path
) -> Iterator[dict[str, Any]]:
    """Save what is not there yet; yield what cannot be."""
    seen: set[str] = set()
    for file in files:
        rows = IndexedJsonl(file)
        for index in tqdm(range(len(rows)), desc=rows.path.name, unit="row"):
            try:
                names = rows[index].images
            except UserError as error:
                yield {"file": rows.path.name, "row": index + 1, "reason": str(error)}
                continue
            for name in names:
                if name not in seen:
                    seen.add(name)
                    if problem := _predict(name, image_root, folder, expert, work):
                        yield {"file": rows.path.name, "row": index + 1, "reason": problem}


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
