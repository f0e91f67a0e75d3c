"""A worker's model, its KV cache and the one thread that computes.

Life: `Engine.load` reads the weights; `run` computes steps, one at a time, in the order in which they were asked for, while
the event loop goes on; `close` ends the thread and lets go of the KV memory. Of several ranks that share a model each has an
engine; all but the first do not `run`, they `follow`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Chunks
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from engine.block_pool import BlockPool
from engine.cuda_graphs import GraphDecoder
from engine.kernels.choice import make_kernels
from engine.kv_cache import KVCache
from engine.model import Decoder
from engine.parallel import WHOLE, RankGroup
from engine.rotary import RotaryTable
from engine.sampler import sample
from engine.step import Chunk, StepInputs, prepare_step
from engine.step_times import StepTimes
from engine.step_words import pack_step, unpack_step
from engine.weights import WeightFormats, load_weights
from segue.errors import ConfigError, InternalError, InvalidRequest
from segue.kv_layout import KVLayout
from segue.models.config import ModelConfig
from segue.sampling import GeneratedToken

OnLayer = Callable[[int], None]
Forward = Callable[[StepInputs, OnLayer | None], torch.Tensor]
# Decode steps of more sequences are launched kernel by kernel.
_MAX_GRAPH_BATCH = 64


class Engine:
    """`pool` says which blocks of the KV cache are whose; sequences bring their own leases."""

    def __init__(
        self,
        config: ModelConfig,
        layout: KVLayout,
        pool: BlockPool,
        decoder: Decoder,
        group: RankGroup | None = None,
        *,
        threads: int,
    ) -> None:
        self.config = config
        self.layout = layout
        self.pool = pool
        self._decoder: Decoder | None = decoder
        self._group = group
        forward: Forward = decoder.forward if decoder.kernels.device.type == "cpu" else _on_gpu(decoder, group)
        if group is not None and group.shard.rank == 0:
            forward = _on_all_ranks(forward, group)
        self._forward: Forward | None = forward
        # The number of compute threads is a property of the thread that starts them.
        self._executor = ThreadPoolExecutor(1, "engine", initializer=torch.set_num_threads, initargs=(threads,))
        self.step_times = StepTimes()

    @classmethod
    def load(
        cls,
        model_dir: Path,
        config: ModelConfig,
        cache: KVCache,
        formats: WeightFormats,
        group: RankGroup | None = None,
        *,
        threads: int,
        kernels: str = "auto",
    ) -> Engine:
        """Computes on the device that `cache` lies on. With `group`, this is one of its ranks, and `cache` that of the rank;
        the others have as many blocks and the same formats.

        Raises ModelFileError for weights that are missing, damaged or do not fit `config`, and ConfigError for kernels that are
        not there.
        """
        if threads < 1:
            raise ConfigError(f"threads: must be at least 1, not {threads}")
        shard = WHOLE if group is None else group.shard
        rotary = RotaryTable(config.rope, config.head_dim, config.max_context)
        backend = make_kernels(shard.of(config), cache, rotary, threads=threads, device=cache.device.type, kernels=kernels)
        decoder = Decoder(load_weights(model_dir, config, formats, shard), backend, group)
        return cls(config, cache.layout, BlockPool(cache.num_blocks), decoder, group, threads=threads)

    @property
    def decoder(self) -> Decoder:
        """Raises InternalError when the engine is closed."""
        if self._decoder is None:
            raise InternalError("the engine is closed")
        return self._decoder

    def check_fits(self, prompt_token_ids: Chunks[int], max_tokens: int) -> None:
        """Raises InvalidRequest, naming the field, for a prompt that this engine cannot compute or that its KV memory cannot
        hold together with `max_tokens` more tokens."""
        if not prompt_token_ids or max(prompt_token_ids) >= self.config.vocab_size:
            raise InvalidRequest("prompt", f"must hold token ids below {self.config.vocab_size}")
        num_tokens = len(prompt_token_ids) + max_tokens
        if num_tokens > self.config.max_context:
            raise InvalidRequest("max_tokens", f"{num_tokens} tokens exceed the context of {self.config.max_context}")
        if self.layout.num_blocks_for(num_tokens) > self.pool.num_total:
            raise InvalidRequest("max_tokens", f"{num_tokens} tokens do not fit this worker's KV memory")

    async def run(self, chunks: Chunks[Chunk], on_layer: OnLayer | None = None) -> list[GeneratedToken | None]:
        """Computes all chunks, of different sequences, in one forward pass.

        Returns, for each chunk, the next token when the chunk reached the end of its sequence, else None; tokens are not
        appended. Each sequence's num_computed is advanced; not so when the pass raises or the caller is cancelled. Until
        this returns or raises, sequences and leases must stay as they are: even a cancelled call waits for its pass to end.
        `on_layer` is called on the engine's thread, with each layer whose K and V of all chunks are in the cache, on all ranks.
        Raises WorkerLost when another rank is gone, or when the pass fails on any: a group of ranks is then of no more use.
        """
        if not chunks:
            return []
        tokens = await _finish(self._executor.submit(self._compute, chunks, on_layer))
        for chunk in chunks:
            chunk.sequence.num_computed += chunk.num_tokens
        return tokens

    async def follow(self) -> None:
        """On a rank after the first: computes what rank 0 does, until it closes its engine. No scheduler, block pool or sampler
        is needed for that: blocks have the same numbers on all ranks.

        Raises WorkerLost when another rank is gone, and when this one fails, which the others then notice. When cancelled, the
        thread still waits for rank 0.
        """
        await asyncio.wrap_future(self._executor.submit(self._follow))

    def close(self) -> None:
        """Waits for the pass under way, lets the other ranks go, and lets go of weights and KV memory. On a rank that follows
        it waits for rank 0's end. Doing it twice does no harm."""
        self._executor.shutdown(cancel_futures=True)
        self._decoder = self._forward = None
        if self._group is not None:
            self._group.dismiss()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _follow(self) -> None:
        if self._group is None or self._forward is None:
            raise InternalError("the engine is closed, or is no rank of several")
        with self._group.together(), torch.inference_mode():
            while len(words := self._group.receive_step()):
                self._forward(unpack_step(words), None)
        self._group.leave()

    def _compute(self, chunks: Chunks[Chunk], on_layer: OnLayer | None) -> list[GeneratedToken | None]:
        if (forward := self._forward) is None:
            raise InternalError("the engine is closed")
        tokens: list[GeneratedToken | None] = [None] * len(chunks)
        with self.step_times.of(chunks), torch.inference_mode():
            step = prepare_step(chunks, self.layout)
            logits = forward(step, on_layer)
            sampled = sample(logits.cpu(), [chunks[index].sequence for index in step.sampled_chunks])
        for index, token in zip(step.sampled_chunks, sampled, strict=True):
            tokens[index] = token
        return tokens


