"""Settings of every process, checked once, at the start. Each setting may come from four places, first found wins:

    command line flag  >  environment (SEGUE_<NAME>)  >  TOML file  >  default

`ClusterSettings` is what a person sets; `RouterSettings` and `WorkerSettings` are what one process needs, passed to it through
its environment, so that no secret (a Redis URL with a password) shows in a process list.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from segue.chaos import check_chaos
from segue.cluster_secret import ClusterSecret, check_secret
from segue.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"
LOOPBACK = "127.0.0.1"
# Workers of one role.
MAX_POOL = 64
LOOPBACK_NAMES = frozenset({LOOPBACK, "localhost", "::1"})

_SIZE_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def parse_bytes(value: object) -> object:
    """`512MiB`, `2g` or a plain number, in bytes; anything else is left for the validator to refuse."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", str(value).strip().lower())
    return int(float(match[1]) * _SIZE_UNITS[match[2]]) if match else value


def parse_names(value: object) -> object:
    """`prefill,decode` as a tuple; anything but text is left for the validator."""
    return tuple(part for part in value.split(",") if part) if isinstance(value, str) else value


def parse_amounts(value: object) -> object:
    """`prefill_node=1,memory=2e9` as a dict; anything but text is left for the validator."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part]
    return {name.strip(): amount.strip() for name, _, amount in pairs}


Amounts = Annotated[dict[str, Annotated[float, Field(gt=0)]], BeforeValidator(parse_amounts)]
NumBytes = Annotated[int, BeforeValidator(parse_bytes)]
Port = Annotated[int, Field(ge=0, le=65535)]
Dtype = Literal["float32", "bfloat16"]
KVDtype = Literal["auto", "float32", "bfloat16", "int8"]
Quantization = Literal["none", "int8", "int4"]
LinearName = Literal["qkv", "attention_output", "gate_up", "down", "head"]
KVTransport = Literal["auto", "shm", "tcp", "dist"]
KVWire = Literal["stored", "bfloat16", "int8"]
Role = Literal["prefill", "decode"]
LogFormat = Literal["text", "json"]
PolicyName = Literal["cost", "least_loaded", "round_robin", "random"]


class Settings(BaseModel):
    """Base of all settings: unknown names and bad values raise ConfigError, naming each."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def load(
        cls,
        *,
        flags: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        file: Path | None = None,
    ) -> Self:
        """`flags` that are None count as not given. `env` is os.environ unless given."""
        values: dict[str, Any] = _read_toml(file) if file else {}
        source = os.environ if env is None else env
        for name in cls.model_fields:
            if (text := source.get(f"SEGUE_{name.upper()}")) is not None:
                values[name] = text
        values |= {name: value for name, value in (flags or {}).items() if value is not None}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problems = "; ".join(": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"]))) for e in error.errors())
            raise ConfigError(f"bad settings: {problems}") from None

    def to_env(self) -> dict[str, str]:
        """The environment that `load` turns into these settings again."""
        return {
            f"SEGUE_{name.upper()}": ",".join(value) if isinstance(value, list | tuple) else str(value)
            for name, value in self.model_dump().items()
            if value is not None
        }


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from None


class MemberSettings(Settings):
    """What makes a process a member of its cluster. Never a flag: command lines can be read by everyone on the machine."""

    cluster_secret: Annotated[str, AfterValidator(check_secret)] = Field(
        "", repr=False, description="Known to the cluster's processes alone; without it, whoever reaches their ports is let in"
    )

    @property
    def secret(self) -> ClusterSecret | None:
        return ClusterSecret.of(self.cluster_secret)


