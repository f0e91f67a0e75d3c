"""The table of bench.engine: its floors, counted by hand for the default model's shape, and its ratios."""

import pytest

from bench.engine import Case, Contender, make_cases, make_rows, measure
from bench.floor import Rates, Work
from bench.peers.client import PeerCannot
from segue.errors import ConfigError
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
    work = Work(CONFIG, weight_bytes=4, head_bytes=4, kv_bytes=4)
    assert work.layer_weights == 30 * (576 * 576 * 2 + 576 * 192 * 2 + 3 * 576 * 1536)
    assert work.layer_weights + work.head_weights == 134_479_872  # all of 134,515,008 but the norms


def test_a_decode_step_reads_every_weight_once_and_every_context() -> None:
    work, memory_bound = (
        Work(CONFIG, weight_bytes=1, head_bytes=1, kv_bytes=2),
        Rates(product_ops=1e30, float_ops=1e30, bytes=1.0),
    )
    assert work.decode_floor_s(2, 10, memory_bound) == 134_479_872 + 2 * 2 * 2 * 10 * 3 * 64 * 30
    compute_bound = Rates(product_ops=2.0, float_ops=1.0, bytes=1e30)
    assert work.decode_floor_s(2, 10, compute_bound) == 2 * 134_479_872 + 4 * 2 * 10 * 9 * 64 * 30


def test_prefill_computes_the_head_once_and_half_of_all_pairs() -> None:
    work, rates = Work(CONFIG, weight_bytes=1, head_bytes=1, kv_bytes=4), Rates(product_ops=2.0, float_ops=1.0, bytes=1e30)
    one, many = work.prefill_floor_s(1, rates), work.prefill_floor_s(101, rates)
    assert many - one == 100 * work.layer_weights + 2 * (101**2 - 1) * 9 * 64 * 30
    assert work.prefill_floor_s(1, Rates(1e30, 1e30, 1.0)) == 134_479_872


def test_ratios_are_to_the_fastest_format_of_each_peer() -> None:
    case = Case("decode_b1_ctx64_tok_s", 1, 64)
    own = [Contender("int8", _nothing, {case.metric: [30.0, 10.0, 20.0]}), Contender("int4", _nothing, {case.metric: [40.0]})]
    peers = [
        Contender("vllm_f32", _nothing, {case.metric: [5.0]}),
        Contender("vllm_w8a8", _nothing, {case.metric: [10.0]}),
        Contender("llama_cpp_q4_0", _nothing, {}),
    ]
    floors = {"int8": {case.metric: 40.0}, "int4": {case.metric: 80.0}}
    first, second, *others = make_rows([case], own, peers, floors)
    assert (first.metric, first.value) == (case.metric, 20.0)
    assert first.ratio_to == {"floor": 0.5, "vllm_f32": 4.0, "vllm_w8a8": 2.0, "vllm_best": 2.0}
    assert (second.metric, second.ratio_to["floor"]) == (f"{case.metric}_int4", 0.5)
    assert [(row.metric, row.value) for row in others] == [(f"{case.metric}_vllm_f32", 5.0), (f"{case.metric}_vllm_w8a8", 10.0)]


def test_cases_are_chosen_by_how_their_metrics_begin() -> None:
    assert len(make_cases([])) == 3 + 4 * 3
    chosen = make_cases(["prefill_1024", "decode_b1_"])
    assert [case.metric.removesuffix("_tok_s") for case in chosen] == [
        "prefill_1024",
        *("decode_b1_ctx64", "decode_b1_ctx256", "decode_b1_ctx1024"),
    ]
    with pytest.raises(ConfigError, match="cases"):
        make_cases(["decode_b5"])


async def test_contenders_take_turns_and_what_a_peer_cannot_do_is_left_out() -> None:
    order: list[str] = []

    def contender(name: str, seconds: float) -> Contender:
        async def measured(case: Case) -> float:
            order.append(f"{name} {case.metric}")
            if seconds == 0:
                raise PeerCannot("too long")
            return seconds

        return Contender(name, measured)

    ours, theirs = contender("ours", 2.0), contender("theirs", 0.0)
    await measure([ours, theirs], [Case("p", 0, 100), Case("d", 4, 64)], 2, lambda _: None)
    assert order == ["ours p", "theirs p", "ours d", "theirs d"] * 2
    assert ours.runs == {"p": [50.0, 50.0], "d": [2.0, 2.0]}
    assert theirs.runs == {}


async def _nothing(_case: Case) -> float:
    return 1.0
