"""What an expert is: its card, what it is asked, what it answers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .errors import near_match_hint


@dataclass(frozen=True)
class ModelCard:
    """The line that tells the VLM what an expert can do.

    Args:
        name: the name used in triggers, such as ``VISTA3D``.
        modality: as the released weights read it (``CT``, ``MRI``, ``chest x-ray (CXR)``).
        task: ``segmentation`` or ``classification``.
        overview: one sentence.
        accuracy: one sentence with figures.
        valid_args: the arguments that a trigger may carry; empty when it takes none.
        study_modality: which studies the expert reads: ``CT``, ``MRI`` or ``CXR``.
        input_description: what the expert needs, in words that a user can act on.
        sequence_count: how many images of one study it reads together (4 for BraTS).
        synonyms: other word -> argument that the expert takes it for; not part of the rendered card.
        report_ends_turn: whether a turn that reports ("using <NAME>") is final, or goes on after
            the feedback (as BraTS was trained).
    """

    name: str
    modality: str
    task: str
    overview: str
    accuracy: str
    valid_args: tuple[str, ...] = ()
    study_modality: str = ""
    input_description: str = ""
    sequence_count: int = 1
    report_ends_turn: bool = True
    synonyms: Mapping[str, str] = field(default_factory=dict, hash=False)

    def render(self) -> str:
        """Return the card as one line in the form that the released weights were trained on."""
        return (
            f"<{self.name}(args)> Modality: {self.modality}, Task: {self.task}, Overview: {self.overview}, "
            f"Accuracy: {self.accuracy}, Valid args are: {_join_args(self.valid_args)}"
        )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ModelCard:
        """Build a card from a config mapping (JSON has lists where the card has tuples)."""
        return cls(**{**config, "valid_args": tuple(config.get("valid_args", ()))})

    def unknown_argument_message(self, argument: str) -> str | None:
        """Return why ``argument`` is not valid, or None when it is; an empty one is the expert's default."""
        if not argument or argument in self.valid_args or argument.lower() in self.synonyms:
            return None
        if not self.valid_args:
            return f"{self.name} takes no argument, but was given {argument!r}; write <{self.name}()>"
        hint = near_match_hint(argument, self.valid_args)
        return f"unknown {self.name} argument {argument!r}; {hint}Valid: {', '.join(self.valid_args)}"


def _join_args(valid_args: Sequence[str]) -> str:
    quoted = [f"'{argument}'" for argument in valid_args]
    if len(quoted) < 2:
        return quoted[0] if quoted else "None"
    return f"{', '.join(quoted[:-1])}, or {quoted[-1]}"


@dataclass(frozen=True)
class ExpertRequest:
    """One call of an expert.

    Args:
        image_paths: files or DICOM folders, one per sequence, in the expert's channel order.
        argument: the trigger's argument; empty for the expert's default.
        slice_index: index along ``axis`` of the RAS volume that the VLM saw; None for 2-D images.
        axis: 0 sagittal, 1 coronal, 2 axial.
        question: the user's question, repeated at the end of the feedback.
        output_dir: folder that exists and in which the expert may create files named after ``stem``.
        stem: beginning of every file name that this call writes.
        prompts: what a user chose in a viewer beside the argument, for experts that take it: ``label_prompt``,
            ``points`` (voxel indices of the image file) and ``point_labels``. Plain JSON values.
    """

    image_paths: tuple[str, ...]
    argument: str = ""
    slice_index: int | None = None
    axis: int = 2
    question: str = ""
    output_dir: str = "."
    stem: str = "expert"
    prompts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def to_json(self) -> str:
        """Return the request as one string, a form that MONAI's collation carries through unchanged."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ExpertRequest:
        """Read what :meth:`to_json` wrote."""
        values = json.loads(text)
        return cls(**{**values, "image_paths": tuple(values["image_paths"])})

    def file(self, suffix: str) -> Path:
        """Return the path of an output file of this call: ``<output_dir>/<stem><suffix>``."""
        return Path(self.output_dir) / f"{self.stem}{suffix}"


@dataclass
class ExpertResult:
    """What an expert gives back.

    Args:
        text: the exact text of the expert turn, with one ``<image>`` per entry of ``images``.
        images: overlays for the VLM, each ``(H, W, 3)`` uint8.
        overlay_path: the overlay with legend for people, a PNG.
        label_map_path: NIfTI label map in the geometry of the (first) input image.
        legend: colour name -> structure name, as in the text.
        measurements: one mapping per structure (volume in mL, lesion count, diameters in mm ...).
        scores: finding -> probability in 0..1.
        notes: sentences for the user that are not part of the expert turn.
        is_error: whether the call failed; the text then says why.
    """

    text: str
    images: tuple[np.ndarray, ...] = ()
    overlay_path: Path | None = None
    label_map_path: Path | None = None
    legend: dict[str, str] = field(default_factory=dict)
    measurements: list[dict[str, Any]] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    is_error: bool = False

    def to_record(self) -> dict[str, Any]:
        """Return everything but the pixels, ready for JSON; file names are relative to their folder."""
        return {
            "overlay": self.overlay_path.name if self.overlay_path else None,
            "label_map": self.label_map_path.name if self.label_map_path else None,
            "legend": self.legend,
            "measurements": self.measurements,
            "scores": self.scores,
            "notes": self.notes,
            "is_error": self.is_error,
        }


class Expert(Protocol):
    """A model that the agent can call."""

    card: ModelCard

    def run(self, request: ExpertRequest) -> ExpertResult:
        """Run the model on one request."""
        ...
