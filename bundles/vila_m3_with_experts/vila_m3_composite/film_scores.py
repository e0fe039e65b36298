"""What the chest X-ray expert says about films, saved for the audit of the VLM."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from vila_m3.benchmarks.audit_cases import saved_scores_path
from vila_m3.benchmarks.nih import held_out_films
from vila_m3.resumable_files import write_atomically
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.expert import ExpertRequest
from vila_m3_common.hooks import close_experts, open_experts
from vila_m3_common.members import find_member
from vila_m3_common.standalone import make_output_dir


@exits_with_message
def save_film_scores(
    nih_root: str,
    output_dir: str,
    bundle_root: str,
    expert_bundles: Sequence[str],
    expert_overrides: Mapping[str, Any] | None = None,
) -> None:
    """Run the expert CXR on the films of patients that were kept apart; write ``<output_dir>/<film>.json``.

    Films that have a file are left as they are, so that a run that was cut off goes on.

    Args:
        nih_root: folder of the films with ``labels.csv``.
        output_dir: where to write.
        bundle_root: root of the composite.
        expert_bundles: names or paths of the expert bundles; CXR must be among them.
        expert_overrides: config items to override in every expert bundle.
    """
    folder = make_output_dir(output_dir)
    experts = open_experts([find_member(name, bundle_root) for name in expert_bundles], expert_overrides)
    try:
        if "CXR" not in experts:
            raise UserError(f"no expert CXR among {', '.join(experts)}; add expert_cxr to --expert_bundles")
        films = held_out_films(nih_root)
        with tempfile.TemporaryDirectory() as work:
            for film in tqdm(films, desc="films"):
                path = saved_scores_path(folder, film)
                if not path.is_file():
                    result = experts["CXR"].run(ExpertRequest((str(film.path),), output_dir=work))
                    write_atomically(path, json.dumps(result.scores) + "\n")
    finally:
        close_experts(experts)
    print(f"scores of {len(films)} films are in {folder}")
