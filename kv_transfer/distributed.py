"""The transport over torch.distributed: NCCL between GPUs, gloo between CPUs, by one code.

KV stays on the device that it lies on: regions are gathered, sent, checked and scattered as tensors.
Each pair of workers has a process group of two, in which the receiver is rank 0. Frames still go over ZeroMQ; a Push says how
many bytes the sender hands to the group next.

Not run with NCCL: there was no GPU to run it on.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch

# torch.distributed exports the same names, but tells no type checker of them.
from torch._C import _distributed_c10d as distributed
from torch.distributed import DistError

from kv_transfer.plan import RegionFormat
from kv_transfer.protocol import FreshRegions
from kv_transfer.tensors import TensorMemory
from kv_transfer.transports import Parcel
from segue.errors import TransferError, TransferRefused
from segue.v1 import transfer_pb2 as pb

T = TypeVar("T")
# A peer that does not take or send what was announced within this time has lost its connection.
_TIMEOUT = timedelta(seconds=10)
_RECEIVER, _SENDER = 0, 1


class Rendezvous:
    """Where senders find the groups of one receiver. `host` is the address that it listens on."""

    def __init__(self, host: str) -> None:
        # The store would listen on every interface by itself.
        family, kind, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as listener:
            listener.bind(address)
            listener.listen()
            self.port = int(listener.getsockname()[1])
            self._store = distributed.TCPStore(
                host, self.port, None, True, _TIMEOUT, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        self._host = host
        self._numbers = itertools.count()

    def invite(self, device: torch.device) -> tuple[Channel, pb.Rendezvous]:
        """A channel to receive from, and what its sender must know."""
        name = f"pair-{next(self._numbers)}"
        return Channel(self._store, name, _RECEIVER, self._host, device), pb.Rendezvous(port=self.port, name=name)


class Channel:
    """One pair's process group. `join` it first; then send or receive, one after the other."""

    def __init__(self, store: distributed.Store, name: str, rank: int, host: str, device: torch.device) -> None:
        self._store = distributed.PrefixStore(name, store)
        self._rank = rank
        self._host = host
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-channel")
        # A ProcessGroupGloo or ProcessGroupNCCL, of whose send and recv the stubs know nothing.
        self._group: Any = None

    @classmethod
    async def join_as_sender(cls, endpoint: str, meeting: pb.Rendezvous, device: torch.device) -> Channel:
        """`endpoint` is the receiver's, tcp://host:port. Raises TransferError when there is nobody."""
        host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")

        def connect() -> distributed.Store:
            return distributed.TCPStore(host, meeting.port, None, False, _TIMEOUT, wait_for_workers=False)

        try:
            store = await asyncio.to_thread(connect)
        except (RuntimeError, DistError) as error:
            raise TransferError(f"cannot meet the receiver at {host}:{meeting.port}: {error}") from None
        channel = cls(store, meeting.name, _SENDER, _own_address(host, meeting.port), device)
        await channel.join()
        return channel

    async def join(self) -> None:
        """Returns when the other side has joined too. Raises TransferError when it does not."""
        self._group = await self._run(self._make_group)

    async def send(self, tensor: torch.Tensor) -> None:
        """Returns when the tensor has left. Raises TransferError when the receiver is lost."""
        await self._run(lambda: self._finish(self._joined.send([tensor], _RECEIVER, 0)))

    async def receive(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] of memory of its own. Raises TransferError when the sender is lost."""
        tensor = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        await self._run(lambda: self._finish(self._joined.recv([tensor], _SENDER, 0)))
        return tensor

    def close(self) -> None:
        """What runs ends when the other side goes, or in time."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    @property
    def _joined(self) -> Any:
        if self._group is None:
            raise TransferError("the channel was not joined")
        return self._group

    def _make_group(self) -> distributed.Backend:
        if self._device.type == "cuda":
            nccl = distributed.ProcessGroupNCCL.Options()
            nccl._timeout = _TIMEOUT  # noqa: SLF001
            return distributed.ProcessGroupNCCL(self._store, self._rank, 2, nccl)
        gloo = distributed.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
        # Left to itself it listens at the address of the host's name.
        gloo._devices = [distributed.ProcessGroupGloo.create_device(hostname=self._host)]  # noqa: SLF001
        gloo._timeout = _TIMEOUT  # noqa: SLF001
        return distributed.ProcessGroupGloo(self._store, self._rank, 2, gloo)

    def _finish(self, work: distributed.Work) -> None:
        work.wait()
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    async def _run(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call)
        except (RuntimeError, DistError) as error:  # what torch raises, and a closed channel
            raise TransferError(f"the process group was lost: {error}") from None