class EngineSettings(Settings):
    """What decides how a worker computes; all workers of a cluster share it."""

    dtype: Dtype = Field("float32", description="Number format of weights that are not quantized")
    quantization: Quantization = Field("none", description="Weights of linear layers: none, int8 (W8A8) or int4 (group-wise)")
    decode_quantization: Quantization | None = Field(
        None, description="The same for workers that only decode; as `quantization` if not given"
    )
    keep_float: Annotated[tuple[LinearName, ...], BeforeValidator(parse_names)] = Field(
        (), description=f"Linear layers that are never quantized, of {', '.join(get_args(LinearName))}"
    )
    kv_dtype: KVDtype = Field(
        "auto", description="Number format of the KV cache; auto is bfloat16 with quantized weights, else the dtype"
    )
    decode_kv_dtype: KVDtype | None = Field(
        None, description="The same for workers that only decode; needs --kv-wire where it differs"
    )
    kv_wire: KVWire = Field("stored", description="Number format in which KV travels between workers; smaller is lossy")
    device: Literal["cpu", "cuda"] = Field("cpu", description="Where to compute")
    prefill_tp: int = Field(1, ge=1, description="Tensor-parallel ranks of each prefill worker, processes that share its model")
    decode_tp: int = Field(1, ge=1, description="Tensor-parallel ranks of each decode worker")
    kv_memory: NumBytes = Field(2**29, ge=1, description="Memory for KV cache of each worker, in bytes")
    block_size: int = Field(32, ge=1, le=256, description="Tokens in one KV block")
    decode_block_size: int | None = Field(None, ge=1, le=256, description="The same for workers that only decode")
    threads: int = Field(0, ge=0, description="Compute threads of each worker; 0 shares out the cores")
    max_prefill_tokens: int = Field(
        256, ge=1, description="Prompt tokens computed in one step: few fit the caches of a CPU, GPUs want thousands"
    )
    max_batch: int = Field(64, ge=1, description="Sequences that one worker decodes at a time")
    kv_pull: bool = Field(True, description="Fetch what decode has of a conversation instead of computing it")
    kv_transport: KVTransport = Field("auto", description="How KV travels between workers")
    kv_encryption: bool = Field(
        True, description="Let only processes with the cluster secret at KV sockets, and encrypt; slows TCP, not shared memory"
    )
    chaos: Annotated[str, AfterValidator(check_chaos)] = Field(
        "", description='Faults to inject, such as "seed=1,drop=0.01,kill=decode@push:3" (docs/chaos.md); none if not given'
    )

    @property
    def kv_format(self) -> str:
        """The number format that `kv_dtype` stands for."""
        if self.kv_dtype != "auto":
            return self.kv_dtype
        return self.dtype if self.quantization == "none" else "bfloat16"

    @property
    def weights(self) -> str:
        """Names the formats of all weights in the cluster: only where it is equal is KV computed alike."""
        formats = {self.quantization, self.decode_quantization or self.quantization}
        quantized = "/".join((self.quantization, self.decode_quantization or self.quantization)) if formats != {"none"} else ""
        kept = ",".join(sorted(self.keep_float)) if quantized else ""
        return " ".join(part for part in (self.dtype, quantized, kept and f"but {kept}") if part)


class RoutingSettings(Settings):
    """How a router chooses workers."""

    policy: PolicyName = Field("cost", description="How a request's workers are chosen")
    max_wait_s: float = Field(30.0, gt=0, description="Seconds that a request may have to wait for its turn; refused otherwise")
    disaggregate: Literal["auto", "always"] = Field(
        "auto", description="auto lets one worker run both phases of a request where that costs less; always never does"
    )


