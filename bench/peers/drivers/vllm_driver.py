"""vLLM's engine in this process: its own step(), timed.

Sequences that decode get their context's KV from a connector (vllm_filled_kv) instead of from a long prefill; the memory holds
noise, as it does in `bench.engine`. vLLM's own scheduling and greedy sampling are part of a step, as they are of Segue's.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import vllm  # type: ignore[import-not-found]  # only there in the peer's environment

_MAX_SEQUENCES = 64
_MAX_TOKENS = 4352
_WARM_UP_STEPS = 2
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# Requests whose names begin so are taken to have their KV already.
FILLED = "filled"


class VllmDriver:
    def __init__(self, model: str, dtype: str, step_tokens: int, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._format = f"{dtype}, {_quantization(model)}"
        self._engine = vllm.LLM(
            model=model,
            dtype=dtype,
            max_model_len=_MAX_TOKENS,
            max_num_seqs=_MAX_SEQUENCES,
            max_num_batched_tokens=step_tokens,
            block_size=32,
            enable_prefix_caching=False,
            kv_transfer_config={
                "kv_connector": "FilledKV",
                "kv_connector_module_path": "vllm_filled_kv",
                "kv_role": "kv_both",
                # Written once: untouched memory would be one page of zeros, which no real cache is.
                "kv_connector_extra_config": {"startup_fill": True, "fill_mean": 0.0, "fill_std": 0.1},
            },
        ).llm_engine
        self._vocab_size: int = self._engine.model_config.get_vocab_size()
        self._numbers = itertools.count()
        self._draw = random.Random(0)

    def facts(self) -> Mapping[str, str]:
        return {"version": f"vLLM {vllm.__version__}", "format": self._format}

    def prefill_s(self, num_tokens: int) -> float:
        if num_tokens >= _MAX_TOKENS:
            raise ValueError(f"a prompt has at most {_MAX_TOKENS - 1} tokens")
        self._add("prompt", num_tokens, max_tokens=1)
        begin_s = self._now_s()
        while self._engine.has_unfinished_requests():
            self._engine.step()
        return self._now_s() - begin_s

    def decode_steps_s(self, batch_size: int, context: int, num_steps: int) -> list[float]:
        if batch_size > _MAX_SEQUENCES:
            raise ValueError(f"a batch has at most {_MAX_SEQUENCES} sequences")
        names = [self._add(FILLED, context, max_tokens=_WARM_UP_STEPS + num_steps + 1) for _ in range(batch_size)]
        try:
            return [self._step_s(batch_size) for _ in range(_WARM_UP_STEPS + num_steps)][_WARM_UP_STEPS:]
        finally:
            self._engine.abort_request(names, internal=True)
            while self._engine.has_unfinished_requests():
                self._engine.step()

    def _step_s(self, batch_size: int) -> float:
        begin_s = self._now_s()
        outputs = self._engine.step()
        took_s = self._now_s() - begin_s
        if len(outputs) != batch_size:
            raise ValueError(f"a step went on with {len(outputs)} of {batch_size} sequences: the KV memory is too small")
        return took_s

    def _add(self, kind: str, num_tokens: int, max_tokens: int) -> str:
        params = vllm.SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        prompt = {"prompt_token_ids": list(self._tokens(num_tokens))}
        name: str = self._engine.add_request(f"{kind}-{next(self._numbers)}", prompt, params)
        return name

    def _tokens(self, num_tokens: int) -> Iterator[int]:
        return (self._draw.randrange(self._vocab_size) for _ in range(num_tokens))


def _quantization(model: str) -> str:
    from vllm.transformers_utils.config import get_config  # type: ignore[import-not-found]

    config = get_config(model, trust_remote_code=False)
    return str(getattr(config, "quantization_config", {}).get("format", "not quantized"))


def load(options: Mapping[str, Any]) -> VllmDriver:
    return VllmDriver(options["model"], options["dtype"], options["step_tokens"], CLOCKS[options["clock"]])
