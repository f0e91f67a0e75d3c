"""The peers beside Segue's engine: vLLM and llama.cpp, each in an environment of its own, on one core, with the same weights;
and NIXL, which moves memory as kv_transfer does.

    python -m bench.peers setup          creates all of it, once
    find_peers() → Peer(spec, core)      one process for each peer, asked in turns (A B A B ...)

`setup` and `client` run in Segue's environment. What is in `drivers` runs in a peer's.
"""

from bench.peers.catalog import PeerSpec, find_peers
from bench.peers.client import Peer, PeerError

__all__ = ["Peer", "PeerError", "PeerSpec", "find_peers"]
