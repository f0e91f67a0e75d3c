"""What both transports share: defaults, and how the connection behaves."""

from __future__ import annotations

DEFAULT_ADDRESS = "127.0.0.1:50051"
# A whole answer; a slow machine may take minutes for a long one.
DEFAULT_TIMEOUT_S = 600.0
# Calls that compute nothing.
CONTROL_TIMEOUT_S = 10.0
READY_TIMEOUT_S = 60.0

CHANNEL_OPTIONS: tuple[tuple[str, int], ...] = (
    # Retries are decided in retry.py, where it is known whether output was given out.
    ("grpc.enable_retries", 0),
    # A router that comes back is found at once, not after gRPC's default of up to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)
