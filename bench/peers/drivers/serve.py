"""`python serve.py OPTIONS`: loads one peer in this process and answers measurements until stdin ends.

One JSON object a line. When loaded it says `{"ready": {"version": ..., "format": ...}}`; then each request gets one answer:

    {"do": "prefill", "tokens": 1024}                          →  {"seconds": 1.6}
    {"do": "decode", "batch": 4, "context": 256, "steps": 8}   →  {"seconds": 0.05}, the median of the steps
    either, if the peer cannot do it                           →  {"error": "..."}

OPTIONS is a JSON object: `core` and `driver`; the rest is for the driver: `model`, `clock` ("wall" or "cpu": seconds that pass,
or that this process computes), and what else the catalog says. Between requests the process sleeps in a read.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO


class Driver(Protocol):
    """What `load(options)` of a driver module returns. Measurements raise ValueError for what the peer cannot do."""

    def facts(self) -> Mapping[str, str]: ...

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds from a prompt nobody saw before to its first token's logits."""
        ...

    def decode_steps_s(self, batch_size: int, context: int, num_steps: int) -> Sequence[float]:
        """Seconds of each of some steps in which every sequence, `context` tokens long, gets one more token."""
        ...


def main() -> None:
    options = json.loads(sys.argv[1])
    # Before anything is imported that counts cores or starts threads.
    os.sched_setaffinity(0, {options["core"]})
    # Libraries that print would break the protocol: what they write to stdout goes to the log.
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        driver: Driver = importlib.import_module(options["driver"]).load(options)
        # Loading may have started threads or bound this one elsewhere.
        os.sched_setaffinity(0, {options["core"]})
        _say(replies, {"ready": dict(driver.facts())})
        for line in sys.stdin:
            _say(replies, answer(driver, json.loads(line)))


def answer(driver: Driver, request: Mapping[str, Any]) -> dict[str, Any]:
    try:
        match request["do"]:
            case "prefill":
                return {"seconds": driver.prefill_s(request["tokens"])}
            case "decode":
                steps = driver.decode_steps_s(request["batch"], request["context"], request["steps"])
                return {"seconds": statistics.median(steps)}
            case other:
                return {"error": f"nothing is known of {other!r}"}
    except ValueError as error:
        return {"error": str(error)}


def _say(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
