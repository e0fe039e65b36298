"""Attention of a new LLM that looks for tokens like its own and copies them, before anything is learnt.

A small model learns late to read "edema: yes" off a list when it is asked for edema: one bit an answer hardly tells it
where to look. Started so that queries equal keys and that what is read is written back as it is, it matches and copies
from the first step, and training only has to choose what. After the mimetic initialization of Trockman and Kolter
(2023, https://arxiv.org/abs/2305.09828), who found such products in trained models.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaForCausalLM

# Of the orthogonal matrices: queries times keys, and values times output, are about half of one.
GAIN = 0.7


@torch.no_grad()
def look_for_likeness(llm: LlamaForCausalLM) -> None:
    """Start every layer's attention so; left alone where keys have fewer heads than queries, or heads another width.

    Args:
        llm: a new model; changed in place.
    """
    for layer in llm.model.layers:
        attention = layer.self_attn
        query, key, value, output = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        if query.weight.shape == key.weight.shape == value.weight.shape == output.weight.T.shape:
            nn.init.orthogonal_(query.weight, GAIN)
            key.weight.copy_(query.weight)
            nn.init.orthogonal_(value.weight, GAIN)
            output.weight.copy_(value.weight.T)
