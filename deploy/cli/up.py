"""`segue up`: start a cluster on this machine, or on a running Ray, and keep it serving."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic_core import PydanticUndefined

from deploy.cli.console import errors_reported
from segue.config import ClusterSettings


def _flag(name: str, *, shape: str = "", flag: str = "") -> Any:
    """The option for the setting `name`: it is None unless given, and the setting's own description is its help."""
    field = ClusterSettings.model_fields[name]
    default = "" if field.default in (None, (), "", {}, PydanticUndefined) else f" (default {field.default})"
    return typer.Option(
        flag or f"--{name.replace('_', '-')}",
        help=f"{field.description or name.replace('_', ' ').capitalize()}{default}",
        metavar=shape or None,
        show_default=False,
    )


def up(
    model: Annotated[str | None, _flag("model")] = None,
    prefill: Annotated[int | None, _flag("prefill", shape="N")] = None,
    decode: Annotated[int | None, _flag("decode", shape="N")] = None,
    colocated: Annotated[bool | None, _flag("colocated", flag="--colocated/--disaggregated")] = None,
    prefill_tp: Annotated[int | None, _flag("prefill_tp", shape="N")] = None,
    decode_tp: Annotated[int | None, _flag("decode_tp", shape="N")] = None,
    redis: Annotated[str | None, _flag("redis", shape="URL")] = None,
    cluster_id: Annotated[str | None, _flag("cluster_id", shape="NAME")] = None,
    ray_address: Annotated[str | None, _flag("ray_address", shape="HOST:PORT")] = None,
    prefill_resources: Annotated[str | None, _flag("prefill_resources", shape="NAME=AMOUNT,...")] = None,
    decode_resources: Annotated[str | None, _flag("decode_resources", shape="NAME=AMOUNT,...")] = None,
    host: Annotated[str | None, _flag("host", shape="ADDRESS")] = None,
    routers: Annotated[int | None, _flag("routers", shape="N")] = None,
    http_port: Annotated[int | None, _flag("http_port", shape="PORT")] = None,
    grpc_port: Annotated[int | None, _flag("grpc_port", shape="PORT")] = None,
    api_keys_file: Annotated[Path | None, _flag("api_keys_file", shape="FILE", flag="--api-keys")] = None,
    tls_cert: Annotated[Path | None, _flag("tls_cert", shape="FILE")] = None,
    tls_key: Annotated[Path | None, _flag("tls_key", shape="FILE")] = None,
    tls_client_ca: Annotated[Path | None, _flag("tls_client_ca", shape="FILE")] = None,
    dtype: Annotated[str | None, _flag("dtype", shape="float32|bfloat16")] = None,
    quantization: Annotated[str | None, _flag("quantization", shape="none|int8|int4")] = None,
    decode_quantization: Annotated[str | None, _flag("decode_quantization", shape="none|int8|int4")] = None,
    keep_float: Annotated[str | None, _flag("keep_float", shape="LAYERS")] = None,
    kv_dtype: Annotated[str | None, _flag("kv_dtype", shape="auto|float32|bfloat16|int8")] = None,
    decode_kv_dtype: Annotated[str | None, _flag("decode_kv_dtype", shape="auto|float32|bfloat16|int8")] = None,
    kv_wire: Annotated[str | None, _flag("kv_wire", shape="stored|bfloat16|int8")] = None,
    device: Annotated[str | None, _flag("device", shape="cpu|cuda")] = None,
    kv_memory: Annotated[str | None, _flag("kv_memory", shape="SIZE")] = None,
    block_size: Annotated[int | None, _flag("block_size", shape="TOKENS")] = None,
    decode_block_size: Annotated[int | None, _flag("decode_block_size", shape="TOKENS")] = None,
    threads: Annotated[int | None, _flag("threads", shape="N")] = None,
    max_prefill_tokens: Annotated[int | None, _flag("max_prefill_tokens", shape="TOKENS")] = None,
    max_batch: Annotated[int | None, _flag("max_batch", shape="N")] = None,
    kv_pull: Annotated[bool | None, _flag("kv_pull", flag="--kv-pull/--no-kv-pull")] = None,
    kv_transport: Annotated[str | None, _flag("kv_transport", shape="auto|shm|tcp|dist")] = None,
    policy: Annotated[str | None, _flag("policy", shape="cost|least_loaded|round_robin|random")] = None,
    max_wait_s: Annotated[float | None, _flag("max_wait_s", shape="SECONDS")] = None,
    disaggregate: Annotated[str | None, _flag("disaggregate", shape="auto|always")] = None,
    kv_encryption: Annotated[bool | None, _flag("kv_encryption", flag="--kv-encryption/--no-kv-encryption")] = None,
    chaos: Annotated[str | None, _flag("chaos", shape="FAULTS")] = None,
    log_format: Annotated[str | None, _flag("log_format", shape="text|json")] = None,
    otlp_endpoint: Annotated[str | None, _flag("otlp_endpoint", shape="URL")] = None,
    trace_ratio: Annotated[float | None, _flag("trace_ratio", shape="0..1")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file with any of these settings.", show_default=False)] = None,
) -> None:
    """Start a cluster and keep it serving until Ctrl-C: router, prefill and decode workers under Ray, and the store that
    they meet in.

    Each setting may also come from the environment (SEGUE_MODEL, SEGUE_HTTP_PORT, ...) or from the --config file;
    a flag wins over the environment, and that over the file.
    """
    flags = {name: value for name, value in locals().items() if name in ClusterSettings.model_fields}
    with errors_reported():
        settings = ClusterSettings.load(flags=flags, file=config)
        from deploy.cli.serving import serve

        raise typer.Exit(serve(settings))
