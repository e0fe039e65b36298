"""The bundle's own inference: one image, one question, one answer, without experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from monai.inferers import Inferer

from vila_m3_common import prompts
from vila_m3_common.conversation import Conversation, neutralise
from vila_m3_common.errors import UserError, exits_with_message
from vila_m3_common.study import open_study, render_images

from .answer import Answerer
from .model import VilaM3
from .processor import Processor, build_processor, load_tokenizer


def load_processor(checkpoint: str, model: VilaM3) -> Processor:
    """Return the processor of a checkpoint folder."""
    return build_processor(load_tokenizer(f"{checkpoint}/llm"), model)


class AnswerInferer(Inferer):
    """Generates the next assistant turn of a conversation.

    Args:
        processor: turns conversations into tensors.
        max_new_tokens: longest answer in tokens.
    """

    def __init__(self, processor: Processor, max_new_tokens: int = 256) -> None:
        super().__init__()
        self.processor = processor
        self.max_new_tokens = max_new_tokens

    def __call__(self, inputs: Conversation, network: VilaM3, *args: Any, **kwargs: Any) -> str:
        """Return the turn's text."""
        return "".join(Answerer(network, self.processor, self.max_new_tokens)(inputs))


def first_item(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collate: conversations are answered one at a time."""
    return items[0]


def prepare_conversation(batch: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Conversation, None]:
    """Give MONAI's evaluator the conversation as its input."""
    return batch["conversation"], None


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
) -> None:
    """Ask one question about one image and print the model's turn; a trigger in it is not followed.

    With ``image`` None the evaluator runs over the conversations that the dataset holds.
    """
    if image is None:
        evaluator.run()
        return
    text = neutralise(str(question)).strip() if question is not None else ""
    if not text:
        raise UserError("no question was given; add --question 'Are there any liver masses?'")
    study = open_study(image, modality)
    images, _ = render_images(study, slice_index, axis)
    conversation = Conversation()
    conversation.add("user", prompts.opening(study.opening_form, text, cards), images)
    dataset.data[0] = {"conversation": conversation}
    evaluator.run()
    for note in study.notes:
        print(f"note: {note}")
    print(f"user: {text}\nassistant: {evaluator.state.output['pred']}")
