"""Whether this machine lets a test have hosts, networks and root file systems of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from functools import cache

# One of each kind of thing that the tests make; it is gone with the command.
_PROBE = """
set -e
ip link add one type veth peer name other
ip link add bridge type bridge
mkdir $0/upper $0/work $0/root
mount -t overlay overlay -o lowerdir=/,upperdir=$0/upper,workdir=$0/work,volatile $0/root
"""


@cache
def what_is_missing() -> str:
    """Empty if nothing is."""
    if os.getuid() != 0:
        return "hosts, networks and mounts of a test's own need root"
    with tempfile.TemporaryDirectory() as folder:
        words = ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "sh", "-c", _PROBE, folder]
        try:
            done = subprocess.run(words, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return "hosts of a test's own need unshare, of util-linux"
    if done.returncode:
        return f"this machine gives no namespaces, networks or overlays to a test: {done.stderr.strip()}"
    return ""
