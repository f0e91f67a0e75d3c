"""Incremental detokenization of one sequence. Tokens are bytes; a character that is not complete yet is held back by the
UTF-8 decoder, at most three bytes of it, so the cost of a token does not depend on how many came before."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from router.text.vocabulary import Vocabulary


class Detokenizer:
    """Invariant: the pieces of all `push` calls and `finish`, joined, are the text of all tokens.

    Bytes that can never become a character show as U+FFFD. Special tokens show nothing.
    """

    def __init__(self, vocabulary: Vocabulary, *, continues: bool) -> None:
        """`continues`: the tokens go on after other text, so that a leading space belongs to it and is kept."""
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strips_next = vocabulary.strips_leading_space and not continues

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that is certain by now and was not given before."""
        data = b"".join(map(self._vocabulary.visible_bytes, token_ids))
        if self._strips_next and data:
            data = data.removeprefix(b" ")
            self._strips_next = False
        return self._utf8.decode(data)

    def finish(self) -> str:
        """What was held back, once no more tokens come."""
        return self._utf8.decode(b"", True)
