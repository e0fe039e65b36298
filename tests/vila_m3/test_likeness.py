"""The start of a new LLM's attention: like looks for like, and is copied."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vila_m3.likeness import GAIN, look_for_likeness
from vila_m3.nano_tokenizer import wrap_tokenizer
from vila_m3.training import fit_tokenizer, start_model


def new_llm(**changed: Any) -> LlamaForCausalLM:
    shape = {
        "vocab_size": 64,
        "hidden_size": 96,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attn_implementation": "eager",
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **changed})).eval()


def weight_on_the_like(llm: LlamaForCausalLM) -> float:
    """Return how much the last token attends to the one place where it stood before, averaged over the heads."""
    ids = torch.randperm(64)[None, :16]
    ids[0, -1] = ids[0, 9]
    with torch.no_grad():
        weights = llm(input_ids=ids, output_attentions=True).attentions[0]
    return float(weights[0, :, -1, 9].mean() / weights[0, :, -1, :-1].mean())


def test_a_token_attends_to_its_like_from_the_start() -> None:
    llm = new_llm()
    assert weight_on_the_like(llm) == pytest.approx(1, abs=0.1)
    look_for_likeness(llm)
    assert weight_on_the_like(llm) > 3


def test_what_is_read_is_written_back_as_it_is() -> None:
    llm = new_llm()
    look_for_likeness(llm)
    for layer in llm.model.layers:
        attention = layer.self_attn
        state = torch.randn(5, 96)
        copied = attention.o_proj(attention.v_proj(state))
        torch.testing.assert_close(copied, GAIN**2 * state, atol=1e-4, rtol=1e-4)


def test_shared_key_heads_stay_as_they_are() -> None:
    llm = new_llm(num_key_value_heads=2)
    before = {name: value.clone() for name, value in llm.state_dict().items()}
    look_for_likeness(llm)
    torch.testing.assert_close(llm.state_dict(), before)


def test_a_model_to_be_trained_from_nothing_starts_so(tiny_config: dict[str, Any], cards: str) -> None:
    tokenizer = wrap_tokenizer(fit_tokenizer(["Is there edema?", "yes", "no"], cards, 1024))
    for layer in start_model(tiny_config, None, tokenizer).llm.model.layers:
        torch.testing.assert_close(layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight)
