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
    data = array("I", token_ids).tobytes()
    block_bytes = 4 * block_size
    hashes = []
    for start in range(0, len(data) - block_bytes + 1, block_bytes):
        chained = hashlib.blake2b(chained + data[start : start + block_bytes], digest_size=HASH_BYTES).digest()
        hashes.append(chained)
    return hashes
