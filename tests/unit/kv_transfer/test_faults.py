"""Injected faults do what they are named for, and whatever is lost, both sides come to an end and serve on."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import pytest

from kv_transfer.faults import InjectedFaults
from segue.chaos import FRAMES, Chaos, ChaosSpec, Fate, Strike, Strikes
from segue.errors import ChecksumMismatch, TransferError

TIMEOUT_S = 30
PREFILL_FRAMES = ("hello", "open", "push", "commit", "abandon", "revoked")
DECODE_FRAMES = ("welcome", "opened", "receipt", "revoke")
# So short that the receiver looks often for connections that are gone.
LEASE_MS = 400


class OneFault(Chaos):
    """The first frame of one kind meets its fate, all others pass."""

    def __init__(self, frame: str, fault: str) -> None:
        super().__init__(ChaosSpec(), "worker", ())
        self.frame = frame
        self.fault = fault
        self.met = asyncio.Event()

    def fate(self, frame: str) -> Fate:
        is_hit = frame == self.frame and not self.met.is_set()
        if is_hit:
            self.met.set()
        return Fate(0.0, is_hit and self.fault == "drop", is_hit and self.fault == "cut")


async def transfer(pair: Any, receiver: Any, sender: Any, target: int, frame: str) -> TransferError | None:
    """One transfer in which `frame` occurs, to its end, and its block taken back. Gives the writer's error."""
    incoming = receiver.expect(0, [target])
    opened = asyncio.Event()

    async def write() -> None:
        push = await sender.open(incoming.ticket)
        for layer in range(pair.layout.num_layers):
            push.send(layer, [0], range(1))
        opened.set()
        if frame == "abandon":
            await push.abandon("enough")
        elif frame in {"revoke", "revoked"}:
            await push.revoked.wait()
        await push.commit(1)

    async def read() -> None:
        if frame in {"revoke", "revoked"}:
            await opened.wait()
            await incoming.fence()
        await incoming.arrival()
        incoming.accept()

    async with asyncio.timeout(TIMEOUT_S):
        ends = await asyncio.gather(write(), read(), return_exceptions=True)
        assert all(end is None or isinstance(end, TransferError) for end in ends), ends
        await incoming.fence()
    assert ends[0] is not None or ends[1] is None, "a receipt is for what was taken over"
    return ends[0]


@pytest.mark.parametrize(
    ("frame", "fault"),
    [
        *((frame, "drop") for frame in (*PREFILL_FRAMES, *DECODE_FRAMES)),
        *((frame, "cut") for frame in ("push", "commit", "receipt")),
    ],
)
async def test_whatever_frame_is_lost_both_sides_end_and_serve_on(pair, transport, frame, fault):
    chaos = OneFault(frame, fault)
    receiver = await pair.receiver(lease_ms=LEASE_MS, faults=InjectedFaults(chaos))
    sender = await pair.sender(transports=(transport,), faults=InjectedFaults(chaos))
    await transfer(pair, receiver, sender, 3, frame)
    await asyncio.wait_for(chaos.met.wait(), TIMEOUT_S)
    pair.assert_untouched(except_blocks=[3])
    # One transfer may still run into the end of the connection.
    if await transfer(pair, receiver, sender, 9, "push") is not None:
        assert await transfer(pair, receiver, sender, 9, "push") is None
    pair.assert_equal([0], [9])


async def test_a_sender_that_lost_its_connection_ends_the_quarantine_by_itself(pair):
    """No further push has to come along: blocks would be withheld for as long as none does."""
    receiver = await pair.receiver()
    sender = await pair.sender(transports=("shm",), faults=InjectedFaults(OneFault("push", "cut")))
    incoming = receiver.expect(0, [1])
    push = await sender.open(incoming.ticket)
    push.send(0, [0], range(1))
    with pytest.raises(TransferError, match="cut"):
        await asyncio.wait_for(push.commit(1), TIMEOUT_S)
    await asyncio.wait_for(incoming.fence(), TIMEOUT_S)