def _on_all_ranks(forward: Forward, group: RankGroup) -> Forward:
    def forward_together(step: StepInputs, on_layer: OnLayer | None) -> torch.Tensor:
        with group.together():
            group.send_step(pack_step(step))
            return forward(step, on_layer)

    return forward_together


def _on_gpu(decoder: Decoder, group: RankGroup | None) -> Forward:
    """Decode steps of one rank alone come from CUDA graphs: several would have to record them in the same steps. A layer is
    told of when its kernels are done and not when they are launched.

    Not run on hardware.
    """
    from engine.kernels.triton_backend import TritonKernels

    if not isinstance(decoder.kernels, TritonKernels):
        raise InternalError(f"no graphs for the kernels {decoder.kernels.name}")
    decode = GraphDecoder(decoder, decoder.kernels, _MAX_GRAPH_BATCH).forward if group is None else decoder.forward

    def forward(step: StepInputs, on_layer: OnLayer | None) -> torch.Tensor:
        if on_layer is None:
            return decode(step)
        tell = on_layer

        def when_done(layer: int) -> None:
            torch.cuda.current_stream().synchronize()
            tell(layer)

        return decoder.forward(step, when_done)

    return forward


async def _finish(step: Future[list[GeneratedToken | None]]) -> list[GeneratedToken | None]:
    """The step's result. When cancelled, a step that runs already is waited for: it still writes into leased blocks."""
    done = asyncio.wrap_future(step)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        while not step.cancel() and not done.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait({done})
        raise
