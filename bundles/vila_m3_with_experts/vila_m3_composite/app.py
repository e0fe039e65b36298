"""The composite's command: one study, one or more questions, all outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from vila_m3_common.agent import Agent, Listener, Session, TurnRecord
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.hooks import BundleVlm, close_experts, open_experts
from vila_m3_common.members import find_member
from vila_m3_common.prompts import Variant
from vila_m3_common.slices import check_slice
from vila_m3_common.study import Study, open_study, ras_channels

from .outputs import CaseFolder


class Composite:
    """The opened VLM and experts, for as many sessions as needed; use as a context manager.

    Args:
        bundle_root: root of the composite.
        vlm_bundle: name or path of the VLM bundle.
        expert_bundles: names or paths of the expert bundles.
        vlm_overrides: config items to override in the VLM bundle, such as its checkpoint.
        expert_overrides: config items to override in every expert bundle.
        variant: ``trained`` or ``served`` form of the opening.
        max_expert_calls: bound on the expert calls of one question.
        tells_measurements: whether the expert turn holds the measurements too.
    """

    def __init__(
        self,
        bundle_root: str,
        vlm_bundle: str,
        expert_bundles: Sequence[str],
        vlm_overrides: Mapping[str, Any] | None = None,
        expert_overrides: Mapping[str, Any] | None = None,
        variant: Variant = "trained",
        max_expert_calls: int = 4,
        tells_measurements: bool = False,
    ) -> None:
        with ExitStack() as stack:
            vlm_root = find_member(vlm_bundle, bundle_root)
            self.vlm = BundleVlm(vlm_root, vlm_overrides)
            stack.callback(self.vlm.close)
            roots = [find_member(name, bundle_root) for name in expert_bundles]
            self.expert_overrides = expert_overrides
            self.experts = open_experts(roots, expert_overrides)
            stack.callback(close_experts, self.experts)
            cards = (vlm_root / "configs" / "model_cards.txt").read_text()
            self.agent = Agent(self.vlm, self.experts, cards, variant, max_expert_calls, tells_measurements)
            self._stack = stack.pop_all()

    def __enter__(self) -> Composite:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Finalize every member, also after an error; safe to call twice."""
        self._stack.close()


@exits_with_message
def run_command(
    image: str | Sequence[str] | None,
    question: str | Sequence[str] | None,
    question_file: str | None,
    output_dir: str,
    modality: str | None,
    slice_index: int | None,
    axis: int,
    t1c_only: bool,
    sequence_order: Sequence[str] | None,
    composite: Mapping[str, Any],
) -> None:
    """Ask questions about one study and write conversation, answer, overlays, label maps and report.

    Args:
        image: file, folder, or list of files.
        question: one question, or a list that is asked in turn.
        question_file: text file with one question per line; its text is never read as a config value.
        output_dir: results go to ``<output_dir>/<case>/``.
        modality: ``CT``, ``MRI`` or ``CXR`` to overrule what the image tells.
        slice_index: RAS index of the slice that the VLM sees; None takes the middle.
        axis: 0 sagittal, 1 coronal, 2 axial.
        t1c_only: show T1c in all four MRI places, as the reference did.
        sequence_order: see :func:`vila_m3_common.study.open_study`; the brain expert is told of it by ``composite``.
        composite: keyword arguments of :class:`Composite`.
    """
    if not image:
        raise UserError("no image was given; add --image <file or folder>")
    questions = read_questions(question, question_file)
    study = open_study(as_paths(image), modality, sequence_order)
    check_study_slice(study, slice_index, axis)
    with Composite(**composite) as members, CaseFolder(output_dir, study) as folder:
        session = Session(study, folder.working, slice_index, axis, t1c_only)
        for text in questions:
            members.agent.ask(session, text, console(members.agent.cards))
        for note in session.notes:
            print(f"note: {note}")
        print(f"written to {folder.finish(session, members.agent.cards)}")


def as_paths(image: Any) -> str | list[str]:
    """Return what the command line gave as a path or a list of paths."""
    if isinstance(image, (list, tuple)):
        return [str(path) for path in image]
    return str(image)


def read_questions(question: Any, question_file: str | None) -> list[str]:
    """Return the questions in order; the command line may turn a text into a number or a tuple.

    Raises:
        UserError: if there is none, or the file cannot be read.
    """
    if question_file:
        path = Path(question_file)
        if not path.is_file():
            raise UserError(f"question file {path} does not exist; give a text file with one question per line")
        questions = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    elif isinstance(question, list):
        questions = [str(part) for part in question]
    elif isinstance(question, tuple):
        questions = [", ".join(str(part) for part in question)]
    else:
        questions = [str(question)] if question is not None else []
    if not any(text.strip() for text in questions):
        raise UserError("no question was given; add --question 'Are there any liver masses?' or --question_file <file>")
    return questions


def check_study_slice(study: Study, slice_index: int | None, axis: int) -> None:
    """Refuse a slice that does not exist before anything is loaded or written."""
    if study.is_planar:
        if slice_index is not None:
            raise UserError(f"slice_index {slice_index} was given for a 2-D image; leave it out")
        return
    check_slice(ras_channels(study)[0].shape, slice_index, axis)


def console(cards: str) -> Listener:
    """Return a listener that prints a conversation while it happens, without the model cards."""
    is_open = False

    def print_piece(piece: str) -> None:
        nonlocal is_open
        print(piece if is_open else f"assistant: {piece}", end="", flush=True)
        is_open = True

    def print_turn(record: TurnRecord) -> None:
        nonlocal is_open
        if record.turn.role == "assistant":
            print("" if is_open else "assistant: ")
            is_open = False
            return
        reused = " (earlier result)" if record.call and record.call.is_reused else ""
        print(f"{record.turn.role}{reused}: {record.turn.text.removeprefix(cards).strip()}")

    return Listener(print_piece, print_turn)
