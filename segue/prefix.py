"""Chained hashes of full blocks: equal hashes mean equal tokens from the prompt's start, in the same cache salt.

Stable over processes and hosts (never `hash()`), and cryptographic, since a collision would hand one prompt's KV to another.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

HASH_BYTES = 16


def block_hashes(token_ids: Sequence[int], block_size: int, salt: bytes = b"", parent: bytes = b"") -> list[bytes]:
    """Hashes of the full blocks of `token_ids`, in order.

    `parent` is the hash of the block before the first (empty at the prompt's start); `salt` separates caches that must
    not see each other and only matters where `parent` is empty.
    """
    chained = parent or hashlib.blake2b(salt, digest_size=HASH_BYTES, person=b"segue-prefix").digest()
    hashes = []
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        block = array("I", token_ids[start : start + block_size]).tobytes()
        chained = hashlib.blake2b(chained + block, digest_size=HASH_BYTES).digest()
        hashes.append(chained)
    return hashes
