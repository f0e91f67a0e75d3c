"""llama.cpp through its C interface, one thread: llama_decode() of a batch, timed; no sampling is part of it.

Every sequence has KV memory of its own. A context is prefilled once; its state is then copied into as many sequences as a batch
has, for what it holds does not change how long a step takes.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp  # type: ignore[import-not-found]  # only there in the peer's environment

_MICRO_BATCH = 512
_WARM_UP_STEPS = 2
_LOG_ERROR = 4
_STATE_HEADER = struct.Struct("=III")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class LlamaCppDriver:
    def __init__(self, model_file: str, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(model_file.encode(), params)
        if not self._model:
            raise OSError(f"llama.cpp cannot load {model_file}")
        self._vocab_size: int = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._draw = random.Random(0)
        # (Sequences, tokens in each) of a measurement → whether flash attention is the faster way there.
        self._prefers_flash: dict[tuple[int, int], bool] = {}
        # Tokens in it, whether computed with flash attention (which lays V out otherwise) → the state of a lone sequence.
        self._states: dict[tuple[int, bool], bytes] = {}

    def facts(self) -> Mapping[str, str]:
        description = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._model, description, len(description))
        return {
            "version": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
            "format": description.value.decode(),
            "build": llama_cpp.llama_print_system_info().decode(),
        }

    def prefill_s(self, num_tokens: int) -> float:
        return self._faster((0, num_tokens), lambda flash: [self._prefill_s(num_tokens, flash)])[0]

    def decode_steps_s(self, batch_size: int, context: int, num_steps: int) -> list[float]:
        return self._faster((batch_size, context), lambda flash: self._decode_steps_s(batch_size, context, num_steps, flash))

    def _faster(self, shape: tuple[int, int], measure: Callable[[bool], list[float]]) -> list[float]:
        """Measured with and without flash attention the first time, then the better way: neither is better everywhere."""
        if shape in self._prefers_flash:
            return measure(self._prefers_flash[shape])
        plain_s, flash_s = measure(False), measure(True)
        self._prefers_flash[shape] = statistics.median(flash_s) < statistics.median(plain_s)
        return flash_s if self._prefers_flash[shape] else plain_s

    def _prefill_s(self, num_tokens: int, flash: bool) -> float:
        with self._context(1, num_tokens, flash) as context:
            self._run(context, self._random_tokens(8))  # touches weights and buffers
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
            tokens = self._random_tokens(num_tokens)
            begin_s = self._now_s()
            self._run(context, tokens)
            return self._now_s() - begin_s

    def _decode_steps_s(self, batch_size: int, num_tokens: int, num_steps: int, flash: bool) -> list[float]:
        num_steps += _WARM_UP_STEPS
        state = _one_of_many(self._state(num_tokens, flash), batch_size)
        with self._context(batch_size, num_tokens + num_steps, flash) as context:
            buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
            for row in range(batch_size):
                if not llama_cpp.llama_state_seq_set_data(context, buffer, len(state), row):
                    raise ValueError("llama.cpp refused the state of a sequence")
            return [self._step_s(context, batch_size, num_tokens + step) for step in range(num_steps)][_WARM_UP_STEPS:]

    def _state(self, num_tokens: int, flash: bool) -> bytes:
        if (num_tokens, flash) not in self._states:
            with self._context(1, num_tokens, flash) as context:
                self._run(context, self._random_tokens(num_tokens))
                buffer = (ctypes.c_uint8 * llama_cpp.llama_state_seq_get_size(context, 0))()
                llama_cpp.llama_state_seq_get_data(context, buffer, len(buffer), 0)
            self._states[num_tokens, flash] = bytes(buffer)
        return self._states[num_tokens, flash]

    def _step_s(self, context: Any, batch_size: int, position: int) -> float:
        rows = [(token, position, row, True) for row, token in enumerate(self._random_tokens(batch_size))]
        with _batch(rows) as batch:
            begin_s = self._now_s()
            _decode(context, batch)
            return self._now_s() - begin_s

    def _run(self, context: Any, tokens: Sequence[int]) -> None:
        """Computes a prompt of sequence 0; the last token gets logits."""
        last = len(tokens) - 1
        for start in range(0, len(tokens), _MICRO_BATCH):
            chunk = tokens[start : start + _MICRO_BATCH]
            rows = [(token, position, 0, position == last) for position, token in enumerate(chunk, start)]
            with _batch(rows) as batch:
                _decode(context, batch)

    def _random_tokens(self, num_tokens: int) -> list[int]:
        return self._draw.choices(range(self._vocab_size), k=num_tokens)

    @contextmanager
    def _context(self, num_sequences: int, num_tokens: int, flash: bool) -> Iterator[Any]:
        """A llama_context with room for `num_tokens` in each sequence."""
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = num_sequences * -(-(num_tokens + 1) // 256) * 256  # each sequence's share is a multiple of 256
        params.n_seq_max = num_sequences
        params.n_batch = params.n_ubatch = _MICRO_BATCH
        params.n_threads = params.n_threads_batch = 1
        params.kv_unified = False
        params.flash_attn_type = int(flash)
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise ValueError(f"llama.cpp has no room for {num_sequences} sequences of {num_tokens} tokens")
        try:
            yield context
        finally:
            llama_cpp.llama_free(context)


def _one_of_many(state: bytes, num_sequences: int) -> bytes:
    """The state of a lone sequence, for a context of more.

    After a magic number and the flags it tells the number of the context's streams, one for each sequence; then come the cells
    of each stream, their number first: none in the others. llama.cpp checks all of it.
    """
    magic, flags, num_streams = _STATE_HEADER.unpack_from(state)
    if num_streams != 1:
        raise ValueError(f"llama.cpp writes states in a way that is not known here: {num_streams} streams")
    return _STATE_HEADER.pack(magic, flags, num_sequences) + state[_STATE_HEADER.size :] + bytes(4 * (num_sequences - 1))


@contextmanager
def _batch(rows: Sequence[tuple[int, int, int, bool]]) -> Iterator[Any]:
    """A llama_batch of (token, position, sequence, whether it gets logits)."""
    batch = llama_cpp.llama_batch_init(len(rows), 0, 1)
    try:
        batch.n_tokens = len(rows)
        for number, (token, position, sequence, has_logits) in enumerate(rows):
            batch.token[number] = token
            batch.pos[number] = position
            batch.n_seq_id[number] = 1
            batch.seq_id[number][0] = sequence
            batch.logits[number] = has_logits
        yield batch
    finally:
        llama_cpp.llama_batch_free(batch)


def _decode(context: Any, batch: Any) -> None:
    if (status := llama_cpp.llama_decode(context, batch)) != 0:
        raise ValueError(f"llama_decode returned {status}")
    llama_cpp.llama_synchronize(context)


@llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
def _log_errors(level: int, text: bytes, _user_data: Any) -> None:
    if level >= _LOG_ERROR:
        print(text.decode(errors="replace"), end="", flush=True)


def load(options: Mapping[str, Any]) -> LlamaCppDriver:
    llama_cpp.llama_log_set(_log_errors, None)
    return LlamaCppDriver(options["model"], CLOCKS[options["clock"]])
