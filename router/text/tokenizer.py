"""A model directory's text side: tokenizer.json, tokenizer_config.json and the chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from router.text.chat_template import ChatMessage, ChatTemplate
from router.text.detokenizer import Detokenizer
from router.text.vocabulary import Vocabulary
from segue.errors import InvalidRequest, ModelFileError

_SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """Text ↔ token ids of one model. Safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, vocabulary: Vocabulary, chat_template: ChatTemplate | None) -> None:
        # A stored truncation would cut prompts without a word.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self.vocabulary = vocabulary
        # One more than the largest token id.
        self.num_token_ids = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @classmethod
    def from_dir(cls, model_dir: Path) -> Tokenizer:
        """Raises ModelFileError naming the file that is missing, damaged or unsupported."""
        file = model_dir / "tokenizer.json"
        text = _read_text(file)
        stored = _parse_object(text, file)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001  # the library raises nothing narrower
            raise ModelFileError(f"{file}: not a tokenizer that can be loaded: {error}") from None
        vocabulary = Vocabulary(backend, stored.get("decoder"), str(file))
        return cls(backend, vocabulary, _load_chat_template(model_dir))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """With the model's own leading special tokens, unless told otherwise."""
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def render_chat(self, messages: Sequence[ChatMessage], now_unix_s: int) -> str:
        """`now_unix_s` is what the template takes for the time.

        Raises InvalidRequest naming `messages` when the template refuses them or the model has none."""
        if self._chat_template is None:
            raise InvalidRequest("messages", "this model has no chat template; send a plain prompt")
        return self._chat_template.render(messages, now_unix_s)

    def encode_chat(self, messages: Sequence[ChatMessage], now_unix_s: int) -> list[int]:
        """The template writes the special tokens itself, so none are added."""
        return self.encode(self.render_chat(messages, now_unix_s), add_special_tokens=False)

    def decode(self, token_ids: Sequence[int]) -> str:
        detokenizer = self.detokenizer(continues=False)
        return detokenizer.push(token_ids) + detokenizer.finish()

    def detokenizer(self, *, continues: bool) -> Detokenizer:
        """A fresh one, for one sequence; `continues` as in Detokenizer."""
        return Detokenizer(self.vocabulary, continues=continues)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise ModelFileError(f"cannot read {file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelFileError(f"{file}: not UTF-8 text") from None


def _parse_object(text: str, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelFileError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFileError(f"{file}: not a JSON object")
    return value


def _load_chat_template(model_dir: Path) -> ChatTemplate | None:
    """chat_template.jinja comes before the template in tokenizer_config.json. None when there is neither."""
    config_file, template_file = model_dir / "tokenizer_config.json", model_dir / "chat_template.jinja"
    config = _parse_object(_read_text(config_file), config_file) if config_file.exists() else {}
    special_tokens = _special_tokens(config)
    if template_file.exists():
        return ChatTemplate(_read_text(template_file), special_tokens, str(template_file))
    source = _default_template(config.get("chat_template"), config_file)
    return None if source is None else ChatTemplate(source, special_tokens, str(config_file))


def _default_template(stored: object, file: Path) -> str | None:
    """The template, which may stand in a list of named ones."""
    if isinstance(stored, list):
        named = {entry.get("name"): entry.get("template") for entry in stored if isinstance(entry, dict)}
        stored = named.get("default")
    if stored is not None and not isinstance(stored, str):
        raise ModelFileError(f"{file}: chat_template is neither text nor a list of named templates")
    return stored


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in _SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            tokens[name] = content
    return tokens
