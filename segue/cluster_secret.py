"""What the processes of one cluster know and nobody else: the secret that makes a process a member.

Nothing ever sends it. Each use has a key of its own, made from it one way, so that none gives away another. Whoever has the
secret is a member of every kind: it tells members from strangers, not routers from workers.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets

from segue.errors import ConfigError

SETTING = "cluster_secret (SEGUE_CLUSTER_SECRET)"
# A guess can be checked without asking anybody, as of every key: only what cannot be guessed at all is a secret.
_MIN_CHARACTERS = 32


def new_secret() -> str:
    return secrets.token_hex(32)


def check_secret(text: str) -> str:
    """For settings: empty means that there is none. Raises ValueError, which does not show it."""
    if text and len(text) < _MIN_CHARACTERS:
        raise ValueError(f"must have at least {_MIN_CHARACTERS} random characters; make one with: openssl rand -hex 32")
    return text


class ClusterSecret:
    """Made by `of`."""

    def __init__(self, text: str) -> None:
        self._text = text.encode()

    @classmethod
    def of(cls, text: str) -> ClusterSecret | None:
        return cls(text) if text else None

    def key(self, purpose: str) -> bytes:
        """32 bytes for one use: HMAC-SHA256, the one-block form of HKDF-Expand (RFC 5869)."""
        return hmac.digest(self._text, b"segue " + purpose.encode() + b"\x01", "sha256")

    @property
    def fingerprint(self) -> str:
        """Tells two secrets apart, for those who could be given either by mistake."""
        return self.key("fingerprint")[:8].hex()


def cache_salt(tenant: str, secret: ClusterSecret | None) -> bytes:
    """Separates a tenant's prefix caches from those of all others; empty for callers without a tenant, who share theirs.

    Equal in every router of a cluster. No client can choose it, so that it separates without a secret as well.
    """
    if not tenant:
        return b""
    key = secret.key("tenants") if secret is not None else b""
    return hashlib.blake2b(tenant.encode(), key=key, digest_size=16, person=b"segue-tenant").digest()


def differing_secret(who: str, theirs: str, own: str) -> ConfigError | None:
    """What is wrong when `who` says another fingerprint than this process has; None when nothing is."""
    if hmac.compare_digest(theirs, own):
        return None
    if not own or not theirs:
        problem = f"{who} has a cluster secret and this process none" if theirs else f"{who} has none and this process one"
    else:
        problem = f"{who} has another one than this process"
    return ConfigError(f"{SETTING}: {problem}; give every router and worker of the cluster the same")
