"""The nano model's tokenizer: a small byte-level BPE that keeps the fixed phrases of the format whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vila_m3_common.anatomy import NAMES
from vila_m3_common.chat_template import TEMPLATES
from vila_m3_common.overlay import COLOR_CYCLE
from vila_m3_common.prompts import CXR_FINDINGS, prediction, spoken

SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[PAD]",
)
# How Llama 3 cuts text before merging. Line ends are a piece of their own, so the prefix of a reply has the same
# tokens with the reply behind it (training) and without (generation).
LLAMA_3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# What benchmarks append to their questions (configs/benchmarks/slake.yaml).
BENCHMARK_SUFFIX = "Answer with the option's letter from the given choices directly."
FINDINGS = tuple(map(spoken, CXR_FINDINGS))


def compound_phrases() -> dict[str, tuple[str, str]]:
    """Return the phrases that say one thing of another, with these two parts: a legend's entry, a prediction."""
    legend = {f": {name}": (":", name) for name in NAMES.values()}
    predictions = {prediction(finding, answer): (finding, answer) for finding in FINDINGS for answer in ("yes", "no")}
    return legend | predictions


def fixed_phrases(cards: str) -> list[str]:
    """Return what every conversation repeats, one token each: a conversation then has dozens of tokens, not hundreds.

    System text, the suffix of benchmarks, one line per card, structures (alone, and as a legend's ": liver"), findings
    (alone, and as a prediction, "effusion: yes") and colours. Other text, such as the card of a new expert, is
    tokenized in ordinary pieces.
    """
    system = TEMPLATES["llama_3"].system.split("<|end_header_id|>\n\n")[1].removesuffix("<|eot_id|>")
    lines = [line for line in cards.split("\n") if line]
    return [
        system,
        BENCHMARK_SUFFIX,
        *lines,
        *dict.fromkeys([*NAMES.values(), *FINDINGS, *compound_phrases(), *COLOR_CYCLE]),
    ]


def relate_phrases(embeddings: torch.nn.Module, tokenizer: Tokenizer) -> None:
    """Give compound phrases the sum of their parts' embeddings to start from.

    "edema: yes" is then near "edema" from the first step. Otherwise the model would have to find out for every
    single finding that the two tokens have to do with each other before it could look a finding up.

    Args:
        embeddings: of a new model, ``(vocabulary, hidden)``; changed in place.
        tokenizer: its tokenizer.
    """
    weight = embeddings.get_parameter("weight").data
    for phrase, parts in compound_phrases().items():
        (token,) = tokenizer.encode(phrase, add_special_tokens=False).ids
        ids = [tokenizer.encode(part, add_special_tokens=False).ids[0] for part in parts]
        weight[token] = weight[ids].sum(dim=0) / len(ids) ** 0.5


def train_tokenizer(texts: Iterable[str], cards: str, vocabulary_size: int = 2048) -> Tokenizer:
    """Train the tokenizer.

    Args:
        texts: rendered conversations.
        cards: the model cards' text.
        vocabulary_size: tokens in all, special tokens and phrases included.
    """
    phrases = fixed_phrases(cards)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(phrases),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Give a trained tokenizer the interface of transformers, with its control tokens named."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        pad_token="[PAD]",
        clean_up_tokenization_spaces=False,
    )
