"""Tokens to text and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from router.text import ChatMessage, StopStrings, Tokenizer
from segue.errors import InvalidRequest, ModelFileError


def backend_of(model_dir: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def test_encode_and_decode_agree_with_the_library(tokenizer: Tokenizer, model_dir: Path) -> None:
    text = "the quick grüße 世界 🦊 answer"
    assert tokenizer.encode(text) == backend_of(model_dir).encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_stored_truncation_does_not_cut_prompts(model_dir: Path, tmp_path: Path) -> None:
    backend = backend_of(model_dir)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert len(Tokenizer.from_dir(tmp_path).encode("quick " * 20)) > 20


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_joined_are_the_text_of_all_tokens(data: st.DataObject, tokenizer: Tokenizer, model_dir: Path) -> None:
    """Whatever the tokens, incomplete and impossible characters included."""
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.num_token_ids + 2), max_size=40))
    detokenizer = tokenizer.detokenizer(continues=True)
    pieces = [detokenizer.push([token_id]) for token_id in token_ids]
    joined = "".join(pieces) + detokenizer.finish()
    assert joined == backend_of(model_dir).decode(token_ids, skip_special_tokens=True)


@given(text=st.text(max_size=60))
@settings(max_examples=150, deadline=None)
def test_pieces_never_show_a_broken_character(text: str, tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer(continues=True)
    so_far = ""
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        so_far += detokenizer.push([token_id])
        assert text.startswith(so_far)
    assert so_far + detokenizer.finish() == text


def test_a_character_split_over_tokens_appears_once_complete(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("🦊")
    assert len(token_ids) == 4
    detokenizer = tokenizer.detokenizer(continues=True)
    assert [detokenizer.push([token_id]) for token_id in token_ids] == ["", "", "", "🦊"]


def test_what_is_held_back_does_not_grow(tokenizer: Tokenizer) -> None:
    """The state after any number of tokens is at most the three bytes of an incomplete character."""
    detokenizer = tokenizer.detokenizer(continues=True)
    lead, *continuation = tokenizer.encode("🦊")
    for token_id in [lead] * 50 + continuation[:2] * 50 + [lead, *continuation[:2]]:
        detokenizer.push([token_id])
        held, _ = detokenizer._utf8.getstate()
        assert len(held) <= 3
    assert len(held) == 3


def test_special_tokens_show_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([0, *tokenizer.encode("fox"), 1]) == "fox"


class SentencePiece:
    """A tokenizer of the kind that Llama 2 and Mistral have."""

    TOKENS = ("<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁", "fox", "▁fox")

    @classmethod
    def write(cls, directory: Path) -> Tokenizer:
        backend = tokenizers.Tokenizer(
            models.BPE({token: place for place, token in enumerate(cls.TOKENS)}, [], byte_fallback=True, unk_token="<unk>")
        )
        backend.add_special_tokens(["<unk>", "<s>", "</s>"])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        backend.save(str(directory / "tokenizer.json"))
        return Tokenizer.from_dir(directory)

    @classmethod
    def ids(cls, *tokens: str) -> list[int]:
        return [cls.TOKENS.index(token) for token in tokens]


def test_sentence_piece_tokens_agree_with_the_library(tmp_path: Path) -> None:
    tokenizer = SentencePiece.write(tmp_path)
    token_ids = SentencePiece.ids("<s>", "▁the", "▁fox", "▁", "<0xE4>", "<0xB8>", "<0x96>", "fox", "</s>")
    assert tokenizer.decode(token_ids) == backend_of(tmp_path).decode(token_ids) == "the fox 世fox"


def test_sentence_piece_keeps_the_space_of_a_continued_text(tmp_path: Path) -> None:
    tokenizer = SentencePiece.write(tmp_path)
    assert tokenizer.detokenizer(continues=True).push(SentencePiece.ids("▁the", "▁fox")) == " the fox"
    assert tokenizer.detokenizer(continues=False).push(SentencePiece.ids("▁the", "▁fox")) == "the fox"


def test_chat_is_rendered_with_the_template(tokenizer: Tokenizer) -> None:
    messages = [ChatMessage("system", "Be brief."), ChatMessage("user", "Hello")]
    rendered = tokenizer.render_chat(messages, 0)
    assert rendered == "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.encode_chat(messages, 0)[0] == 0


def test_a_template_that_refuses_names_messages(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="the assistant may not begin") as caught:
        tokenizer.render_chat([ChatMessage("assistant", "Hi")], 0)
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    ("source", "rendered"),
    [
        ("{{ messages | tojson }}", '[{"role": "user", "content": "grüß <dich>"}]'),
        ("{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{% endfor %}x", "x"),
        ("{% generation %}{{ messages[0].role }}{% endgeneration %}", "user"),
        ("{% if true %}\n  {% set x = 1 %}\nx={{ x }}{% endif %}", "x=1"),
        ("{{ strftime_now('%Y') }}{% macro year() %}{{ strftime_now('%y') }}{% endmacro %}{{ year() }}", "200101"),
    ],
)
def test_what_templates_rely_on(source: str, rendered: str, model_dir: Path, tmp_path: Path) -> None:
    """A chat_template.jinja file comes before the one in tokenizer_config.json."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((model_dir / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(source)
    assert Tokenizer.from_dir(tmp_path).render_chat([ChatMessage("user", "grüß <dich>")], 10**9) == rendered


