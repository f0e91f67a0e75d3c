"""The bytes that each token stands for, read from the `decoder` of tokenizer.json.

Two kinds exist in the model families that Segue serves:

    byte level (Llama 3, Qwen, SmolLM2)   each character of a token stands for one byte
    sentence piece (Llama 2, Mistral)     "▁" is a space, tokens such as <0xE2> are single bytes; text that starts
                                          anew loses one leading space
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import tokenizers

from segue.errors import ModelFileError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SENTENCE_PIECE_STEPS = frozenset({"Replace", "ByteFallback", "Fuse", "Strip"})


def byte_level_alphabet() -> dict[str, int]:
    """Character → byte. Printable bytes stand for themselves, the others, in order, for the characters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in alphabet.values())
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


class Vocabulary:
    """Token id → bytes. Looked up once for each token, then remembered: a vocabulary is bounded."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, decoder: Mapping[str, Any] | None, file_name: str) -> None:
        """`decoder` is that part of tokenizer.json. Raises ModelFileError for a decoder of another kind."""
        steps = _decoder_steps(decoder)
        kinds = {step.get("type") for step in steps}
        self._tokenizer = tokenizer
        self._alphabet = byte_level_alphabet() if kinds == {"ByteLevel"} else None
        if self._alphabet is None and not (kinds and kinds <= _SENTENCE_PIECE_STEPS):
            names = ", ".join(sorted(map(str, kinds))) or "none"
            raise ModelFileError(f"{file_name}: decoder {names} is not supported; byte-level and sentence-piece decoders are")
        self.strips_leading_space = any(step.get("type") == "Strip" and step.get("start", 0) > 0 for step in steps)
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._known: dict[int, bytes] = {}

    def token_bytes(self, token_id: int) -> bytes:
        """Raw bytes of one token, special tokens included; empty for an id that the tokenizer does not have."""
        if (known := self._known.get(token_id)) is None:
            known = self._known[token_id] = self._look_up(token_id)
        return known

    def visible_bytes(self, token_id: int) -> bytes:
        """Like `token_bytes`, but special tokens show nothing."""
        return b"" if token_id in self.special_token_ids else self.token_bytes(token_id)

    def _look_up(self, token_id: int) -> bytes:
        if (added := self._added.get(token_id)) is not None:
            return added
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None:
            spelled = [self._alphabet.get(character) for character in token]
            # A token outside the alphabet is text as it stands.
            return token.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()


def _decoder_steps(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [inner for step in decoder.get("decoders", []) for inner in _decoder_steps(step)]
