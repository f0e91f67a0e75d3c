"""The floors of bench.engine, counted by hand for the default model's shape."""

import pytest

from bench.engine import Rates, Work
from segue.models.config import ModelConfig, RopeConfig

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=30,
    hidden_size=576,
    num_heads=9,
    num_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=1e5, scaling=None),
    max_context=8192,
    tie_embeddings=True,
    attention_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    eos_token_ids=(2,),
    bos_token_id=1,
)


def test_weights_are_those_of_smollm2() -> None:
    work = Work(CONFIG, dtype_bytes=4)
    assert work.layer_weights == 30 * (576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536)
    assert work.layer_weights + work.head_weights == 134_479_872  # all of 134,515,008 but the norms


def test_a_decode_step_reads_every_weight_once_and_every_context() -> None:
    work = Work(CONFIG, dtype_bytes=4)
    flops, num_bytes = work.decode(batch_size=2, context=10)
    assert num_bytes == 4 * (134_479_872 + 2 * 2 * 10 * 3 * 64 * 30)
    assert flops == 2 * 2 * 134_479_872 + 4 * 2 * 10 * 9 * 64 * 30


def test_the_floor_is_the_slower_of_arithmetic_and_memory() -> None:
    rates = Rates(flops=100.0, bytes=10.0)
    assert rates.floor_s(1000, 20) == pytest.approx(10.0)
    assert rates.floor_s(100, 20) == pytest.approx(2.0)


def test_prefill_computes_the_head_once_and_half_of_all_pairs() -> None:
    work = Work(CONFIG, dtype_bytes=4)
    one, many = work.prefill(1)[0], work.prefill(101)[0]
    assert many - one == 2 * 100 * work.layer_weights + 2 * (101**2 - 1) * 9 * 64 * 30
