"""config.json as transformers 4 and 5 write it, and what is refused, with file and field named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from segue.errors import ModelFileError
from segue.models.config import LinearScaling, Llama3Scaling, ModelConfig, RopeConfig

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
MISSING = object()


@pytest.fixture
def read(tmp_path: Path):
    def read(architecture: str = "Llama", generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
        values = LLAMA | {"architectures": [f"{architecture}ForCausalLM"]} | changes
        values = {name: value for name, value in values.items() if value is not MISSING}
        (tmp_path / "config.json").write_text(json.dumps(values))
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return ModelConfig.from_dir(tmp_path)

    return read


def test_plain_llama(read):
    assert read() == ModelConfig(
        architecture="LlamaForCausalLM",
        num_layers=3,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        intermediate_size=96,
        vocab_size=100,
        rms_norm_eps=1e-5,
        rope=RopeConfig(10000.0),
        max_context=2048,
        tie_embeddings=False,
        attention_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        eos_token_ids=(2,),
        bos_token_id=1,
    )


def test_what_the_architectures_differ_in(read):
    llama = read(attention_bias=True, mlp_bias=True, num_key_value_heads=None, head_dim=None, tie_word_embeddings=True)
    assert (llama.attention_bias, llama.attention_output_bias, llama.mlp_bias, llama.tie_embeddings) == (True,) * 4
    assert (llama.num_kv_heads, llama.head_dim) == (4, 16)
    qwen2 = read("Qwen2", attention_bias=False)
    assert (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.qk_norm) == (True, False, False)
    assert (qwen2.eos_token_ids, qwen2.bos_token_id) == ((), None)
    qwen3 = read("Qwen3", head_dim=24)
    assert (qwen3.attention_bias, qwen3.attention_output_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 24)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 500000.0, "rope_scaling": None}, RopeConfig(500000.0)),
        ({"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}, RopeConfig(500000.0)),
        ({"rope_theta": 7, "rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(7.0, LinearScaling(2.0))),
        (
            {"rope_theta": 9.5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
            RopeConfig(9.5, Llama3Scaling(8.0, 1.0, 4.0, 512)),
        ),
        (
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 9.5}},
            RopeConfig(9.5, Llama3Scaling(8.0, 1.0, 4.0, 512)),
        ),
    ],
)
def test_rope_in_both_styles(fields, expected, read):
    assert read(**fields).rope == expected


@pytest.mark.parametrize(
    ("architecture", "fields", "max_context"),
    [
        ("Mistral", {"sliding_window": 300}, 300),
        ("Mistral", {"sliding_window": 5000}, 2048),
        ("Mistral", {"sliding_window": None}, 2048),
        # transformers takes 4096 for a Mistral that does not say.
        ("Mistral", {"max_position_embeddings": 9000}, 4096),
        ("Qwen2", {"sliding_window": 300, "use_sliding_window": True}, 300),
        ("Qwen2", {"sliding_window": 300, "use_sliding_window": False}, 2048),
        ("Llama", {"sliding_window": 300}, 2048),
    ],
)
def test_a_sliding_window_limits_the_context(architecture, fields, max_context, read):
    assert read(architecture, **fields).max_context == max_context


def test_end_of_sequence_tokens(read):
    assert read(eos_token_id=[5, 6, 5]).eos_token_ids == (5, 6)
    assert read(eos_token_id=None, bos_token_id=None).eos_token_ids == ()
    assert read(eos_token_id=5, bos_token_id=0, generation={"eos_token_id": [8, 9]}).eos_token_ids == (8, 9)
    assert read(eos_token_id=5, generation={"temperature": 0.6}).eos_token_ids == (5,)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, MISSING) for name in LLAMA if name not in {"torch_dtype", "num_key_value_heads"}),
        ("architectures", ["GPT2LMHeadModel"]),
        ("architectures", "LlamaForCausalLM"),
        ("hidden_size", "64"),
        ("hidden_size", 64.0),
        ("hidden_size", True),
        ("num_hidden_layers", 0),
        ("vocab_size", -1),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 0),
        ("head_dim", 15),
        ("rms_norm_eps", "1e-5"),
        ("rms_norm_eps", 0),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", 10**400),
        ("tie_word_embeddings", 1),
        ("attention_bias", "yes"),
        ("hidden_act", "gelu"),
        ("quantization_config", {"quant_method": "awq"}),
        ("layer_types", ["linear_attention"]),
        ("layer_types", 3),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [2, -1]),
        ("bos_token_id", 1.5),
        ("rope_theta", "big"),
        ("rope_scaling", "linear"),
        ("rope_scaling.rope_type", {"type": "yarn", "factor": 4.0}),
        ("rope_scaling.rope_type", {"factor": 4.0}),
        ("rope_scaling.factor", {"type": "linear"}),
        ("rope_scaling.high_freq_factor", LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 1.0}),
        ("rope_parameters.partial_rotary_factor", {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ("rope_parameters.rope_type", {"full_attention": {"rope_theta": 1e4, "rope_type": "default"}}),
    ],
)
def test_bad_fields_are_named(field, value, read):
    with pytest.raises(ModelFileError, match=rf"config\.json: {field}: ") as raised:
        read(**{field.split(".", maxsplit=1)[0]: value})
    assert raised.value.field == field


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000])
def test_a_file_that_is_no_json_object_is_named(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelFileError, match=r"config\.json"):
        ModelConfig.from_dir(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"cannot read .*config\.json"):
        ModelConfig.from_dir(tmp_path)


def test_bad_generation_config_is_named(read):
    with pytest.raises(ModelFileError, match=r"generation_config\.json: eos_token_id"):
        read(generation={"eos_token_id": "x"})