async def test_a_flipped_bit_is_noticed_and_nothing_but_the_target_is_touched(pair, transport):
    before = bytes(pair.source.buffer)
    receiver = await pair.receiver()
    spec = ChaosSpec.parse("seed=1,corrupt=1")
    sender = await pair.sender(transports=(transport,), faults=InjectedFaults(Chaos(spec, "prefill-0", ["prefill"])))
    incoming = receiver.expect(0, [1, 2])
    push = await sender.open(incoming.ticket)
    push.send(0, [0, 1], range(2))
    with pytest.raises(ChecksumMismatch):
        await asyncio.wait_for(incoming.arrival(), TIMEOUT_S)
    await asyncio.wait_for(incoming.fence(), TIMEOUT_S)
    assert bytes(pair.source.buffer) == before
    pair.assert_untouched(except_blocks=[1, 2])
    if transport == "shm":
        for block, index in ((1, 0), (2, 1)):
            differences = zip(pair.source.region(0, index), pair.target.region(0, block), strict=True)
            assert sum((ours ^ theirs).bit_count() for ours, theirs in differences) == 1


async def test_frames_that_wait_keep_their_order(pair, transport):
    receiver_chaos, sender_chaos = (Chaos(ChaosSpec.parse("seed=4,delay=20ms"), name, ()) for name in ("a", "b"))
    receiver = await pair.receiver(faults=InjectedFaults(receiver_chaos))
    sender = await pair.sender(transports=(transport,), faults=InjectedFaults(sender_chaos))
    tickets = [receiver.expect(0, [block, block + 8]) for block in range(4)]

    async def write(incoming: Any) -> int:
        push = await sender.open(incoming.ticket)
        for layer in range(pair.layout.num_layers):
            push.send(layer, [5, 6], range(2))
        return await push.commit(1)

    async def read(incoming: Any) -> None:
        await incoming.arrival()
        incoming.accept()

    async with asyncio.timeout(TIMEOUT_S):
        sizes, *_ = await asyncio.gather(asyncio.gather(*map(write, tickets)), *map(read, tickets))
    assert sizes == [2 * pair.layout.block_bytes] * 4


async def test_strikes_come_at_their_moments(pair):
    """In the order of the protocol, on both sides, before and after each frame."""
    struck: list[str] = []

    class Everything(Chaos):
        def next(self, event: str) -> Strikes:
            return Strikes(Strike("decode", event, 1), Strike("decode", event, 1, after=True))

    def faults(side: str) -> InjectedFaults:
        def strike(strike: Strike) -> None:
            struck.append(f"{side} {'after ' * strike.after}{strike.event}")

        return InjectedFaults(Everything(ChaosSpec(), "worker", ()), strike)

    receiver = await pair.receiver(faults=faults("decode"))
    sender = await pair.sender(faults=faults("prefill"))
    incoming = receiver.expect(0, [1])
    push = await sender.open(incoming.ticket)
    for layer in range(pair.layout.num_layers):
        push.send(layer, [0], range(1))
    committing = asyncio.create_task(push.commit(1))
    await incoming.arrival()
    incoming.accept()
    await committing
    order = {event: index for index, event in reversed(list(enumerate(struck)))}
    chain = ("granted", "hello", "welcome", "open", "opened", "push", "commit", "arrived", "accepted", "receipt")
    on_decode = [f"decode {event}" for event in chain]
    on_prefill = [f"prefill {event}" for event in chain if event in FRAMES]
    assert sorted(on_decode, key=order.__getitem__) == on_decode
    assert sorted(on_prefill, key=order.__getitem__) == on_prefill
    for frame in PREFILL_FRAMES[:4]:
        assert order[f"prefill {frame}"] < order[f"prefill after {frame}"]
        assert order[f"prefill {frame}"] < order[f"decode {frame}"] < order[f"decode after {frame}"]
    for frame in DECODE_FRAMES[:3]:
        assert order[f"decode {frame}"] < order[f"decode after {frame}"]
        assert order[f"decode {frame}"] < order[f"prefill {frame}"]


@pytest.mark.parametrize("strike", [Strike("decode", "push", 1), Strike("decode", "push", 1, pause_s=0.2)])
async def test_a_process_is_killed_or_stops_for_a_while(strike):
    lines = (
        "from kv_transfer.faults import strike_process",
        "from segue.chaos import Strike",
        f"strike_process({strike!r})",
        "print('goes on')",
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "; ".join(lines), stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), TIMEOUT_S)
    assert (process.returncode, output) == ((-9, b"") if strike.pause_s is None else (0, b"goes on\n"))
