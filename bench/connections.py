"""Cuts connections of other processes, as a network that fails would: both sides see an end at once."""

from __future__ import annotations

import ctypes
import os
import socket
from contextlib import suppress
from pathlib import Path
from random import Random

_SYS_PIDFD_GETFD = 438  # on every architecture


def cut_connection(pid: int, chance: Random) -> bool:
    """Shuts one established TCP connection of the process down, chosen at random; False when it has none.

    Raises PermissionError where this process may not reach into that one: it may if it started it, or as root.
    """
    pidfd = os.pidfd_open(pid)
    try:
        numbers = [int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir() if _is_socket(entry)]
        chance.shuffle(numbers)
        return any(_shut_down(pidfd, number) for number in numbers)
    finally:
        os.close(pidfd)


def _is_socket(entry: Path) -> bool:
    try:
        return entry.readlink().name.startswith("socket:")
    except FileNotFoundError:  # closed meanwhile
        return False


def _shut_down(pidfd: int, number: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    # The same connection, not a copy of it: what happens to it here happens to the other process.
    own = libc.syscall(_SYS_PIDFD_GETFD, pidfd, number, 0)
    if own < 0:
        error = ctypes.get_errno()
        if error == 1:
            raise PermissionError("this process may not reach into the other one's connections")
        return False
    with socket.socket(fileno=own) as connection:
        if connection.family not in {socket.AF_INET, socket.AF_INET6} or connection.type != socket.SOCK_STREAM:
            return False
        with suppress(OSError):  # it listens
            connection.getpeername()
            connection.shutdown(socket.SHUT_RDWR)
            return True
    return False
