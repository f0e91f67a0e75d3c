"""Runs in a peer's interpreter: only the standard library, numpy and the peer may be imported here."""
