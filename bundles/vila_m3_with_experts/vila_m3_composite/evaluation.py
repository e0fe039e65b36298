"""The whole system on phantoms: is the right expert called, and does the answer agree with its feedback?"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vila_m3.phantom_conversations import findings_reply, structures_reply
from vila_m3.questions import Question, ct_describe, ct_tumor, cxr_finding, draw, from_table
from vila_m3_common import phantoms
from vila_m3_common.agent import Session
from vila_m3_common.errors import exits_with_message
from vila_m3_common.measure import largest_slice
from vila_m3_common.standalone import make_output_dir
from vila_m3_common.study import open_study

from .app import Composite


@dataclass(frozen=True)
class Case:
    """One phantom with a question: what must be called, and with which argument."""

    image: Path
    modality: str
    question: Question
    expert: str
    argument: str
    slice_index: int | None


@exits_with_message
def run_evaluation(
    case_count: int, first_seed: int, output_dir: str, composite: Mapping[str, Any], held_out: bool = True
) -> dict[str, Any]:
    """Ask about ``case_count`` phantoms of each modality; write and print the figures.

    Args:
        case_count: phantoms per modality.
        first_seed: seed of the first phantom.
        output_dir: folder of ``metrics.json`` and ``cases.jsonl``.
        composite: keyword arguments of :class:`vila_m3_composite.app.Composite`.
        held_out: whether to ask only in wordings that training never saw.

    Returns:
        Per modality ``right_expert``, ``right_argument``, ``agreement`` (0..1) and ``count``.
    """
    folder = make_output_dir(output_dir)
    work = Path(tempfile.mkdtemp())
    try:
        with Composite(**composite) as members:
            rows = []
            makers: Sequence[Callable[[int, Path, bool], Case]] = (ct_case, mri_case, cxr_case)
            for seed in tqdm(range(first_seed, first_seed + case_count), desc="phantoms"):
                rows += [_ask(members, make(seed, work, held_out), work) for make in makers]
    finally:
        shutil.rmtree(work, ignore_errors=True)
    metrics = {
        modality: _summary([row for row in rows if row["modality"] == modality]) for modality in ("CT", "MRI", "CXR")
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    (folder / "cases.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for modality, row in metrics.items():
        figures = "  ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "count")
        print(f"{modality:4} {figures}  n {row['count']}")
    print(f"written to {folder}")
    return metrics


def ct_case(seed: int, folder: Path, held_out: bool) -> Case:
    """A CT phantom; three questions of four are about tumours, asked in a slice that holds them if there is one."""
    rng = random.Random(seed)
    phantom = phantoms.ct_phantom(seed)
    question = draw(ct_tumor if rng.random() < 0.75 else ct_describe, rng, held_out)
    tumor = phantoms.CT_TUMORS.get(question.target)
    shown = phantom.labels == tumor if tumor else phantom.labels > 0
    path = phantoms.save_volume(phantom.image, phantom.affine, folder / f"ct_{seed}.nii.gz")
    slice_index = largest_slice(shown) if shown.any() else None
    return Case(path, "CT", question, "VISTA3D", question.argument, slice_index)


def mri_case(seed: int, folder: Path, held_out: bool) -> Case:
    """A brain MRI phantom, with a question about a tumour."""
    rng = random.Random(seed)
    phantom = phantoms.mri_phantom(seed)
    question = draw(from_table("mri_tumor", "tumor"), rng, held_out)
    shown = phantom.labels > 0
    slice_index = largest_slice(shown) if shown.any() else None
    return Case(phantoms.save_mri(phantom, folder / f"mri_{seed}"), "MRI", question, "BRATS", "", slice_index)


def cxr_case(seed: int, folder: Path, held_out: bool) -> Case:
    """A chest X-ray phantom, with a question about one finding or all."""
    rng = random.Random(seed)
    maker = cxr_finding if rng.random() < 0.75 else from_table("cxr_describe", "describe")
    path = phantoms.save_radiograph(phantoms.cxr_phantom(seed), folder / f"cxr_{seed}.png")
    return Case(path, "CXR", draw(maker, rng, held_out), "CXR", "", None)


def _ask(members: Composite, case: Case, work: Path) -> dict[str, Any]:
    study = open_study(case.image)
    output = work / "output"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    session = Session(study, output, case.slice_index)
    answer = members.agent.ask(session, case.question.text)
    call = session.calls[0] if session.calls else None
    right_expert = call is not None and call.trigger.name == case.expert and len(session.calls) == 1
    expected = expected_answer(case, call.result) if call is not None and not call.result.is_error else None
    return {
        "modality": case.modality,
        "question": case.question.text,
        "trigger": str(call.trigger) if call else None,
        "wanted": f"<{case.expert}({case.argument})>",
        "answer": answer,
        "expected": expected,
        "right_expert": right_expert,
        "right_argument": right_expert and call is not None and call.trigger.argument == case.argument,
        "agreement": expected is not None and answer == expected,
    }


def expected_answer(case: Case, result: Any) -> str:
    """Return the answer that the expert's own feedback demands."""
    question = case.question
    if case.modality == "CXR":
        positive = [name for name, score in result.scores.items() if score > 0.5]
        if question.kind == "describe":
            return findings_reply(positive)
        return "yes" if question.target in positive else "no"
    if case.modality == "MRI":
        return "yes" if result.legend else "no"
    if question.kind == "describe":
        return structures_reply(list(result.legend.items()))
    return "yes" if question.target in result.legend.values() else "no"


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    names = ("right_expert", "right_argument", "agreement")
    return {name: sum(bool(row[name]) for row in rows) / len(rows) for name in names} | {"count": len(rows)}
