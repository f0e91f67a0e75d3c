"""How the bytes of a push get into the decode worker's blocks: the seam to add a transport at.

| transport | the writer                                  | the reader                                |
|-----------|---------------------------------------------|-------------------------------------------|
| shm       | copies into the peer's mapped memory        | checks the bytes where they lie           |
| tcp       | hands out regions as message frames         | copies the bytes in and checks them       |
| dist      | hands tensors to torch.distributed          | checks them, then scatters them           |
| local     | does nothing: both phases share one cache   | has nothing to do                         |

Writers and readers run on the event loop or on transfer threads (`is_quick`); see pieces.py for their work on bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from kv_transfer.identity import same_host
from kv_transfer.pieces import Pieces, checksums
from kv_transfer.plan import RegionFormat, TargetRegions
from kv_transfer.protocol import DIST, SHM, TCP, FreshRegions
from kv_transfer.tensors import Memory, TensorMemory, host_memory
from segue.errors import ConfigError
from segue.kv_layout import KVLayout
from segue.v1 import transfer_pb2 as pb

# One push carries at most this much (but at least one region): little enough that copying, sending and checking overlap, enough
# that its own cost, some tenths of a millisecond of Python, does not show.
MAX_PUSH_BYTES = 4 * 2**20
MAX_PUSH_BLOCKS = 512
# Over TCP less of it: what is on its way is copied into frames and out of them, and is to stay in the caches in between.
_TCP_PUSH_BYTES = 2 * 2**20


def choose_transport(hello: pb.Hello, host: pb.HostIdentity, accepted: Sequence[str]) -> str | None:
    """The sender's best transport that the receiver, a process on `host`, accepts too; None when there is none."""
    possible = {TCP, DIST, SHM} if same_host(hello.host, host) else {TCP, DIST}
    return next((name for name in hello.transports if name in possible and name in accepted), None)


def check_transports(transports: Sequence[str], memory: Memory) -> tuple[str, ...]:
    """Raises ConfigError for names that are no transports, and for those that cannot take KV out of `memory`."""
    if not transports or not {SHM, TCP, DIST}.issuperset(transports):
        raise ConfigError(f"kv_transport: {', '.join(transports) or 'none'} given; give some of shm, tcp, dist")
    if set(transports) != {DIST}:
        host_memory(memory)
    return tuple(transports)


def region_format(ticket: pb.Ticket, target: KVLayout, transport: str, wire_dtype: str) -> RegionFormat:
    """How the ticket's regions travel into memory of layout `target`: as it stores them, over TCP perhaps in `wire_dtype`."""
    return RegionFormat.of(
        range(ticket.first_kv_head, ticket.first_kv_head + ticket.num_kv_heads),
        head_dim=target.head_dim,
        block_size=target.block_size,
        dtype=wire_dtype if wire_dtype and transport == TCP else target.dtype,
    )


def is_quick(transport: str, form: RegionFormat, layout: KVLayout) -> bool:
    """Whether a push, out of or into memory of this layout, takes no longer than an event loop may stand still, about a
    millisecond: not where numbers are converted or a device is waited for. Threads take longer than that to wake up on a busy
    machine."""
    return transport != DIST and form.is_cut_like(layout)


@dataclass(frozen=True, slots=True)
class Parcel:
    """Blocks of one layer that travel in one push: positions among the ticket's blocks, and where these lie at the reader."""

    layer: int
    indices: Sequence[int]
    targets: Sequence[int]


def plan_parcels(
    transport: str, layer: int, indices: Sequence[int], block_ids: Sequence[int], region_bytes: int
) -> Iterator[Parcel]:
    """Cuts blocks, `indices` into `block_ids`, into pushes."""
    max_bytes = _TCP_PUSH_BYTES if transport == TCP else MAX_PUSH_BYTES
    size = max(1, min(max_bytes // region_bytes, MAX_PUSH_BLOCKS))
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        yield Parcel(layer, part, [block_ids[index] for index in part])


# Whole regions, in order: memoryviews, over torch.distributed tensors.
Payload = Sequence[Any]


class RegionSource(Protocol):
    """Where a push's bytes come from."""

    @property
    def memory(self) -> TensorMemory: ...

    @property
    def format(self) -> RegionFormat: ...

    def take(self, layer: int, source_blocks: Sequence[int], indices: Sequence[int]) -> Payload:
        """See SourceRegions."""


class PushWriter(Protocol):
    def write(self, parcel: Parcel, payload: Any) -> tuple[list[int], Payload]:
        """Brings the parcel's regions, `payload`, to the peer; returns their checksums and what is to follow its Push."""


@dataclass(frozen=True, slots=True)
class ShmWriter:
    target: TargetRegions

    def write(self, parcel: Parcel, payload: list[memoryview]) -> tuple[list[int], list[memoryview]]:
        return self.target.copy(parcel.layer, parcel.targets, payload), []


@dataclass(frozen=True, slots=True)
class TcpWriter:
    region_bytes: int

    def write(self, parcel: Parcel, payload: list[memoryview]) -> tuple[list[int], list[memoryview]]:
        return checksums(Pieces.of(payload, self.region_bytes), self.region_bytes), payload


class PushReader(Protocol):
    def read(self, layer: int, regions: FreshRegions, blocks: Sequence[int], payload: Any) -> bool:
        """Takes regions of one push into `blocks` of the memory; False when a checksum does not hold."""


@dataclass(frozen=True, slots=True)
class ShmReader:
    target: TargetRegions

    def read(self, layer: int, regions: FreshRegions, blocks: Sequence[int], payload: Sequence[memoryview]) -> bool:
        return self.target.checksums(layer, blocks) == regions.checksums


@dataclass(frozen=True, slots=True)
class TcpReader:
    target: TargetRegions

    def read(self, layer: int, regions: FreshRegions, blocks: Sequence[int], payload: Sequence[memoryview]) -> bool:
        size = self.target.format.region_bytes
        fresh = _regions_at(regions.positions, payload, size)
        if self.target.is_direct:
            # One pass: damaged bytes lie then in blocks that nobody reads, as their ticket fails.
            return self.target.copy(layer, blocks, fresh) == regions.checksums
        if checksums(Pieces.of(fresh, size), size) != regions.checksums:
            return False
        self.target.convert(layer, blocks, fresh)
        return True


def _regions_at(positions: Sequence[int], payload: Sequence[memoryview], region_bytes: int) -> Sequence[memoryview]:
    """Some of the regions that `payload` holds."""
    if len(positions) * region_bytes == sum(part.nbytes for part in payload):
        return payload
    views = [part[offset : offset + region_bytes] for part in payload for offset in range(0, part.nbytes, region_bytes)]
    return [views[position] for position in positions]
