"""A request's path in the short forms that travel with its answer: structured header fields (RFC 8941, W3C Server Timing)."""

from __future__ import annotations

from typing import Any

from google.protobuf.json_format import MessageToDict

from router.sequence import SequencePath
from segue.v1 import inference_pb2 as pb

PATH_HEADER = "x-segue-path"
TIMING_HEADER = "server-timing"


def path_text(path: SequencePath) -> str:
    """`prefill="prefill-0", decode="decode-1", placement="split", transport="shm", attempts=1, prefill-cached=96, ...`: what is
    known by now. An attempt that failed is named by its error: `failed="worker_lost"`."""
    texts = {
        "prefill": path.prefill_worker,
        "decode": path.decode_worker,
        "placement": path.placement,
        "transport": path.transport,
        "failed": " ".join(attempt.error.code for attempt in path.failed_attempts),
    }
    numbers = {
        "attempts": path.attempts,
        "prefill-cached": path.prefill_cached_tokens,
        "prefill-pulled": path.prefill_pulled_tokens,
        "decode-cached": path.decode_cached_tokens,
        "transferred": path.transferred_bytes,
    }
    parts = [f'{name}="{_plain(value)}"' for name, value in texts.items() if value]
    return ", ".join(parts + [f"{name}={value}" for name, value in numbers.items()])


def timing_text(path: SequencePath) -> str:
    """`queue;dur=0.2, reserve;dur=0.9, ...` in milliseconds, of the last attempt."""
    attempt = path.to_pb().timeline[-1]
    seconds = {
        "queue": attempt.queue_s,
        "reserve": attempt.reserve_s,
        "prefill": attempt.prefill_s,
        "transfer-hidden": attempt.transfer_hidden_s,
        "transfer-exposed": attempt.transfer_exposed_s,
        "decode": attempt.decode_s,
    }
    return ", ".join(f"{name};dur={1000 * value:.1f}" for name, value in seconds.items())


def path_json(path: pb.RequestPath) -> dict[str, Any]:
    """All of it, under the names of inference.proto."""
    return MessageToDict(path, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def _plain(text: str) -> str:
    """What a quoted header value can hold."""
    return "".join(letter for letter in text if " " <= letter <= "~" and letter not in '"\\')
