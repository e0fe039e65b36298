"""The nano model's tokenizer: a small byte-level BPE that keeps the fixed phrases of the format whole."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from vila_m3_common.anatomy import NAMES
from vila_m3_common.chat_template import TEMPLATES
from vila_m3_common.overlay import COLOR_CYCLE
from vila_m3_common.prompts import CXR_FINDINGS

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


def fixed_phrases(cards: str) -> list[str]:
    """Return what every conversation repeats, one token each: a conversation then has dozens of tokens, not hundreds.

    System text, one line per card, structures (alone, and as a legend's ": liver"), findings (alone, and as a
    prediction's "effusion: yes" line) and colours. Other text, such as the card of a new expert, is tokenized
    in ordinary pieces.
    """
    system = TEMPLATES["llama_3"].system.split("<|end_header_id|>\n\n")[1].removesuffix("<|eot_id|>")
    lines = [line for line in cards.split("\n") if line]
    structures = [phrase for name in NAMES.values() for phrase in (name, f": {name}")]
    findings = [finding.lower().replace("_", " ") for finding in CXR_FINDINGS]
    predictions = [f"{finding}: {answer}\n" for finding in findings for answer in ("yes", "no")]
    return [system, *lines, *dict.fromkeys([*structures, *findings, *predictions, *COLOR_CYCLE])]


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
