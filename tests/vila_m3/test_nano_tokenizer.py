from typing import Any

import pytest
import torch

from vila_m3.nano_tokenizer import compound_phrases, fixed_phrases, relate_phrases
from vila_m3.processor import VilaM3Processor


def test_fixed_phrases_are_one_token_each(tokenizer: Any, cards: str) -> None:
    for phrase in fixed_phrases(cards):
        assert len(tokenizer.encode(phrase)) == 1, phrase


def test_any_text_comes_back_from_its_tokens(processor: VilaM3Processor) -> None:
    for text in ("Is there a Müller's tumour?\n\n  yes, 3.5 mm!", "effusion: yes\n", "<WHO2> 胸部 \t."):
        assert processor.decode(processor.tokenizer.encode(text)) == text


def test_compound_phrases_start_near_their_parts_and_far_from_others(tokenizer: Any) -> None:
    torch.manual_seed(0)
    embeddings = torch.nn.Embedding(1024, 96)
    relate_phrases(embeddings, tokenizer.backend_tokenizer)

    def vector(text: str) -> torch.Tensor:
        (token,) = tokenizer.encode(text)
        return embeddings.weight.data[token]

    assert ("mass", "yes") in compound_phrases().values()
    near = torch.cosine_similarity(vector("mass: yes"), vector("mass"), dim=0)
    far = torch.cosine_similarity(vector("mass: yes"), vector("hernia"), dim=0)
    assert float(near) == pytest.approx(0.5**0.5, abs=0.15)
    assert abs(float(far)) < 0.4
    torch.testing.assert_close(
        vector(": liver"), (vector("liver") + embeddings.weight.data[tokenizer.convert_tokens_to_ids(":")]) / 2**0.5
    )