class DoorSettings(Settings):
    """Whom a router lets in, and what it shows to them."""

    api_keys_file: Path | None = Field(
        None, description="File of API keys, as `segue keys create` writes it; without it nobody needs a key"
    )
    tls_cert: Path | None = Field(None, description="Certificate chain (PEM) for both APIs: they then speak TLS alone")
    tls_key: Path | None = Field(None, description="Private key of --tls-cert (PEM)")
    tls_client_ca: Path | None = Field(
        None, description="Authorities (PEM), one of which must have signed each client's certificate: mutual TLS"
    )

    @model_validator(mode="after")
    def _tls_is_whole(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: give both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca: needs tls_cert and tls_key")
        return self


class ObservabilitySettings(Settings):
    """What every process tells of its work, besides metrics."""

    log_format: LogFormat = Field("text", description="Logs as lines of text, or one JSON object a line")
    otlp_endpoint: Annotated[str, Field(pattern=r"^https?://\S+$")] | None = Field(
        None,
        description="Where an OpenTelemetry collector takes OTLP over HTTP (http://HOST:4318); no traces if not given",
    )
    trace_ratio: float = Field(1.0, ge=0, le=1, description="Of requests whose caller has not decided, the part that is traced")


class ClusterSettings(EngineSettings, RoutingSettings, MemberSettings, DoorSettings, ObservabilitySettings):
    """All that `segue up` takes."""

    model: str = Field(DEFAULT_MODEL, description="Model directory, .gguf file, Hub id or name of an imported model")
    prefill: int = Field(1, ge=1, le=MAX_POOL, description="Prefill workers")
    decode: int = Field(1, ge=1, le=MAX_POOL, description="Decode workers")
    colocated: bool = Field(False, description="Run both phases in one worker, for comparison")
    redis: str | None = Field(None, repr=False, description="Redis or Valkey URL; without it an embedded Valkey is started")
    cluster_id: str | None = Field(
        None, min_length=1, description="Name in the Redis, for further routers to find the workers by; random if not given"
    )
    ray_address: str | None = Field(None, description="Ray cluster to join; without it a local Ray is started")
    prefill_resources: Amounts = Field({}, description="Custom Ray resources that each prefill rank takes, NAME=AMOUNT,...")
    decode_resources: Amounts = Field({}, description="The same for decode workers")
    host: str = Field(LOOPBACK, description="Address that the router listens on")
    routers: int = Field(1, ge=1, le=16, description="Routers on this host, behind one address")
    http_port: Port = Field(8000, description="OpenAI-compatible HTTP API; 0 picks a free port")
    grpc_port: Port = Field(50051, description="gRPC API; 0 picks a free port")


class RouterSettings(RoutingSettings, MemberSettings, DoorSettings, ObservabilitySettings):
    cluster_id: str
    redis: str = Field(repr=False)
    # Unique in the cluster; drawn if not given.
    router_id: str = ""
    model_dir: Path
    model_name: str
    host: str = LOOPBACK
    http_port: Port = 8000
    grpc_port: Port = 50051
    # Other routers on this host may listen on the same ports: the kernel gives each new connection to one of them.
    shares_ports: bool = False
    member_lease_ms: int = Field(3_000, ge=100)
    max_active_requests: int = Field(1024, ge=1)
    max_waiting_requests: int = Field(4096, ge=1)
    max_body: NumBytes = 8 * 2**20
    # To each of the two APIs.
    max_connections: int = Field(4096, ge=1)
    request_timeout_s: float = Field(600.0, gt=0)
    # How long a router that was told to stop waits for the requests it has.
    drain_s: float = Field(10.0, ge=0)
    # How often a request may be started in all, when workers are lost or hand-overs fail.
    max_attempts: int = Field(8, ge=1)


class WorkerSettings(EngineSettings, MemberSettings, ObservabilitySettings):
    cluster_id: str
    redis: str = Field(repr=False)
    worker_id: str
    roles: Annotated[tuple[Role, ...], BeforeValidator(parse_names)] = Field(min_length=1)
    model_dir: Path
    model_name: str
    # The address this worker listens on and is reached at.
    host: str = LOOPBACK
    # Where routers reach it, and where KV comes in; 0 picks a free port. Each further rank takes KV at the next port.
    grpc_port: Port = 0
    kv_port: Port = 0
    # Where it says how it is, to anybody (deploy/worker_health.py); nowhere if not given.
    health_port: Port | None = None
    # How long a worker that was told to stop waits for the sequences it has.
    drain_s: float = Field(60.0, ge=0)
    ticket_lease_ms: int = Field(10_000, ge=100)
    member_lease_ms: int = Field(3_000, ge=100)
    # Which of the worker's ranks this process is. `group` names this start of the worker: equal for all of its ranks.
    rank: int = Field(0, ge=0)
    group: str = ""

    @property
    def only_decodes(self) -> bool:
        return self.roles == ("decode",)

    @property
    def own_quantization(self) -> Quantization:
        """How this worker holds its weights."""
        return (self.decode_quantization if self.only_decodes else None) or self.quantization

    @property
    def possible_roles(self) -> tuple[Role, ...]:
        """Those whose weights, KV cache and ranks are as this worker has them."""

        def loaded(worker: WorkerSettings) -> tuple[str, int, str, int]:
            return worker.own_quantization, worker.own_kv.block_size, worker.own_kv.kv_dtype, worker.num_ranks

        return tuple(role for role in get_args(Role) if loaded(self.model_copy(update={"roles": (role,)})) == loaded(self))

    @property
    def num_ranks(self) -> int:
        return self.decode_tp if self.only_decodes else self.prefill_tp

    @property
    def num_ranks_field(self) -> str:
        """The setting that `num_ranks` is."""
        return "decode_tp" if self.only_decodes else "prefill_tp"

    @property
    def own_kv(self) -> Self:
        """These settings with the block size and KV format of this worker's role."""
        if not self.only_decodes:
            return self
        own = {"block_size": self.decode_block_size or self.block_size, "kv_dtype": self.decode_kv_dtype or self.kv_dtype}
        return self.model_copy(update=own)

    @property
    def number_formats(self) -> str:
        """All that decides the bits of what this worker computes for an answer; empty where KV loses bits on its way."""
        if self.kv_wire != "stored":
            return ""
        kept = ",".join(sorted(self.keep_float))
        return f"{self.dtype} {self.own_quantization} {kept} {self.own_kv.kv_dtype} {self.device}"

    @property
    def wire_dtype(self) -> str:
        """Empty: as it is stored."""
        return "" if self.kv_wire == "stored" else self.kv_wire