@dataclass(frozen=True, slots=True)
class TensorSource:
    """Takes regions out of the memory of the worker that computed them. Raises TransferRefused, when made, for a target that
    cuts or stores KV otherwise."""

    memory: TensorMemory
    format: RegionFormat

    def __post_init__(self) -> None:
        if not self.format.is_cut_like(self.memory.layout):
            raise TransferRefused("kv_transport: dist needs equal block sizes and KV formats on both sides")

    def take(self, layer: int, source_blocks: Sequence[int], indices: Sequence[int]) -> list[torch.Tensor]:
        """One tensor uint8 [blocks * region_bytes], a copy."""
        blocks = _index([source_blocks[index] for index in indices], self.memory)
        return [_of_heads(self.memory, layer, self.format)[blocks].reshape(-1)]


@dataclass(frozen=True, slots=True)
class TensorTarget:
    """Where regions go."""

    memory: TensorMemory
    format: RegionFormat


@dataclass(frozen=True, slots=True)
class DistWriter:
    region_bytes: int

    def write(self, parcel: Parcel, payload: list[torch.Tensor]) -> tuple[list[int], list[torch.Tensor]]:
        return tensor_checksums(payload[0].view(len(parcel.indices), self.region_bytes)), payload


@dataclass(frozen=True, slots=True)
class DistReader:
    target: TensorTarget

    def read(self, layer: int, regions: FreshRegions, blocks: Sequence[int], payload: Sequence[torch.Tensor]) -> bool:
        target, form = self.target, self.target.format
        arrived = payload[0].view(-1, form.region_bytes)[_index(regions.positions, target.memory)]
        if tensor_checksums(arrived) != regions.checksums:
            return False
        stored = _of_heads(target.memory, layer, form)
        stored[_index(blocks, target.memory)] = arrived.view(-1, *stored.shape[1:])
        return True


def tensor_checksums(regions: torch.Tensor) -> list[int]:
    """One for each row of uint8 [regions, region_bytes], computed where they lie: a multilinear hash (Carter and Wegman, 1979),
    the sum of all 64-bit words times odd numbers that depend on their place, modulo 2^64."""
    num_words = -(-regions.shape[1] // 8)
    padded = torch.nn.functional.pad(regions, (0, 8 * num_words - regions.shape[1])).contiguous()
    sums = (padded.view(torch.int64) * _multipliers(num_words).to(regions.device)).sum(1)
    return [total & 0xFFFF_FFFF_FFFF_FFFF for total in sums.tolist()]


@cache
def _multipliers(num_words: int) -> torch.Tensor:
    """int64 [num_words]: spread over all bits, so that a flipped bit at one place is no flipped bit at another."""
    spread = torch.arange(1, num_words + 1, dtype=torch.int64) * -0x61C8864680B583EB
    return (spread ^ (spread >> 29)) | 1


def _of_heads(memory: TensorMemory, layer: int, form: RegionFormat) -> torch.Tensor:
    """uint8 [num_blocks, 2, heads of the region, slab_bytes], a view."""
    layout = memory.layout
    blocks = memory.tensor.view(layout.num_layers, memory.num_blocks, 2, layout.num_kv_heads, layout.slab_bytes)[layer]
    first = form.heads.start - layout.heads.start
    return blocks[:, :, first : first + len(form.heads)]


def _index(numbers: Sequence[int], memory: TensorMemory) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64, device=memory.tensor.device)


def _own_address(peer_host: str, peer_port: int) -> str:
    """This host's address on the way to the peer."""
    family, kind, _, _, address = socket.getaddrinfo(peer_host, peer_port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])
