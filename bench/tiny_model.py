"""A tiny random Llama with a byte-level tokenizer, in the directory format that the cluster serves: where no weights matter."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_END = "<|endoftext|>"
_LAYERS, _HIDDEN, _INTERMEDIATE, _HEADS, _KV_HEADS = 3, 32, 64, 4, 2


def make_tiny_model(directory: Path, *, max_context: int = 512, seed: int = 0) -> Path:
    """Weights are large, so that logits differ clearly and rounding never decides between two tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate((_END, *alphabet))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([_END])
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": _END}))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _HIDDEN,
        "intermediate_size": _INTERMEDIATE,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": max_context,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(_random_weights(len(vocabulary), torch.Generator().manual_seed(seed)), directory / "model.safetensors")
    return directory


def _random_weights(vocab_size: int, chance: torch.Generator) -> dict[str, torch.Tensor]:
    """By the names that Hugging Face gives them; matrices are [outputs, inputs], float32."""
    head_dim = _HIDDEN // _HEADS
    layer = {
        "self_attn.q_proj": (_HIDDEN, _HIDDEN),
        "self_attn.k_proj": (_KV_HEADS * head_dim, _HIDDEN),
        "self_attn.v_proj": (_KV_HEADS * head_dim, _HIDDEN),
        "self_attn.o_proj": (_HIDDEN, _HIDDEN),
        "mlp.gate_proj": (_INTERMEDIATE, _HIDDEN),
        "mlp.up_proj": (_INTERMEDIATE, _HIDDEN),
        "mlp.down_proj": (_HIDDEN, _INTERMEDIATE),
    }
    shapes = {f"model.layers.{index}.{name}": shape for index in range(_LAYERS) for name, shape in layer.items()}
    shapes |= {"model.embed_tokens": (vocab_size, _HIDDEN), "lm_head": (vocab_size, _HIDDEN)}
    weights = {f"{name}.weight": 0.4 * torch.randn(shape, generator=chance) for name, shape in shapes.items()}
    norms = [
        f"model.layers.{index}.{name}" for index in range(_LAYERS) for name in ("input_layernorm", "post_attention_layernorm")
    ]
    return weights | {f"{name}.weight": torch.ones(_HIDDEN) for name in (*norms, "model.norm")}
