"""How the bytes of a push get into the decode worker's blocks: the seam to add a transport at.

| transport | the writer                                  | the reader                                |
|-----------|---------------------------------------------|-------------------------------------------|
| shm       | copies into the peer's mapped memory        | checks the bytes where they lie           |
| tcp       | hands out its own memory as message frames  | checks the bytes, then copies them in     |
| local     | does nothing: both phases share one cache   | has nothing to do                         |

Writers and readers run on transfer threads. Copies and checksums release the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

from kv_transfer.identity import same_host
from kv_transfer.memory import KVMemory
from kv_transfer.protocol import SHM, TCP, FreshRegion
from segue.errors import ConfigError
from segue.v1 import transfer_pb2 as pb

# One push carries at most this much (but at least one region), so that copying, sending and checking overlap.
MAX_PUSH_BYTES = 2**20
MAX_PUSH_BLOCKS = 512

checksum = xxhash.xxh3_64_intdigest


def choose_transport(hello: pb.Hello, host: pb.HostIdentity, accepted: Sequence[str]) -> str | None:
    """The sender's best transport that the receiver, a process on `host`, accepts too; None when there is none."""
    possible = {TCP, SHM} if same_host(hello.host, host) else {TCP}
    return next((name for name in hello.transports if name in possible and name in accepted), None)


def check_transports(transports: Sequence[str]) -> tuple[str, ...]:
    """Raises ConfigError for names that are no transports."""
    if not transports or not {SHM, TCP}.issuperset(transports):
        raise ConfigError(f"kv_transport: {', '.join(transports) or 'none'} given; give shm, tcp or both")
    return tuple(transports)


@dataclass(frozen=True, slots=True)
class Parcel:
    """Blocks of one layer that travel in one push: `sources` lie in the writer's memory, `targets` in the reader's."""

    layer: int
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    indices: tuple[int, ...]


def plan_parcels(
    layer: int, blocks: Sequence[tuple[int, int]], block_ids: Sequence[int], region_bytes: int
) -> Iterator[Parcel]:
    """Cuts (source block, index into `block_ids`) pairs into pushes."""
    size = max(1, min(MAX_PUSH_BYTES // region_bytes, MAX_PUSH_BLOCKS))
    for start in range(0, len(blocks), size):
        part = blocks[start : start + size]
        indices = tuple(index for _, index in part)
        yield Parcel(layer, tuple(source for source, _ in part), tuple(block_ids[index] for index in indices), indices)


def contiguous_runs(*columns: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(start, length) of the stretches in which every column counts up by one."""
    start, count = 0, len(columns[0])
    for position in range(1, count + 1):
        if position == count or any(column[position] != column[position - 1] + 1 for column in columns):
            yield start, position - start
            start = position


class PushWriter(Protocol):
    def write(self, parcel: Parcel) -> list[memoryview]:
        """Brings the parcel's bytes to the peer; returns those that are to follow its Push as frames."""


@dataclass(frozen=True, slots=True)
class ShmWriter:
    source: KVMemory
    target: KVMemory

    def write(self, parcel: Parcel) -> list[memoryview]:
        for start, length in contiguous_runs(parcel.sources, parcel.targets):
            run = self.source.regions(parcel.layer, parcel.sources[start], length)
            self.target.write(parcel.layer, parcel.targets[start], run)
        return []


@dataclass(frozen=True, slots=True)
class TcpWriter:
    source: KVMemory

    def write(self, parcel: Parcel) -> list[memoryview]:
        return [
            self.source.regions(parcel.layer, parcel.sources[start], length)
            for start, length in contiguous_runs(parcel.sources)
        ]


class PushReader(Protocol):
    def read(self, layer: int, regions: Sequence[tuple[FreshRegion, int]], payload: Sequence[memoryview]) -> bool:
        """Takes (region, destination block) pairs of one push into the memory; False when a checksum does not hold."""


@dataclass(frozen=True, slots=True)
class ShmReader:
    memory: KVMemory

    def read(self, layer: int, regions: Sequence[tuple[FreshRegion, int]], payload: Sequence[memoryview]) -> bool:
        return all(checksum(self.memory.region(layer, block)) == region.checksum for region, block in regions)


@dataclass(frozen=True, slots=True)
class TcpReader:
    memory: KVMemory

    def read(self, layer: int, regions: Sequence[tuple[FreshRegion, int]], payload: Sequence[memoryview]) -> bool:
        size = self.memory.layout.region_bytes
        views = [part[offset : offset + size] for part in payload for offset in range(0, len(part), size)]
        if any(checksum(views[region.position]) != region.checksum for region, _ in regions):
            return False
        for region, block in regions:
            self.memory.write(layer, block, views[region.position])
        return True
