"""What a cluster says of itself: models, workers, their load."""

from __future__ import annotations

from dataclasses import dataclass

from segue.client.events import copy_fields
from segue.v1 import inference_pb2 as pb
from segue.v1.operator_pb2 import ScaleWorkersResponse

NEEDED_ROLES = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Tokenization:
    token_ids: tuple[int, ...]
    # The length of the model's context, in tokens.
    max_context: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    id: str
    max_context: int
    vocab_size: int
    # Unix time at which the router began to serve it.
    created_unix_s: int


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """free + leased + cached blocks == total blocks, always."""

    waiting_requests: int
    running_requests: int
    # Prompt tokens accepted and not yet computed.
    queued_tokens: int
    free_blocks: int
    leased_blocks: int
    cached_blocks: int
    total_blocks: int
    # Tokens in one block.
    block_size: int
    # Hand-overs, on either side, that are not over.
    open_tickets: int
    # Sums since the worker started.
    prefilled_tokens: int
    decoded_tokens: int
    prefix_hit_tokens: int
    transferred_bytes: int
    failed_transfers: int
    preemptions: int


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    worker_id: str
    # Grows each time a worker of this name starts.
    epoch: int
    roles: tuple[str, ...]
    # ready, draining, drained or lost.
    state: str
    address: str
    pid: int
    host: str
    load: WorkerLoad
    # Roles that it can be given.
    possible_roles: tuple[str, ...] = ()
    # When its roles change back to its own, in Unix time; 0: they do not.
    roles_until_unix_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RouterStatus:
    """Addresses are host:port; routers of one host may share them."""

    router_id: str
    grpc_address: str
    http_address: str
    pid: int
    host: str


@dataclass(frozen=True, slots=True)
class TransferRate:
    """KV that went from one worker to another in the latest ten seconds."""

    prefill_worker: str
    decode_worker: str
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    model: str
    workers: tuple[WorkerStatus, ...]
    # Requests that the router holds now.
    active_requests: int
    # False while the membership store cannot be reached: `workers` is then the last list known.
    membership_fresh: bool
    version: str
    routers: tuple[RouterStatus, ...] = ()
    # Of active_requests, those that have to wait for their turn.
    waiting_requests: int = 0
    # For requests of this router; pairs without any are left out.
    transfers: tuple[TransferRate, ...] = ()

    @property
    def missing_roles(self) -> tuple[str, ...]:
        """Roles that no ready worker has; empty when the cluster can serve."""
        present = {role for worker in self.workers if worker.state == "ready" for role in worker.roles}
        return tuple(role for role in NEEDED_ROLES if role not in present)


@dataclass(frozen=True, slots=True)
class ScaleStatus:
    """How many workers of each role there shall be, and how far that is."""

    prefill: int
    decode: int
    # All of them serve, and no other is left.
    done: bool
    # Workers that do not serve yet, and those that finish what they have and then leave.
    starting: tuple[str, ...]
    leaving: tuple[str, ...]
    # What those that start wait for; empty: nothing is known to be missing.
    problem: str


def tokenization_from_pb(message: pb.TokenizeResponse) -> Tokenization:
    return Tokenization(tuple(message.token_ids), message.max_context)


def models_from_pb(message: pb.ListModelsResponse) -> tuple[ModelInfo, ...]:
    return tuple(copy_fields(ModelInfo, model) for model in message.models)


def status_from_pb(message: pb.GetClusterStatusResponse) -> ClusterStatus:
    return ClusterStatus(
        model=message.model,
        workers=tuple(map(worker_from_pb, message.workers)),
        active_requests=message.active_requests,
        membership_fresh=message.membership_fresh,
        version=message.version,
        routers=tuple(copy_fields(RouterStatus, router) for router in message.routers),
        waiting_requests=message.waiting_requests,
        transfers=tuple(copy_fields(TransferRate, rate) for rate in message.transfers),
    )


def worker_from_pb(message: pb.WorkerStatus) -> WorkerStatus:
    return WorkerStatus(
        worker_id=message.worker_id,
        epoch=message.epoch,
        roles=tuple(message.roles),
        state=message.state,
        address=message.address,
        pid=message.pid,
        host=message.host,
        load=copy_fields(WorkerLoad, message.load),
        possible_roles=tuple(message.possible_roles),
        roles_until_unix_s=message.roles_until_unix_s,
    )


def scale_from_pb(message: ScaleWorkersResponse) -> ScaleStatus:
    return ScaleStatus(
        prefill=message.prefill,
        decode=message.decode,
        done=message.done,
        starting=tuple(message.starting),
        leaving=tuple(message.leaving),
        problem=message.problem,
    )
