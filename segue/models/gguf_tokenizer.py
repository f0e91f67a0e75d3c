"""From a GGUF file's vocabulary to tokenizer.json and tokenizer_config.json: byte-level BPE, as all supported models use it.

A GGUF file names the way text is split before BPE (`tokenizer.ggml.pre`) and does not carry it. Each name below stands for what
the models' own tokenizer.json has; an unknown one is refused, since a wrong split gives other tokens without any error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from segue.models.gguf_file import GgufFile

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
_IGNORED_SPECIALS = (-1, 2**32 - 1)

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _smollm() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> pre_tokenizers.PreTokenizer:
    return _split_by(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}{{1,3}}|{_OTHERS}")


def _qwen2() -> pre_tokenizers.PreTokenizer:
    return _split_by(rf"{_CONTRACTIONS}|{_WORDS}|\p{{N}}|{_OTHERS}")


@dataclass(frozen=True, slots=True)
class _Splitting:
    """`ignore_merges`: a piece that is a token as a whole is that token, whatever the merges say."""

    build: Callable[[], pre_tokenizers.PreTokenizer]
    normalize_nfc: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


_LLAMA3 = _Splitting(_llama3, ignore_merges=True, adds_bos=True)
_SPLITTINGS = {
    "gpt-2": _Splitting(_gpt2),
    "smollm": _Splitting(_smollm),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _Splitting(_qwen2, normalize_nfc=True),
}


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Token ids that the metadata names. `eos` holds every token that ends an answer, the main one first."""

    bos: int | None
    eos: tuple[int, ...]
    unknown: int | None
    padding: int | None
    add_bos: bool
    add_eos: bool


def special_tokens(file: GgufFile) -> SpecialTokens:
    """Raises ModelFileError when an id is outside the vocabulary, or when there is no end-of-sequence token."""
    splitting = _splitting(file)
    eos = [_token_id(file, f"{name}_token_id") for name in ("eos", "eot", "eom")]
    if eos[0] is None:
        raise file.error("the metadata key tokenizer.ggml.eos_token_id is missing", field="tokenizer.ggml.eos_token_id")
    found = SpecialTokens(
        bos=_token_id(file, "bos_token_id"),
        eos=tuple(dict.fromkeys(token_id for token_id in eos if token_id is not None)),
        unknown=_token_id(file, "unknown_token_id"),
        padding=_token_id(file, "padding_token_id"),
        add_bos=file.optional("tokenizer.ggml.add_bos_token", bool, splitting.adds_bos),
        add_eos=file.optional("tokenizer.ggml.add_eos_token", bool, False),
    )
    if found.add_bos and found.bos is None:
        raise file.error("tokenizer.ggml.add_bos_token is set, but tokenizer.ggml.bos_token_id is missing")
    return found


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer of `file`. Raises ModelFileError for vocabularies and splittings that are damaged or not supported."""
    if (kind := file.require("tokenizer.ggml.model", str)) != "gpt2":
        raise file.error(
            f"the tokenizer kind {kind!r} is not supported, only 'gpt2' (byte-level BPE); "
            "use the model's Hugging Face directory instead",
            field="tokenizer.ggml.model",
        )
    splitting, specials = _splitting(file), special_tokens(file)
    tokens, types = _vocabulary(file)
    vocab = {token: index for index, token in enumerate(tokens) if types[index] != _UNUSED}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=_merges(file, vocab), ignore_merges=splitting.ignore_merges))
    if splitting.normalize_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting.build()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = _post_processor(tokens, specials)
    tokenizer.add_tokens(
        [
            AddedToken(token, normalized=False, special=token_type == _CONTROL)
            for token, token_type in zip(tokens, types, strict=True)
            if token_type in {_CONTROL, _USER_DEFINED}
        ]
    )
    return tokenizer


def tokenizer_config(file: GgufFile, max_length: int) -> dict[str, Any]:
    """The tokenizer_config.json of `file`; `max_length` in tokens."""
    specials = special_tokens(file)
    tokens = file.require("tokenizer.ggml.tokens", list)
    named = {
        "bos_token": specials.bos,
        "eos_token": specials.eos[0],
        "unk_token": specials.unknown,
        "pad_token": specials.padding,
    }
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": specials.add_bos,
        "add_eos_token": specials.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    config |= {name: None if token_id is None else tokens[token_id] for name, token_id in named.items()}
    if template := file.optional("tokenizer.chat_template", str, ""):
        config["chat_template"] = template
    return config


def _splitting(file: GgufFile) -> _Splitting:
    name = file.require("tokenizer.ggml.pre", str)
    if name not in _SPLITTINGS:
        known = ", ".join(_SPLITTINGS)
        raise file.error(
            f"the way of splitting text {name!r} (tokenizer.ggml.pre) is not supported, only {known}; "
            "use the model's Hugging Face directory instead",
            field="tokenizer.ggml.pre",
        )
    return _SPLITTINGS[name]


def _token_id(file: GgufFile, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}"
    token_id = file.optional(key, int, -1)
    if token_id in _IGNORED_SPECIALS:
        return None
    if not 0 <= token_id < len(file.require("tokenizer.ggml.tokens", list)):
        raise file.error(f"{key} is {token_id}, which is outside the vocabulary", field=key)
    return token_id


def _vocabulary(file: GgufFile) -> tuple[list[str], list[int]]:
    """Every token's text and type, in the order of their ids."""
    tokens = file.require("tokenizer.ggml.tokens", list)
    types = file.require("tokenizer.ggml.token_type", list)
    if not tokens or not all(isinstance(token, str) for token in tokens):
        raise file.error("tokenizer.ggml.tokens must be a list of texts", field="tokenizer.ggml.tokens")
    if len(types) != len(tokens) or not all(type(token_type) is int for token_type in types):
        raise file.error(f"tokenizer.ggml.token_type must be a list of {len(tokens)} whole numbers, one for each token")
    if len(set(tokens)) != len(tokens):
        raise file.error("tokenizer.ggml.tokens holds the same token twice; the file is damaged", field="tokenizer.ggml.tokens")
    return tokens, types


def _merges(file: GgufFile, vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for merge in file.require("tokenizer.ggml.merges", list):
        parts = merge.split(" ") if isinstance(merge, str) else []
        if len(parts) != 2:
            raise file.error(f"tokenizer.ggml.merges holds {merge!r}, which is not a pair", field="tokenizer.ggml.merges")
        left, right = parts
        if not (left in vocab and right in vocab and left + right in vocab):
            raise file.error(f"tokenizer.ggml.merges holds {merge!r}, whose tokens are not all in the vocabulary")
        merges.append((left, right))
    return merges


def _post_processor(tokens: list[str], specials: SpecialTokens) -> processors.PostProcessor:
    bos = tokens[specials.bos] if specials.add_bos and specials.bos is not None else None
    eos = tokens[specials.eos[0]] if specials.add_eos else None
    byte_level = processors.ByteLevel(trim_offsets=False)
    added = [token for token in (bos, eos) if token is not None]
    if not added:
        return byte_level
    one = [token for token in (bos, "$A", eos) if token is not None]
    other = [token for token in (bos, "$B", eos) if token is not None]
    template = processors.TemplateProcessing(
        single=one,
        pair=one + [f"{piece}:1" for piece in other],
        special_tokens=[(token, tokens.index(token)) for token in added],
    )
    return processors.Sequence([byte_level, template])
