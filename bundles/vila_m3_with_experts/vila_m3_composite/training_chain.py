"""A chain of ``monai.bundle run`` commands in one process: what is done is skipped, what is left is estimated."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import run

from vila_m3.checkpoint import load_checkpoint, load_processor
from vila_m3.data.source import check_folder, find_file, read_csv_rows
from vila_m3.export import save_released
from vila_m3.resumable_files import replace_folder, write_atomically
from vila_m3.run_state import sha256_of
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.patients import is_held_out


@dataclass(frozen=True)
class Step:
    """One command of a chain.

    Args:
        name: of the step, unique.
        config_file: configs, each over the one before.
        overrides: of their keys.
        outputs: files and folders that the step writes; what an earlier run with other settings left there is removed.
        minutes: how long it is expected to take; only the proportions between steps matter.
        inputs: files and folders from elsewhere that the step reads; when their contents change, it starts anew.
    """

    name: str
    config_file: Sequence[str]
    overrides: Mapping[str, Any]
    outputs: Sequence[str]
    minutes: float
    inputs: Sequence[str] = ()

    def digest(self, before: str) -> str:
        """Return what changes when the settings or inputs of this step or of one before it do."""
        settings = [before, *self.config_file, json.dumps(self.overrides, sort_keys=True, default=str)]
        contents = [Path(file).read_text() for file in self.config_file]
        contents += [sha256_of(file) for path in self.inputs for file in _files_of(Path(path))]
        return hashlib.sha256("\n".join([*settings, *contents]).encode()).hexdigest()


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


@exits_with_message
def run_chain(steps: Sequence[Mapping[str, Any]], work: str) -> None:
    """Run steps one after the other.

    A step that was done with the same settings (its own and those before it) is skipped, and one that was cut off
    goes on as its command does by itself. With other settings it starts anew.

    Args:
        steps: arguments of :class:`Step`.
        work: folder for what is known of them.

    Raises:
        UserError: for steps of the same name, or a config or input that does not exist.
    """
    chain = [Step(**step) for step in steps]
    names = [step.name for step in chain]
    if len(set(names)) < len(names):
        raise UserError(f"two steps have one name: {', '.join(names)}; give each a name of its own")
    for file in (file for step in chain for file in step.config_file):
        if not Path(file).is_file():
            raise UserError(f"config {file} of the chain does not exist; correct its steps")
    notes = _Notes(Path(work))
    digest = ""
    for number, step in enumerate(chain, start=1):
        for path in step.inputs:
            if not Path(path).exists():
                raise UserError(f"{path}, which step {step.name!r} reads, does not exist; make it first")
        digest = step.digest(digest)
        told = f"[{number}/{len(chain)}] {step.name}"
        if notes.is_done(step, digest):
            print(f"{told}: done before", flush=True)
            continue
        print(f"{told}: started, {notes.estimate(chain, number - 1)}", flush=True)
        notes.begin(step, digest)
        start = time.monotonic()
        run(config_file=list(step.config_file), **step.overrides)
        notes.end(step, digest, time.monotonic() - start)
        print(f"{told}: done, {notes.estimate(chain, number)}", flush=True)


class _Notes:
    """What is known of each step: the settings it was begun with, and the seconds it took."""

    def __init__(self, work: Path) -> None:
        self.path = work / "chain.json"
        self.steps: dict[str, dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def is_done(self, step: Step, digest: str) -> bool:
        note = self.steps.get(step.name, {})
        outputs_exist = all(Path(path).exists() for path in step.outputs)
        return note.get("digest") == digest and "seconds" in note and outputs_exist

    def begin(self, step: Step, digest: str) -> None:
        note = self.steps.get(step.name, {})
        if note.get("digest") != digest:
            for path in map(Path, step.outputs):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            self.steps[step.name] = {"digest": digest}
            self._save()

    def end(self, step: Step, digest: str, seconds: float) -> None:
        self.steps[step.name] = {"digest": digest, "seconds": round(seconds, 1), "minutes": step.minutes}
        self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.steps, indent=2) + "\n")

    def estimate(self, chain: Sequence[Step], done: int) -> str:
        """Tell how much time is left, from the expectation and how the steps so far kept to it."""
        taken = [note for note in self.steps.values() if "seconds" in note]
        expected = sum(note["minutes"] for note in taken)
        pace = sum(note["seconds"] for note in taken) / 60 / expected if expected else 1.0
        left = sum(step.minutes for step in chain[done:]) * pace
        return f"about {left:.1f} minutes left"


def split_films(root: str, share: float, count: int | None = None) -> list[list[str]]:
    """Return films of ChestX-ray14 patients that are not held out, one study each.

    Args:
        root: folder with ``labels.csv`` and the films.
        share: of the held-out patients.
        count: at most so many; None for all.
    """
    folder = check_folder(root)
    rows = read_csv_rows(find_file(folder, "labels.csv"), ["Image Index", "Patient ID"])
    films = [
        [str(folder / row["Image Index"])]
        for _, row in rows
        if not isinstance(row, str) and not is_held_out(row["Patient ID"], share)
    ]
    return films[:count]


@exits_with_message
def link_folders(folder: str, targets: Mapping[str, str]) -> None:
    """Bring folders that lie elsewhere under one, by links.

    Args:
        folder: created when missing.
        targets: name below ``folder`` -> an existing folder.

    Raises:
        UserError: if a target is missing, or the name is taken by something else.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, target in targets.items():
        link = Path(folder) / name
        if not Path(target).is_dir():
            raise UserError(f"folder {target} does not exist; name the folder of the data")
        if link.is_symlink():
            link.unlink()
        if link.exists():
            raise UserError(f"{link} is no link; remove it, or give another folder")
        link.symlink_to(Path(target).resolve(), target_is_directory=True)


@exits_with_message
def release(checkpoint: str, output_dir: str) -> None:
    """Write the weights of a chain's last stage in half precision, with its card less the folders of this machine.

    Args:
        checkpoint: folder that the stage wrote.
        output_dir: folder of the release; replaced in one step.
    """
    source, target = Path(checkpoint), Path(output_dir)
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    save_released(load_checkpoint(source, dtype="float32"), load_processor(source), partial, torch.float16)
    card = json.loads((source / "model_card.json").read_text())
    card["config"]["start_checkpoint"] = Path(card["config"]["start_checkpoint"]).name
    (partial / "model_card.json").write_text(json.dumps(card, indent=2) + "\n")
    replace_folder(partial, target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1e6:.1f} MB")
