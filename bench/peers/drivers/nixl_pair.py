"""Reads of memory between two processes through NIXL's UCX backend, in the peer's interpreter: `python nixl_pair.py`.

    {"bytes": 1048576, "piece_bytes": 65536}  →  {"seconds": ...}

One JSON object a line. The seconds are those from posting a prepared transfer until it is done; that the bytes arrived is
checked after each. UCX_TLS in the environment says what UCX may use; nothing: all it has.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any, TextIO

import numpy as np
from nixl._api import nixl_agent, nixl_agent_config  # type: ignore[import-not-found]  # only in the peer's environment

_MAX_BYTES = 2**26
_FILLING = 0x5A


class Memory:
    """An agent and the memory that it has registered."""

    def __init__(self, name: str, filling: int) -> None:
        self.array = np.full(_MAX_BYTES, filling, np.uint8)
        self.address: int = self.array.ctypes.data
        self.agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
        self.agent.register_memory([(self.address, _MAX_BYTES, 0, "")], "DRAM")

    def pieces(self, address: int, num_bytes: int, piece_bytes: int) -> Any:
        return self.agent.get_xfer_descs([(address + at, piece_bytes, 0) for at in range(0, num_bytes, piece_bytes)], "DRAM")


class Initiator:
    def __init__(self, target: subprocess.Popen[str]) -> None:
        self._memory = Memory("initiator", 0)
        assert target.stdout is not None
        peer = json.loads(target.stdout.readline())
        self._peer_address: int = peer["address"]
        self._peer = self._memory.agent.add_remote_agent(bytes.fromhex(peer["metadata"]))
        self._transfers: dict[tuple[int, int], Any] = {}

    def read_s(self, num_bytes: int, piece_bytes: int) -> float:
        memory, size = self._memory, (num_bytes, piece_bytes)
        if size not in self._transfers:
            own, other = (memory.pieces(address, *size) for address in (memory.address, self._peer_address))
            self._transfers[size] = memory.agent.initialize_xfer("READ", own, other, self._peer)
        memory.array[:num_bytes] = 0
        begin_s = time.perf_counter()
        state = memory.agent.transfer(self._transfers[size])
        while state == "PROC":
            state = memory.agent.check_xfer_state(self._transfers[size])
        seconds = time.perf_counter() - begin_s
        if state != "DONE" or not (memory.array[:num_bytes] == _FILLING).all():
            raise RuntimeError(f"a transfer of {num_bytes} bytes ended as {state}, or without the bytes")
        return seconds


def serve_target(replies: TextIO) -> None:
    """Lends its memory until stdin ends; NIXL's own thread answers the reads."""
    memory = Memory("target", _FILLING)
    _say(replies, {"address": memory.address, "metadata": memory.agent.get_agent_metadata().hex()})
    sys.stdin.read()


def serve_initiator(replies: TextIO) -> None:
    command = [sys.executable, __file__, "target"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as target:
        initiator = Initiator(target)
        for line in sys.stdin:
            request = json.loads(line)
            _say(replies, {"seconds": initiator.read_s(request["bytes"], request["piece_bytes"])})


def _say(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    # What NIXL prints goes to the log.
    with os.fdopen(os.dup(1), "w") as own_stdout:
        os.dup2(2, 1)
        (serve_target if sys.argv[1:] == ["target"] else serve_initiator)(own_stdout)
