"""The files of one case: conversation.json, answer.txt, pictures, label maps, report.html."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import monai
import torch
from PIL import Image

from vila_m3_common import __version__
from vila_m3_common.agent import Session, TurnRecord
from vila_m3_common.standalone import make_output_dir
from vila_m3_common.study import Study

from .report import render_report


class CaseFolder:
    """The result folder of one case; it appears when everything is written, or not at all.

    Results are collected in a hidden folder beside it (:attr:`working`) that is renamed by
    :meth:`finish`. A second run of the same case gets a folder of its own, ``<case>_2``.

    Args:
        output_dir: parent folder, created when missing.
        study: names the case by its file.

    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, output_dir: str | Path, study: Study) -> None:
        self._is_new_parent = not Path(output_dir).exists()
        self.parent = make_output_dir(output_dir)
        self.case = case_name(study)
        self.working = Path(tempfile.mkdtemp(prefix=f".{self.case}.", dir=self.parent))

    def __enter__(self) -> CaseFolder:
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self.working, ignore_errors=True)
        if self._is_new_parent and not any(self.parent.iterdir()):
            self.parent.rmdir()

    def finish(self, session: Session, cards: str) -> Path:
        """Write the session's files, move the folder to its place and return that place."""
        record = write_session(session, self.working, self.case, cards)
        (self.working / "report.html").write_text(render_report(record, self.working))
        self.working.chmod(0o755)
        number = 1
        while True:
            target = self.parent / (self.case if number == 1 else f"{self.case}_{number}")
            try:
                if not target.exists():
                    return self.working.rename(target)
            except OSError:
                if not target.exists():
                    raise
            number += 1


def case_name(study: Study) -> str:
    """Return a folder name made from the study's file name: letters, digits, dot, dash and underscore only."""
    first = study.paths[0].resolve()
    name = first.parent.name if len(study.paths) > 1 else first.name
    for suffix in (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".png", ".jpg", ".jpeg", ".dcm"):
        name = name[: -len(suffix)] if name.lower().endswith(suffix) else name
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._") or "case"


def write_session(session: Session, folder: Path, case: str, cards: str) -> dict[str, Any]:
    """Write pictures, ``answer.txt`` and ``conversation.json``; return the content of the latter."""
    turns = [_turn_record(record, index, folder, cards) for index, record in enumerate(session.records)]
    study = session.study
    record = {
        "case": case,
        "images": [path.name for path in study.paths] if study else [],
        "modality": study.modality if study else "none",
        "modality_source": study.source if study else "no image",
        "slice_index": session.slice_index,
        "axis": session.axis,
        "notes": session.notes,
        "answer": session.answer,
        "turns": turns,
        "model_cards": cards,
        "versions": {"vila_m3_common": __version__, "monai": monai.__version__, "torch": torch.__version__},
    }
    (folder / "answer.txt").write_text(session.answer + "\n")
    (folder / "conversation.json").write_text(json.dumps(record, indent=2))
    return record


def _turn_record(record: TurnRecord, index: int, folder: Path, cards: str) -> dict[str, Any]:
    files = []
    for number, image in enumerate(record.turn.images, start=1):
        name = f"turn{index:02d}_image{number}.png"
        Image.fromarray(image).save(folder / name)
        files.append(name)
    return {**describe_turn(record, cards), "images": files}


def describe_turn(record: TurnRecord, cards: str) -> dict[str, Any]:
    """Return a turn without its pictures, ready for JSON; ``cards`` are left out of its text."""
    turn = record.turn
    entry: dict[str, Any] = {
        "role": turn.role,
        "text": turn.text.removeprefix(cards),
        "has_model_cards": bool(cards) and turn.text.startswith(cards),
        "in_context": turn.in_context,
        "seconds": round(record.seconds, 3),
    }
    if record.call:
        entry["expert"] = {
            "name": record.call.trigger.name,
            "argument": record.call.trigger.argument,
            "is_reused": record.call.is_reused,
            **record.call.result.to_record(),
        }
    return entry
