"""Every order in which messages, losses, repetitions, timeouts, cancellations, broken connections and deaths can meet, played
on the real state machines. tests/support/hand_over_model.py says what is explored, docs/transfer.md what that proves.

The second half breaks one rule after the other, and expects the explorer to say what comes of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kv_transfer import pairing
from kv_transfer.pairing import Roster
from kv_transfer.protocol import TCP, ReceivePhase, ReceivingTicket, SendingTicket, SendPhase
from segue.v1 import transfer_pb2 as pb
from tests.support.explorer import Counterexample, Violation, explore
from tests.support.hand_over_model import HandOver, Setting

# What befalls a connection or a process befalls both tickets; the rest one alone.
OF_BOTH = ("break", "prefill dies", "decode dies")
SETTINGS = {
    "two tickets on one connection, shm": (Setting("shm", mishaps=OF_BOTH, is_symmetric=True), 100_000),
    "two tickets on one connection, tcp": (Setting("tcp", mishaps=OF_BOTH, is_symmetric=True), 50_000),
    "one ticket, two mishaps, shm": (
        Setting("shm", num_tickets=1, max_mishaps=2, mishaps=("break", "overflow", "lose", "repeat")),
        10_000,
    ),
    "one ticket of two regions, tcp": (Setting("tcp", num_tickets=1, num_regions=2), 2_000),
    "two prefill workers compete for a ticket, shm": (Setting("shm", num_tickets=1, num_prefill=2, max_mishaps=0), 5_000),
    "two prefill workers compete for a ticket, tcp": (Setting("tcp", num_tickets=1, num_prefill=2, max_mishaps=0), 5_000),
}


@pytest.mark.parametrize(("setting", "least"), SETTINGS.values(), ids=SETTINGS)
def test_the_hand_over_keeps_its_promises_in_every_state(setting: Setting, least: int):
    model = HandOver(setting)
    assert explore(model) >= least
    assert model.phases == {*ReceivePhase, *SendPhase}


class Broken(HandOver):
    """With a rule of the event loops taken away: `rules` are the answers instead."""

    def __init__(self, setting: Setting, rules: dict[str, Callable[..., Any]]) -> None:
        super().__init__(setting)
        for name, answer in rules.items():
            assert hasattr(self, name)
            setattr(self, name, answer)


def counterexample(setting: Setting, **rules: Callable[..., Any]) -> Counterexample:
    with pytest.raises(Counterexample) as caught:
        explore(Broken(setting, rules))
    assert len(caught.value.trace) <= 16, caught.value
    return caught.value


GIVEN_BACK = "lands in blocks that were given back"
NOT_ITS_OWN = "not the KV of"
NO_END = "nothing leads to the end"


def fence_ignores(field: str, value: object) -> property:
    def is_fenced(ticket: ReceivingTicket) -> bool:
        kept = getattr(ticket, field)
        setattr(ticket, field, value)
        fenced = bool(REAL_IS_FENCED(ticket))
        setattr(ticket, field, kept)
        return fenced

    return property(is_fenced)


def open_for_everybody(ticket: ReceivingTicket, *opening: Any) -> Any:
    if ticket.phase is ReceivePhase.GRANTED:
        return REAL_OPEN(ticket, *opening)
    return [pb.TransferFrame(opened=pb.Opened(ticket_id=ticket.ticket_id))]


def open_in_any_epoch(ticket: ReceivingTicket, writer: object, transport: str, size: int, _: int, now_s: float) -> Any:
    return REAL_OPEN(ticket, writer, transport, size, ticket.decode_epoch, now_s)


def renew_for_ever(machine: SendingTicket) -> Any:
    return [] if machine.is_over else [pb.TransferFrame(renew=pb.Renew(ticket_id=machine.ticket_id))]


def greet_without_numbers(roster: Roster[Any], connection: bytes, sender_id: int, number: int) -> Any:
    stopped = [writer for writer in [*roster.connected.values(), *roster.lost] if writer.sender_id == sender_id]
    for writer in stopped:
        roster.remove(writer)
    return stopped


def stopped_when_lost(ticket: ReceivingTicket) -> None:
    ticket.writer_active = False
    REAL_LOST(ticket)


REAL_OPEN, REAL_LOST, REAL_IS_FENCED = ReceivingTicket.open, ReceivingTicket.writer_lost, ReceivingTicket.is_fenced.fget
ONE = Setting("shm", num_tickets=1)

# What is patched: (class, name, what takes its place).
MUTATIONS: dict[str, tuple[Setting, list[tuple[object, str, object]], str]] = {
    "blocks are given back without waiting for Revoked": (
        ONE,
        [(ReceivingTicket, "is_fenced", fence_ignores("writer_active", False))],
        GIVEN_BACK,
    ),
    "blocks are given back while the receiver copies": (
        Setting("tcp", num_tickets=1),
        [(ReceivingTicket, "is_fenced", fence_ignores("num_unverified", 0))],
        GIVEN_BACK,
    ),
    "Opened is said to two connections": (
        Setting("shm", num_tickets=1, num_prefill=2, max_mishaps=0),
        [(ReceivingTicket, "open", open_for_everybody)],
        GIVEN_BACK,
    ),
    "a write begins before Opened": (
        ONE,
        [(SendingTicket, "may_write", property(lambda machine: not machine.is_over))],
        GIVEN_BACK,
    ),
    "a broken connection counts as death": (ONE, [(ReceivingTicket, "writer_lost", stopped_when_lost)], GIVEN_BACK),
    "a late Hello ends what came after it": (ONE, [(Roster, "greet", greet_without_numbers)], GIVEN_BACK),
    "tickets of an earlier epoch are honoured": (
        Setting("tcp", num_tickets=1, mishaps=("decode dies",)),
        [(ReceivingTicket, "open", open_in_any_epoch), (pairing, "check_welcome", lambda *_: None)],
        NOT_ITS_OWN,
    ),
    "Revoke is said once": (ONE, [(ReceivingTicket, "reminder", lambda _: [])], NO_END),
    "a lease is renewed, but nothing asked again": (ONE, [(SendingTicket, "reminder", renew_for_ever)], NO_END),
}


@pytest.mark.parametrize(("setting", "patches", "problem"), MUTATIONS.values(), ids=MUTATIONS)
def test_a_broken_rule_of_a_ticket_is_found(monkeypatch, setting: Setting, patches: list[Any], problem: str):
    for owner, name, value in patches:
        monkeypatch.setattr(owner, name, value)
    assert problem in counterexample(setting).problem


@pytest.mark.parametrize(
    ("setting", "rule", "answer", "problem"),
    [
        (ONE, "may_commit", lambda push: push.num_written == 1 or push.is_writing, GIVEN_BACK),
        (ONE, "may_say_last_words", lambda _: True, GIVEN_BACK),
        (ONE, "may_connect_after", lambda _: True, GIVEN_BACK),
        (ONE, "bytes_are_right", lambda *_: True, NOT_ITS_OWN),
        (Setting(TCP, num_tickets=1), "bytes_are_right", lambda *_: True, NOT_ITS_OWN),
        (ONE, "owes_hello", lambda: False, NO_END),
        (ONE, "answers_strangers", lambda: False, NO_END),
    ],
)
def test_a_broken_rule_of_the_event_loops_is_found(setting: Setting, rule: str, answer: Callable[..., Any], problem: str):
    assert problem in counterexample(setting, **{rule: answer}).problem


def test_a_counterexample_can_be_read():
    setting = Setting("shm", num_tickets=2, max_mishaps=0)
    found = counterexample(setting, may_say_last_words=lambda _: True)
    assert (
        str(found)
        == """a write for A lands in blocks that were given back, and may be anybody's
   1. prefill 0 gets A, of epoch 1
   2. decode hears Hello on connection 1 of prefill 0
   3. prefill 0 hears Welcome on connection 1 of prefill 0
   4. decode hears Open for A from prefill 0
   5. prefill 0 hears Opened for A
   6. prefill 0 begins to write region 0 of A
   7. prefill 0 abandons A
   8. decode hears Abandon for A from prefill 0
   9. prefill 0 has written region 0 of A"""
    )


class Counter:
    """From 0 to 3 by ones; a mishap leads to `trap`."""

    def __init__(self, *, is_walled: bool) -> None:
        self._is_walled = is_walled

    def start(self) -> int:
        return 0

    def steps(self, state: int) -> Any:
        if state == 2 and self._is_walled:
            raise Violation("step on the mine", "boom")
        if 0 <= state < 3:
            yield f"to {state + 1}", state + 1, False
            yield "fall", -1, True

    def is_end(self, state: int) -> bool:
        return state == 3


def test_the_explorer_finds_the_shortest_way_to_a_violation():
    with pytest.raises(Counterexample) as caught:
        explore(Counter(is_walled=True))
    assert (caught.value.problem, caught.value.trace) == ("boom", ["to 1", "to 2", "step on the mine"])


def test_the_explorer_finds_states_without_a_way_to_the_end():
    with pytest.raises(Counterexample) as caught:
        explore(Counter(is_walled=False))
    assert caught.value.trace == ["fall"]
