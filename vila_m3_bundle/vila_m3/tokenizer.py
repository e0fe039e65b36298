"""The tokenizers of VILA-1.5 checkpoints: fast ones, and Llama's SentencePiece model with its rules of old."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils import logging

from vila_m3_common.errors import UserError

from .configuration import VilaM3Config

BLANK = "▁"


class SentencePieceTokenizer(SentencePieceBackend):
    """Llama's tokenizer as the released 3B, 13B and 40B weights saw it.

    The current ``LlamaTokenizer`` of transformers is another program: it loses a blank at the start of a text
    and always adds the dummy prefix. Here text between special tokens goes to SentencePiece itself.

    Args:
        vocab_file: ``tokenizer.model``.
        unk_token: the unknown token.
        bos_token: the start token.
        eos_token: the end token.
        add_bos_token: whether every text starts with the start token.
        add_eos_token: whether every text ends with the end token.
        legacy: whether text behind a special token gets a dummy prefix, as before transformers 4.31.
        kwargs: what :class:`transformers.PreTrainedTokenizer` takes.
    """

    def __init__(
        self,
        vocab_file: str,
        unk_token: str = "<unk>",
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        add_bos_token: bool = True,
        add_eos_token: bool = False,
        legacy: bool = True,
        **kwargs: Any,
    ) -> None:
        self.add_bos_token = add_bos_token
        self.add_eos_token = add_eos_token
        super().__init__(
            vocab_file=vocab_file,
            unk_token=unk_token,
            bos_token=bos_token,
            eos_token=eos_token,
            add_bos_token=add_bos_token,
            add_eos_token=add_eos_token,
            legacy=legacy,
            **kwargs,
        )

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:  # type: ignore[override]
        """Split a text into pieces, without the start token."""
        if self.legacy or not text:
            return super().tokenize(text, **kwargs)
        pieces = super().tokenize(BLANK + text.replace(BLANK, " "), **kwargs)
        if len(pieces) > 1 and pieces[0] == BLANK and pieces[1] in self.all_special_tokens:
            return pieces[1:]
        return pieces

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Add start and end token where the tokenizer is configured to."""
        start = [self.bos_token_id] if self.add_bos_token else []
        end = [self.eos_token_id] if self.add_eos_token else []
        second = start + token_ids_1 + end if token_ids_1 else []
        return start + token_ids_0 + end + second

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, **kwargs: Any
    ) -> tuple[str, ...]:
        """Write ``tokenizer.model`` and the config; transformers 5 forgets to say whether a start token is added."""
        written = super().save_pretrained(str(save_directory), **kwargs)
        path = Path(save_directory) / "tokenizer_config.json"
        config = json.loads(path.read_text())
        config |= {"add_bos_token": self.add_bos_token, "add_eos_token": self.add_eos_token}
        path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        return written

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Join pieces to text; the blank before the first is taken away."""
        special = set(self.all_special_tokens)
        pieces = [piece.removeprefix(BLANK) if index == 0 else piece for index, piece in enumerate(tokens)]
        text = ""
        for is_special, group in groupby(pieces, lambda piece: piece in special):
            run = list(group)
            text += "".join(run) if is_special else self.sp_model.decode(run)
        return text


def load_tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint's ``llm/`` folder, or of a one-folder checkpoint.

    ``tokenizer.model`` goes before ``tokenizer.json``, as in the reference (``use_fast=False``).

    Raises:
        UserError: if neither is there, or one is damaged.
    """
    folder = Path(folder)
    is_sentencepiece = (folder / "tokenizer.model").is_file()
    if not is_sentencepiece and not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"{folder} holds neither tokenizer.json nor tokenizer.model; the checkpoint's llm folder needs one of them"
        )
    try:
        with _no_class_warning():
            if is_sentencepiece:
                return SentencePieceTokenizer.from_pretrained(str(folder), **_stored_rules(folder))
            # transformers 5 refuses to clean up the text of such tokenizers, and warns of it at every decoding.
            return PreTrainedTokenizerFast.from_pretrained(str(folder), clean_up_tokenization_spaces=False)
    except Exception as error:
        raise UserError(f"the tokenizer in {folder} cannot be read: {error}") from error


def _stored_rules(folder: Path) -> dict[str, Any]:
    """Read what transformers overlooks when a ``tokenizer.json`` stands beside ``tokenizer.model``."""
    path = folder / "tokenizer_config.json"
    stored = json.loads(path.read_text()) if path.is_file() else {}
    return {key: stored[key] for key in ("add_bos_token", "add_eos_token", "legacy") if key in stored}


@contextlib.contextmanager
def _no_class_warning() -> Iterator[None]:
    """Our class reads the files of ``LlamaTokenizer``, which transformers takes for a mistake."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def encode_with_offsets(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[int]]:
    """Tokenize a text.

    Returns:
        Token ids, with the start token where the tokenizer adds one, and for each the place in ``text`` where it
        ends, in characters.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True)
        return encoded["input_ids"], [end for _, end in encoded["offset_mapping"]]
    pieces = tokenizer.tokenize(text)
    ids = tokenizer.build_inputs_with_special_tokens(tokenizer.convert_tokens_to_ids(pieces))
    ends = piece_ends(pieces, text)
    start_count = 1 if getattr(tokenizer, "add_bos_token", False) else 0
    return ids, [0] * start_count + ends + [len(text)] * (len(ids) - len(ends) - start_count)


def piece_ends(pieces: Sequence[str], text: str) -> list[int]:
    """Find where each SentencePiece piece ends in the text, in characters.

    A blank that the tokenizer put before a word is not in the text; ``<0x0A>`` stands for one byte.

    Raises:
        ValueError: if the tokenizer normalises text, so that the pieces do not spell it.
    """
    encoded = text.encode()
    # Character count up to each byte; a character ends with its last byte.
    char_ends = [0]
    for character in text:
        width = len(character.encode())
        char_ends += [char_ends[-1]] * (width - 1) + [char_ends[-1] + 1]
    position, ends = 0, []
    for piece in pieces:
        spelled = _spelling(piece)
        if not encoded.startswith(spelled, position):
            spelled = spelled.removeprefix(b" ")
        if not encoded.startswith(spelled, position):
            raise ValueError(f"the tokenizer's piece {piece!r} does not spell the text at byte {position}")
        position += len(spelled)
        ends.append(char_ends[position])
    return ends


def _spelling(piece: str) -> bytes:
    if _BYTE_PIECE.fullmatch(piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(BLANK, " ").encode()


_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


AutoTokenizer.register(VilaM3Config, tokenizer_class=SentencePieceTokenizer, exist_ok=True)
