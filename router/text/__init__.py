"""Text to tokens and back: the tokenizer, incremental detokenization and stop strings."""

from router.text.chat_template import ChatMessage
from router.text.detokenizer import Detokenizer
from router.text.stop import StopStrings
from router.text.tokenizer import Tokenizer

__all__ = ["ChatMessage", "Detokenizer", "StopStrings", "Tokenizer"]
