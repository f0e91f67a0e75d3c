"""Decode steps replayed from CUDA graphs: a step of few rows costs the host more to launch than the GPU to compute.

A graph is recorded once for each of a few batch sizes and replayed for every step of up to as many chunks of one token; what
differs from step to step lies in tensors that stay where they are and are filled anew. Other steps run as they are. Rows that a
step leaves over are padding, which backends compute but never write into the cache (`refill`).

Not run on hardware: tests replay by calling the recorded function again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engine.model import Decoder
from engine.step import StepInputs


class Graph(Protocol):
    """Work on the device, recorded once."""

    def record(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Records what `function` does on the device, to tensors that exist. The tensor that each replay fills."""

    def replay(self) -> None:
        """Does it again, in the order of the current stream."""


class GraphKernels(Protocol):
    """What a backend offers beside `Kernels` to be replayed."""

    device: torch.device

    def padded_step(self, num_rows: int) -> Any:
        """As `prepare` gives it: a decode step of `num_rows` rows of padding, whose tensors stay where they are."""

    def refill(self, padded: Any, step: StepInputs) -> None:
        """Writes a step of chunks of one token into a padded step's tensors; rows that are left over become padding."""


class CudaGraph:
    def __init__(self, pool: Any) -> None:
        """`pool`: memory that graphs share which are never replayed at the same time, torch.cuda.graph_pool_handle()."""
        self._graph = torch.cuda.CUDAGraph()
        self._pool = pool

    def record(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        # Once without recording: kernels are compiled and loaded, which must not happen while a graph is recorded.
        function()
        # Other threads may go on using the device.
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        self._graph.replay()


@dataclass(frozen=True, slots=True)
class _Recorded:
    """A graph and the tensors that it reads and fills."""

    graph: Graph
    prepared: Any
    # [rows] int64
    token_ids: torch.Tensor
    # [rows, vocab] float32
    logits: torch.Tensor


class GraphDecoder:
    """A decoder's `forward`, faster for decode steps. Not thread-safe: one thread computes."""

    def __init__(
        self, decoder: Decoder, kernels: GraphKernels, max_batch: int, new_graph: Callable[[], Graph] | None = None
    ) -> None:
        """Steps of up to `max_batch` sequences are replayed."""
        self._decoder = decoder
        self._kernels = kernels
        self._sizes = batch_sizes(max_batch)
        self._new_graph = new_graph or _cuda_graphs()
        # By batch size, recorded when first needed or by `record_all`.
        self._recorded: dict[int, _Recorded] = {}

    def record_all(self) -> None:
        """Spares the first steps the time it takes to record a graph."""
        for size in self._sizes:
            self._graph_of(size)

    def forward(self, step: StepInputs, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """Logits [sampled rows, vocab] float32. A step with a hook is not replayed: a graph cannot call it."""
        num_rows = len(step.pieces)
        if on_layer is not None or step.num_decoding < num_rows or not 0 < num_rows <= self._sizes[-1]:
            return self._decoder.forward(step, on_layer)
        recorded = self._graph_of(next(size for size in self._sizes if size >= num_rows))
        recorded.token_ids[:num_rows].copy_(step.token_ids)
        self._kernels.refill(recorded.prepared, step)
        recorded.graph.replay()
        # A copy: the next replay writes into these logits again.
        return recorded.logits[step.sampled_rows.to(self._kernels.device)]

    def _graph_of(self, size: int) -> _Recorded:
        if size not in self._recorded:
            self._recorded[size] = self._record(size)
        return self._recorded[size]

    def _record(self, size: int) -> _Recorded:
        """From a step of padding only, which does no harm however often it is computed."""
        device = self._kernels.device
        prepared = self._kernels.padded_step(size)
        token_ids = torch.zeros(size, dtype=torch.int64, device=device)
        all_rows = torch.arange(size, device=device)
        graph = self._new_graph()
        logits = graph.record(lambda: self._decoder.compute(prepared, token_ids, all_rows))
        return _Recorded(graph, prepared, token_ids, logits)


def batch_sizes(max_batch: int) -> list[int]:
    """1, 2, 4, ... up to the first that holds `max_batch`: few graphs, and never more than half of their rows are padding."""
    sizes = [1]
    while sizes[-1] < max_batch:
        sizes.append(2 * sizes[-1])
    return sizes


def _cuda_graphs() -> Callable[[], Graph]:
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)
