"""The tokenizer out of a GGUF file gives the tokens that the model was trained on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from segue.models.gguf_file import GgufFile
from segue.models.gguf_tokenizer import build_tokenizer
from tests.support.gguf_files import TinyGguf, vocabulary

TEXTS = [
    "",
    " ",
    "the the  the\n\nthe",
    "def area(radius):\n    return 3.14159 * radius ** 2  # μ\n\t\tend\r\n",
    "I'LL say it's 1234567 o'clock, don't we've they're",
    "日本語のテキスト、中文文本。한국어 العربية עברית ไทย",
    "😀👩‍👩‍👧‍👦🏳️‍🌈 café cafe\u0301 ﬁne",
    "a   b\t\t c \n \n\n   d  ",
    "½ ² ٣٤ Ⅷ 12 345",
    "\u00a0\u2003\u200b\ufeff",
    "x=1;y=[2,3]{'k':\"v\"}//~~``__",
]


def tiny_tokenizer(tmp_path: Path, **keys: Any) -> Tokenizer:
    path = TinyGguf("llama", keys={f"tokenizer.ggml.{name}": value for name, value in keys.items()}).write(tmp_path / "a.gguf")
    return build_tokenizer(GgufFile(path))


def test_vocabulary_and_ids_are_carried_over(tmp_path: Path) -> None:
    tokens, _ = vocabulary()
    tokenizer = tiny_tokenizer(tmp_path)
    expected = {token: index for index, token in enumerate(tokens) if token != "[unused]"}
    assert tokenizer.get_vocab() == expected
    assert tokenizer.encode(" the").tokens == ["Ġthe"]


def test_control_tokens_are_special_and_those_of_users_are_not(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    encoded = tokenizer.encode("<|start|>the<tool><|end|>")
    assert encoded.tokens == ["<|start|>", "the", "<tool>", "<|end|>"]
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "the<tool>"
    assert tokenizer.decode(encoded.ids, skip_special_tokens=False) == "<|start|>the<tool><|end|>"


def test_every_text_comes_back(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path, pre="smollm")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["3", "123", "Ċ", "Ċ", "the"]),
        ("smollm", ["3", "1", "2", "3", "Ċ", "Ċ", "the"]),
        ("llama-bpe", ["3", "12", "3", "ĊĊ", "the"]),
        ("qwen2", ["3", "1", "2", "3", "ĊĊ", "the"]),
    ],
)
def test_text_is_split_as_the_model_wants_it(pre: str, expected: list[str], tmp_path: Path) -> None:
    assert tiny_tokenizer(tmp_path, pre=pre).encode("3123\n\nthe", add_special_tokens=False).tokens == expected


def test_llama_3_takes_whole_pieces_and_begins_with_its_first_token(tmp_path: Path) -> None:
    tokens, types = vocabulary()
    # A token that no merge leads to.
    keys = {
        "tokens": [*tokens, "xyz"],
        "token_type": [*types, 1],
        "add_bos_token": None,
        "bos_token_id": tokens.index("<|start|>"),
    }
    llama = tiny_tokenizer(tmp_path, pre="llama-bpe", **keys)
    assert llama.encode("xyz").tokens == ["<|start|>", "xyz"]
    assert llama.encode("xyz", add_special_tokens=False).tokens == ["xyz"]
    assert tiny_tokenizer(tmp_path, pre="qwen2", **keys).encode("xyz").tokens == ["x", "y", "z"]


def test_tokens_around_a_text_are_added_where_the_file_says_so(tmp_path: Path) -> None:
    both = tiny_tokenizer(tmp_path, add_bos_token=True, add_eos_token=True)
    assert both.encode("the").tokens == ["<|start|>", "the", "<|end|>"]
    assert both.encode("the", "12").tokens == ["<|start|>", "the", "<|end|>", "<|start|>", "1", "2", "<|end|>"]
    assert tiny_tokenizer(tmp_path).encode("the").tokens == ["the"]


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_transformers_reads_the_same_tokenizer(pre: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = tiny_tokenizer(tmp_path, pre=pre)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    for text in [*TEXTS, "<|start|>the <tool>é<|end|>"]:
        # Qwen's own tokenizer composes characters first (NFC); a GGUF file does not say so, and transformers does not do it.
        composed = ours.normalizer.normalize_str(text) if ours.normalizer else text
        assert ours.encode(text, add_special_tokens=False).ids == theirs(composed, add_special_tokens=False)["input_ids"], text


# Given by transformers' reading of the same GGUF file with SmolLM2's own splitting: single digits, then GPT-2's pattern.
REAL_TOKENS = {
    "def area(r):\n    return 3.14 * r ** 2  # μ\n\t\tend\r\n": (
        [
            1604,
            1557,
            24,
            98,
            727,
            472,
            1003,
            216,
            35,
            30,
            33,
            36,
            1672,
            412,
            1903,
            216,
            34,
            216,
            907,
            17820,
            3354,
            197,
            486,
            2738,
        ]
    ),
    "I'LL say it's 1234 o'clock": [57, 23, 16421, 1643, 357, 506, 216, 33, 34, 35, 36, 263, 23, 17466],
    "日本語、中文。العربية": [
        *(23274, 115, 40993, 179, 120, 248, 29917, 28589, 29184, 19076, 22208, 34966, 20602, 31462, 23339, 43463)
    ],
    "😀👩\u200d👩\u200d👧 café": [
        10813,
        242,
        218,
        10813,
        235,
        119,
        321,
        231,
        10813,
        235,
        119,
        321,
        231,
        10813,
        235,
        117,
        37366,
    ],
    "a   b\t\t c \n \n\n   d  ": [81, 256, 278, 1656, 265, 3717, 38028, 256, 287, 256],
    "½ ² ٣٤ Ⅷ 12": [16738, 216, 19133, 216, 164, 113, 164, 114, 216, 173, 223, 117, 216, 33, 34],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
}


@pytest.mark.parametrize("text", REAL_TOKENS)
def test_the_real_models_tokens(text: str, real_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(real_model_dir / "tokenizer.json"))
    assert tokenizer.encode(text).ids == REAL_TOKENS[text]


def test_the_real_models_special_tokens(real_model_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(real_model_dir / "tokenizer.json"))
    assert [tokenizer.id_to_token(index) for index in range(3)] == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert sum(item.special for item in tokenizer.get_added_tokens_decoder().values()) == 17
    assert tokenizer.encode("Hello world").tokens == ["Hello", "Ġworld"]
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_real_models_vocabulary_is_carried_over_whole(real_model_dir: Path) -> None:
    """Against digests of what stands in the GGUF file of the pinned package."""
    model = json.loads((real_model_dir / "tokenizer.json").read_bytes())["model"]
    assert list(model["vocab"].values()) == list(range(49152))
    assert digest("\n".join(model["vocab"])) == "d1f2ce856b324081"
    assert digest("\n".join(" ".join(merge) for merge in model["merges"])) == "aea6ed50becdb3be"
    config = json.loads((real_model_dir / "tokenizer_config.json").read_bytes())
    assert digest(config["chat_template"]) == "872be49dbb638044"
    assert (config["bos_token"], config["eos_token"], config["unk_token"]) == ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