def test_templates_run_in_a_sandbox(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(InvalidRequest):
        Tokenizer.from_dir(tmp_path).render_chat([ChatMessage("user", "x")], 0)


def test_a_named_default_template_is_found(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_dir(tmp_path).render_chat([], 0) == "yes"


def test_without_a_template_chats_are_refused(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    with pytest.raises(InvalidRequest, match="no chat template"):
        Tokenizer.from_dir(tmp_path).render_chat([], 0)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tokenizer.json", None, "cannot read"),
        ("tokenizer.json", b"\xff", "not UTF-8"),
        ("tokenizer.json", b"{", "not valid JSON"),
        ("tokenizer.json", b"[]", "not a JSON object"),
        ("tokenizer.json", b'{"model": 3}', "not a tokenizer"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "neither text nor a list"),
        ("chat_template.jinja", b"{% if %}", "line 1"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes | None, problem: str, model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=problem) as caught:
        Tokenizer.from_dir(tmp_path)
    assert name in caught.value.message


def test_a_decoder_of_another_kind_is_refused(model_dir: Path, tmp_path: Path) -> None:
    backend = backend_of(model_dir)
    backend.decoder = decoders.WordPiece()
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ModelFileError, match="WordPiece"):
        Tokenizer.from_dir(tmp_path)


def first_complete_stop(text: str, stop: list[str]) -> int | None:
    """Where the text is cut: before the stop string that ends first, the longest of those that end together."""
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    return min(ends)[1] if ends else None


SHORT = st.text(alphabet="abc", max_size=3)


@given(pieces=st.lists(SHORT, max_size=12), stop=st.lists(st.text("abc", min_size=1, max_size=5), max_size=4))
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_where_find_says(pieces: list[str], stop: list[str]) -> None:
    stops = StopStrings(stop)
    shown = ""
    for piece in pieces:
        shown += stops.push(piece)
        if stops.found:
            break
    else:
        shown += stops.finish()
    text = "".join(pieces)
    cut = first_complete_stop(text, stop)
    assert stops.found == (cut is not None)
    assert shown == (text if cut is None else text[:cut])


@given(pieces=st.lists(SHORT, max_size=12), stop=st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_no_more_is_held_back_than_may_become_a_stop_string(pieces: list[str], stop: list[str]) -> None:
    stops = StopStrings(stop)
    shown = text = ""
    for piece in pieces:
        text += piece
        shown += stops.push(piece)
        if stops.found:
            return
        held = text[len(shown) :]
        assert shown + held == text
        assert not held or any(s.startswith(held) for s in stop)
