"""The bundle's own inference: one image, one question, one answer, without experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.inferers import Inferer

from vila_m3_common import prompts
from vila_m3_common.conversation import Conversation, neutralise
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.study import open_study, render_images

from .adapters import load_adapter, merge_adapter
from .answer import Answerer
from .checkpoint import load_checkpoint
from .model import VilaM3ForConditionalGeneration


def load_network(
    checkpoint: str,
    device: Any = "cpu",
    dtype: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attention: str = "sdpa",
    quantization: str | None = None,
    chat_template: str | None = None,
    adapter: str | None = None,
) -> VilaM3ForConditionalGeneration:
    """Load a checkpoint with the options of the configs; see :func:`vila_m3.checkpoint.load_checkpoint`.

    Args:
        checkpoint: folder in either layout, or a Hugging Face id.
        device: where it runs.
        dtype: of the weights.
        device_map: over several devices.
        attention: implementation.
        quantization: ``int8`` or ``int4``.
        chat_template: overrules the checkpoint's.
        adapter: folder of a LoRA adapter; merged into the weights, or kept beside quantised ones.
    """
    model = load_checkpoint(checkpoint, device, dtype, device_map, attention, quantization, chat_template)
    if adapter:
        adapted = load_adapter(model, adapter)
        if quantization is None:
            model = merge_adapter(adapted)
    return model.eval()


class AnswerInferer(Inferer):
    """Generates the next assistant turn of a conversation.

    Args:
        answerer: the bundle's ``answer`` hook.
    """

    def __init__(self, answerer: Answerer) -> None:
        super().__init__()
        self.answerer = answerer

    def __call__(self, inputs: Conversation, network: VilaM3ForConditionalGeneration, *args: Any, **kwargs: Any) -> str:
        """Return the turn's text."""
        return "".join(self.answerer(inputs))


def first_item(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate: conversations are answered one at a time."""
    return items[0]


def prepare_conversation(batch: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Conversation, None]:
    """Give MONAI's evaluator the conversation as its input."""
    return batch["conversation"], None


def open_conversation(
    image: str | Sequence[str] | None,
    question: str,
    cards: str,
    modality: str | None = None,
    slice_index: int | None = None,
    axis: int = 2,
) -> tuple[Conversation, tuple[str, ...]]:
    """Start a conversation about an image, or about nothing but text.

    Args:
        image: see :func:`vila_m3_common.study.open_study`; None asks without an image and without model cards.
        question: what the user typed; control strings are taken out of it.
        cards: text of the model cards.
        modality: overrules what the image tells.
        slice_index: slice of a volume; None takes the middle.
        axis: 0 sagittal, 1 coronal, 2 axial.

    Returns:
        The conversation and notes for the user.

    Raises:
        UserError: if the question is empty or the image cannot be used.
    """
    text = neutralise(question).strip()
    if not text:
        raise UserError("the question is empty; ask something, for example 'Are there any liver masses?'")
    conversation = Conversation()
    if image is None:
        conversation.add("user", text)
        return conversation, ()
    study = open_study(image, modality)
    images, _ = render_images(study, slice_index, axis)
    conversation.add("user", prompts.opening(study.opening_form, text, cards), images)
    return conversation, study.notes


@exits_with_message
def run_question(
    image: str | Sequence[str] | None,
    question: str | None,
    modality: str | None,
    slice_index: int | None,
    axis: int,
    cards: str,
    dataset: Any,
    evaluator: Any,
    answerer: Answerer,
) -> None:
    """Ask one question about one image and print the model's turn; a trigger in it is not followed.

    With neither ``image`` nor ``question`` the evaluator runs over the conversations that the dataset holds.
    """
    if image is None and question is None:
        evaluator.run()
        return
    if question is None:
        raise UserError("no question was given; add --question 'Are there any liver masses?'")
    conversation, notes = open_conversation(image, str(question), cards, modality, slice_index, axis)
    dataset.data[0] = {"conversation": conversation}
    evaluator.run()
    for note in (*notes, *answerer.notes):
        print(f"note: {note}")
    print(f"user: {neutralise(str(question)).strip()}\nassistant: {evaluator.state.output['pred']}")
