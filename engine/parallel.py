"""Tensor parallelism: a replica's ranks share one model, each with a slice of the heads, of the MLP and of the KV cache.

    rank 0       decides what a step computes (engine/engine.py: `run`), tells the others, samples
    the others   compute the same step over their own slices (`follow`)

A rank computes some of the outputs of each linear layer, from all of its inputs, and the ranks join what they have; no number
is a sum over ranks. So every number is computed just as one rank alone would, in every format: the same bits, whatever the
number of ranks. (Splitting attention_output and down by their inputs, and adding up, would take half as many collectives. But
sums would be rounded otherwise, and int8 would scale activations otherwise, with each number of ranks.)

A group is never mended. A rank that dies or leaves it ends what the others wait for at once, one that hangs after _PATIENCE;
they then leave as well (`together`), and the replica starts anew as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from segue.errors import WorkerLost
from segue.models.config import ModelConfig

# A process group of one kind; torch's types do not know what it can do.
_Backend: TypeAlias = Any
# How long the ranks of a replica that starts wait for each other.
START_LIMIT = timedelta(minutes=5)
# How long a rank may lag behind the others in a step.
_PATIENCE = timedelta(seconds=30)
# How long a rank may have nothing to do. Rank 0's death ends the wait, at once.
_IDLE_LIMIT = timedelta(days=365)


@dataclass(frozen=True, slots=True)
class Shard:
    """The share of one rank. A model's `tensor_parallel_degrees` are the possible sizes."""

    rank: int = 0
    size: int = 1

    def share(self, count: int) -> int:
        """Of `count` things, how many a rank gets at most."""
        return -(-count // self.size)

    def part(self, count: int) -> slice:
        """Which of `count` things are the rank's. When they cannot be shared out evenly, the last ranks have fewer."""
        share = self.share(count)
        return slice(self.rank * share, (self.rank + 1) * share)

    def of(self, config: ModelConfig) -> ModelConfig:
        """The network as the rank sees it: fewer heads, a narrower MLP."""
        return replace(
            config,
            num_heads=config.num_heads // self.size,
            num_kv_heads=config.num_kv_heads // self.size,
            intermediate_size=config.intermediate_size // self.size,
        )


WHOLE = Shard()


class RankGroup:
    """One rank's end of the collectives. Every rank makes the same calls in the same order, from one thread."""

    def __init__(self, store: Store, shard: Shard, *, host: str = "127.0.0.1", device: str = "cpu") -> None:
        """Returns when all ranks are there. They meet in `store`, which no other group may have used; the others reach this one
        at its address `host`.

        Raises WorkerLost when one does not come.
        """
        self.shard = shard
        try:
            words = _gloo(store, shard, host)
            numbers = words if device == "cpu" else _nccl(store, shard)
        except RuntimeError as error:
            raise WorkerLost(f"not all {shard.size} ranks of this replica came: {error}") from None
        words.set_timeout(_PATIENCE)
        # What is said of steps, always through the host's memory; and what is computed, where it is computed.
        self._words = words
        self._numbers = numbers

    @contextmanager
    def together(self) -> Iterator[None]:
        """For what all ranks do at the same time. When it fails here, this rank leaves, which ends it on the others.

        Raises WorkerLost for what torch raises.
        """
        try:
            yield
        except RuntimeError as error:
            self.leave()
            raise WorkerLost(f"rank {self.shard.rank} of {self.shard.size} cannot go on: {error}") from error
        except BaseException:
            self.leave()
            raise

    def join(self, own: torch.Tensor, width: int, num_parts: int = 1) -> torch.Tensor:
        """From the columns that each rank has, in the order of the ranks, all of them: [tokens, width] float32.

        `own` [tokens, columns] float32, `Shard.part(width)` of them. With `num_parts`, which must then divide evenly, it holds
        some of each of so many matrices one beside the other, and so does the result.
        """
        tokens, share = len(own), self.shard.share(width)
        filled = torch.nn.functional.pad(own, (0, share - own.shape[1])).contiguous()
        joined = own.new_empty(self.shard.size, tokens, num_parts, share // num_parts)
        if tokens:
            self._live(self._numbers).allgather([list(joined.flatten(2))], [filled]).wait()
        return joined.permute(1, 2, 0, 3).flatten(1)[:, :width].contiguous()

    def send_step(self, words: torch.Tensor) -> None:
        """On rank 0: what the others get from `receive_step`. [words] int32"""
        self._broadcast(torch.tensor([len(words)]))
        self._broadcast(words)

    def receive_step(self) -> torch.Tensor:
        """On the other ranks: waits for the next step. [words] int32"""
        num_words = torch.zeros(1, dtype=torch.int64)
        self._broadcast(num_words)
        words = torch.empty(int(num_words), dtype=torch.int32)
        self._broadcast(words)
        return words

    def dismiss(self) -> None:
        """There are no more steps: on rank 0, the others return; those that are gone do not matter any more. Then leaves."""
        if self._words is not None and self.shard.rank == 0:
            with suppress(WorkerLost), self.together():
                self.send_step(torch.empty(0, dtype=torch.int32))
        self.leave()

    def leave(self) -> None:
        """Ends what the other ranks wait for. Doing it twice does no harm."""
        # Connections close with the last reference.
        self._words = self._numbers = None

    def _broadcast(self, words: torch.Tensor) -> None:
        options = dist.BroadcastOptions()
        options.timeout = _IDLE_LIMIT
        self._live(self._words).broadcast([words], options).wait()

    def _live(self, group: _Backend) -> _Backend:
        if group is None:
            raise WorkerLost("this replica lost a rank")
        return group


def _gloo(store: Store, shard: Shard, host: str) -> _Backend:
    make: Any = dist.ProcessGroupGloo  # torch's types lack the options
    options = make._Options()  # noqa: SLF001 - they have no public name
    options._devices = [make.create_device(hostname=host)]  # noqa: SLF001
    options._timeout = START_LIMIT  # noqa: SLF001
    return make(PrefixStore("words", store), shard.rank, shard.size, options)


def _nccl(store: Store, shard: Shard) -> _Backend:
    """Not run on hardware."""
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = _PATIENCE  # noqa: SLF001 - it has no public name
    return dist.ProcessGroupNCCL(PrefixStore("numbers", store), shard.rank, shard.size, options)
