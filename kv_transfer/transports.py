"""How the bytes of a push get into the decode worker's blocks: the seam to add a transport at.

| transport | the writer                                  | the reader                                |
|-----------|---------------------------------------------|-------------------------------------------|
| shm       | copies into the peer's mapped memory        | checks the bytes where they lie           |
| tcp       | hands out regions as message frames         | checks the bytes, then copies them in     |
| local     | does nothing: both phases share one cache   | has nothing to do                         |

Writers and readers run on transfer threads. Copies and checksums release the interpreter's lock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import xxhash

from kv_transfer.identity import same_host
from kv_transfer.plan import RegionFormat, TargetRegions
from kv_transfer.protocol import SHM, TCP, FreshRegion
from segue.errors import ConfigError
from segue.kv_layout import KVLayout
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


def region_format(ticket: pb.Ticket, target: KVLayout, transport: str, wire_dtype: str) -> RegionFormat:
    """How the ticket's regions travel into memory of layout `target`. In shared memory they are written as they are stored."""
    return RegionFormat.of(
        range(ticket.first_kv_head, ticket.first_kv_head + ticket.num_kv_heads),
        head_dim=target.head_dim,
        block_size=target.block_size,
        dtype=target.dtype if transport == SHM else wire_dtype or target.dtype,
    )


@dataclass(frozen=True, slots=True)
class Parcel:
    """Blocks of one layer that travel in one push: positions among the ticket's blocks, and where these lie at the reader."""

    layer: int
    indices: Sequence[int]
    targets: Sequence[int]


def plan_parcels(layer: int, indices: Sequence[int], block_ids: Sequence[int], region_bytes: int) -> Iterator[Parcel]:
    """Cuts blocks, `indices` into `block_ids`, into pushes."""
    size = max(1, min(MAX_PUSH_BYTES // region_bytes, MAX_PUSH_BLOCKS))
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        yield Parcel(layer, part, [block_ids[index] for index in part])


class PushWriter(Protocol):
    def write(self, parcel: Parcel, payload: list[memoryview]) -> list[memoryview]:
        """Brings the parcel's regions, `payload`, to the peer; returns what is to follow its Push as frames."""


@dataclass(frozen=True, slots=True)
class ShmWriter:
    target: TargetRegions

    def write(self, parcel: Parcel, payload: list[memoryview]) -> list[memoryview]:
        self.target.put(parcel.layer, parcel.targets, payload)
        return []


class TcpWriter:
    def write(self, parcel: Parcel, payload: list[memoryview]) -> list[memoryview]:
        return payload


class PushReader(Protocol):
    @property
    def target(self) -> TargetRegions: ...

    def read(self, layer: int, regions: Sequence[tuple[FreshRegion, int]], payload: Sequence[memoryview]) -> bool:
        """Takes (region, destination block) pairs of one push into the memory; False when a checksum does not hold."""


@dataclass(frozen=True, slots=True)
class ShmReader:
    target: TargetRegions

    def read(self, layer: int, regions: Sequence[tuple[FreshRegion, int]], payload: Sequence[memoryview]) -> bool:
        return all(_checksum_of(self.target.parts(layer, block)) == region.checksum for region, block in regions)


@dataclass(frozen=True, slots=True)
class TcpReader:
    target: TargetRegions

    def read(self, layer: int, regions: Sequence[tuple[FreshRegion, int]], payload: Sequence[memoryview]) -> bool:
        views = split_regions(payload, self.target.format.region_bytes)
        fresh = [views[region.position] for region, _ in regions]
        if any(checksum(view) != region.checksum for view, (region, _) in zip(fresh, regions, strict=True)):
            return False
        self.target.put(layer, [block for _, block in regions], fresh)
        return True


def split_regions(payload: Sequence[memoryview], region_bytes: int) -> list[memoryview]:
    """One view for each region, of buffers that hold whole regions."""
    return [part[offset : offset + region_bytes] for part in payload for offset in range(0, len(part), region_bytes)]


def _checksum_of(parts: Sequence[memoryview]) -> int:
    if len(parts) == 1:
        return checksum(parts[0])
    running = xxhash.xxh3_64()
    for part in parts:
        running.update(part)
    return running.intdigest()
