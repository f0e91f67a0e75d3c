"""The hand-over of KV from one or two prefill workers to a decode worker, with two tickets, as a model to explore.

What decides is the code that runs in production: `ReceivingTicket`, `SendingTicket`, the answers to frames about neither, the
`Roster` of writers, and the check of a Welcome. Written here is what sockets, threads and processes do in between: queues that
keep their order, connections that break and are noticed to be broken some time later, writes that take any time, memory, and
what the event loops do with it all (`RemoteConnection._run` and `close`, `KVReceiver._on_message` and `_keep_time`).

A state is what the tickets share and what is each one's own. No handler touches two tickets, so that a step changes one ticket,
or is a change of what they share to which each ticket responds alone. Hence both are computed once and remembered.

These make the states fewer and hide none of the faults looked for:
- What only one process can see happens at once: a fenced ticket gives its blocks back, a push that is over says its last words.
- Frames of different tickets wait in queues of their own: this only adds orders in which they may arrive.
- A reminder is sent only where nothing else would be said. Sooner, it is a frame repeated, which is a mishap explored.
- A thread's work and the word that it is done are one step, as late as may be: before that word nobody looks at the bytes.
- Blocks that were given back are nobody's: a write that lands there is wrong at once, whoever would have got them.
- With `is_symmetric`, states that differ only in which ticket is which are one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

from kv_transfer import pairing
from kv_transfer.pairing import Roster
from kv_transfer.protocol import (
    SHM,
    TCP,
    Failure,
    Frames,
    ReceivePhase,
    ReceivingTicket,
    SendingTicket,
    SendPhase,
    answer_without_push,
    answer_without_ticket,
)
from segue.errors import ChecksumMismatch, TransferError, TransferRefused
from segue.v1 import transfer_pb2 as pb
from tests.support.explorer import Numbered, Violation, content_of

NAMES = "AB"
# Of each ticket in its own queues: that frames find their ticket is no question here.
TICKET_ID = 1
REGION_BYTES = 8
DAMAGED = -1
# Instead of the number of a ReceivingTicket: there is none, or it is over and its blocks were given back.
NO_TICKET, REFUSED, ACCEPTED = -1, -2, -3
MISHAPS = ("break", "overflow", "lose", "repeat", "damage", "prefill dies", "decode dies")

# A connection: (prefill worker, its incarnation, number of its greeting).
Key = tuple[int, int, int]
# Numbers: of what is shared, and of each ticket.
State = tuple[int, ...]
Response = tuple[Callable[..., None], tuple[Hashable, ...]]
# What a ticket has to do with: the connections on which its pushes are, and its writer.
Claim = tuple[frozenset[Key | None], object]


@dataclass(frozen=True)
class Setting:
    """`max_mishaps` of `mishaps` may happen in one history. Cancellations on either side, leases that run out too early, and
    restarts of what has died are not counted."""

    transport: str
    num_tickets: int = 2
    num_prefill: int = 1
    num_regions: int = 1
    max_mishaps: int = 1
    mishaps: tuple[str, ...] = MISHAPS
    # States that differ only in which ticket is which are one. In a trace the names may then change from step to step.
    is_symmetric: bool = False


class ModelWriter(NamedTuple):
    """What stands for a connection at the receiver. There is one object for each, since they are compared by identity."""

    sender_id: tuple[int, int]
    number: int
    transport: str
    key: Key

    def __deepcopy__(self, memo: object) -> ModelWriter:
        return self


class Worker(NamedTuple):
    """A prefill worker."""

    incarnation: int = 1
    is_alive: bool = True
    num_greetings: int = 0


class Connection(NamedTuple):
    """`side`: how its sender sees it: greeting, ready, failed (its last writes are ending) or ended."""

    key: Key
    epoch: int
    side: str = "greeting"
    is_up: bool = True
    # Its receiver may have to be told that writing has ended; the connection is for nothing else.
    owes_hello: bool = False
    only_tells: bool = False
    num_hellos: int = 1
    # Numbers of frames.
    welcomes: tuple[int, ...] = ()


class Common(NamedTuple):
    """What the tickets share. `epoch` and `is_alive` are the decode worker's."""

    epoch: int
    is_alive: bool
    mishaps_left: int
    roster: int
    workers: tuple[Worker, ...]
    connections: tuple[Connection, ...] = ()


class PushState(NamedTuple):
    """A ticket at one prefill worker. `phase`: absent, waiting (for the connection), active, or over."""

    phase: str = "absent"
    epoch: int = 0
    key: Key | None = None
    machine: int = 0
    num_written: int = 0
    is_writing: bool = False


class Queue(NamedTuple):
    """Frames of one ticket on one connection, by number."""

    key: Key
    up: tuple[int, ...]
    down: tuple[int, ...]


class Local(NamedTuple):
    """What is one ticket's own. `content` [region] is what its blocks hold."""

    ticket: int
    content: tuple[int, ...]
    pushes: tuple[PushState, ...]
    # Pushed and not yet checked: (region, checksum, content that came along).
    unchecked: tuple[tuple[int, int, int | None], ...] = ()
    # None is empty; by key.
    queues: tuple[Queue, ...] = ()


class Step(NamedTuple):
    label: str
    common: int
    # What becomes of the ticket whose step it is; of a shared step, the response of each ticket. By number.
    outcome: int
    is_mishap: bool


def replaced(items: tuple[Any, ...], index: int, item: Any) -> tuple[Any, ...]:
    return (*items[:index], item, *items[index + 1 :])


def leaf_content(item: object) -> Hashable | None:
    """Why something ended is left out: no rule looks at it."""
    if isinstance(item, Failure):
        return "failure"
    if not isinstance(item, pb.TransferFrame):
        return None
    bare = pb.TransferFrame.FromString(item.SerializeToString())
    if bare.HasField("revoke"):
        bare.revoke.CopyFrom(pb.Revoke(ticket_id=bare.revoke.ticket_id))
    if bare.HasField("abandon"):
        bare.abandon.CopyFrom(pb.Abandon(ticket_id=bare.abandon.ticket_id))
    return bare.SerializeToString()


def numbered_content(item: object) -> Hashable:
    return content_of(item, leaf_content)


class World:
    """One ticket and what it shares with the other, while a step changes them."""

    def __init__(self, common: Common, local: Local, name: str = "") -> None:
        self.name = name
        self.epoch, self.is_alive, self.mishaps_left, self.roster, self.workers, self.connections = common
        self.ticket, self.content, self.pushes, self.unchecked, self.queues = local

    @property
    def common(self) -> Common:
        return Common(self.epoch, self.is_alive, self.mishaps_left, self.roster, self.workers, self.connections)

    @property
    def local(self) -> Local:
        return Local(self.ticket, self.content, self.pushes, self.unchecked, self.queues)

    def connection(self, key: Key | None) -> Connection | None:
        return next((connection for connection in self.connections if connection.key == key), None)

    def change_push(self, p: int, **changes: Any) -> None:
        self.pushes = replaced(self.pushes, p, self.pushes[p]._replace(**changes))

    def queue(self, key: Key) -> Queue:
        return next((queue for queue in self.queues if queue.key == key), Queue(key, (), ()))

    def set_queue(self, queue: Queue) -> None:
        others = [other for other in self.queues if other.key != queue.key]
        self.queues = tuple(sorted([*others, queue] if queue.up or queue.down else others))

    def post_up(self, key: Key | None, frames: tuple[int, ...]) -> None:
        """To the receiver. Lost on a broken connection; not even sent on one that its sender knows to be."""
        connection = self.connection(key)
        if frames and connection is not None and connection.is_up and connection.side == "ready":
            queue = self.queue(connection.key)
            self.set_queue(queue._replace(up=queue.up + frames))

    def post_down(self, key: Key, frames: tuple[int, ...]) -> None:
        connection = self.connection(key)
        if frames and connection is not None and connection.is_up:
            queue = self.queue(key)
            self.set_queue(queue._replace(down=queue.down + frames))


def changed(common: Common, connection: Connection, **changes: Any) -> Common:
    others = tuple(connection._replace(**changes) if other is connection else other for other in common.connections)
    return common._replace(connections=others)


class HandOver:
    """A `Model` for `explore`. Methods without a leading underscore, beside those of Model, are rules for tests to break."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._commons = Numbered[Common](lambda common: common)
        self._locals = Numbered[Local](lambda local: local)
        self._tickets = Numbered[ReceivingTicket](numbered_content)
        self._machines = Numbered[SendingTicket](numbered_content)
        self._rosters = Numbered[Roster[ModelWriter]](numbered_content)
        # A frame, and the content that travels with it.
        self._frames = Numbered[tuple[pb.TransferFrame, int | None]](numbered_content)
        self._writers: dict[ModelWriter, ModelWriter] = {}
        self._shared_steps: dict[int, list[Step]] = {}
        self._local_steps: dict[tuple[int, int, str], list[Step]] = {}
        self._responses = Numbered[Response](lambda response: response)
        self._responded: dict[tuple[int, int, int], int] = {}
        self._claims = Numbered[Claim](lambda claim: claim)
        self._claimed: dict[int, int] = {}
        self._joined: dict[tuple[int, ...], int] = {}
        self._tidied: dict[tuple[int, int], int] = {}

    # Rules that live in no pure code

    def may_connect_after(self, old: Connection) -> bool:
        """A new connection says Hello when every write of the old one has ended."""
        return old.side == "ended"

    def may_commit(self, push: PushState) -> bool:
        return push.num_written == self.setting.num_regions and not push.is_writing

    def may_say_last_words(self, push: PushState) -> bool:
        return not push.is_writing

    def bytes_are_right(self, content: int | None, checksum: int) -> bool:
        return content == checksum

    def owes_hello(self) -> bool:
        """Over shared memory, the end of the writes of a lost connection is told without waiting for a push."""
        return self.setting.transport == SHM

    def answers_strangers(self) -> bool:
        return True

    # The model

    @property
    def phases(self) -> set[ReceivePhase | SendPhase]:
        """In which a ticket or a push ever was."""
        return {ticket.phase for ticket in self._tickets} | {machine.phase for machine in self._machines}

    def start(self) -> State:
        setting = self.setting
        common = Common(1, True, setting.max_mishaps, self._rosters.number(Roster()), (Worker(),) * setting.num_prefill)
        local = self._locals.number(self._new_local(1, (PushState(),) * setting.num_prefill))
        return self._commons.number(common), *[local] * setting.num_tickets

    def is_end(self, state: State) -> bool:
        """Every ticket and every push is over, every block is given back, and no writer is waited for."""
        common = self._commons[state[0]]
        locals_ = [self._locals[number] for number in state[1:]]
        decode_is_idle = not common.is_alive or (
            all(local.ticket in {REFUSED, ACCEPTED} for local in locals_) and not self._rosters[common.roster].lost
        )
        return decode_is_idle and all(
            push.phase not in {"waiting", "active"}
            for local in locals_
            for worker, push in zip(common.workers, local.pushes, strict=True)
            if worker.is_alive
        )

    def steps(self, state: State) -> Iterator[tuple[str, State, bool]]:
        common, *locals_ = state
        for step in self._shared(common):
            after = [self._respond(step.outcome, step.common, local) for local in locals_]
            yield step.label, self._join(step.common, after), step.is_mishap
        for position, local in enumerate(locals_):
            for step in self._own(common, local, NAMES[position]):
                after = [*locals_[:position], step.outcome, *locals_[position + 1 :]]
                yield step.label, self._join(step.common, after), step.is_mishap

    def _shared(self, common: int) -> list[Step]:
        if (steps := self._shared_steps.get(common)) is None:
            found = self._steps_of_all(self._commons[common])
            steps = self._shared_steps[common] = [
                Step(label, self._commons.number(after), self._responses.number(response), is_mishap)
                for label, after, response, is_mishap in found
            ]
        return steps

    def _own(self, common: int, local: int, name: str) -> list[Step]:
        if (steps := self._local_steps.get((common, local, name))) is None:
            steps = []
            for label, world, is_mishap in self._steps_of_one(self._commons[common], self._locals[local], name):
                self._settle(world)
                steps.append(Step(label, self._commons.number(world.common), self._locals.number(world.local), is_mishap))
            self._local_steps[common, local, name] = steps
        return steps

    def _respond(self, response: int, common: int, local: int) -> int:
        """`common` is what the shared step has made of it."""
        known = self._responded.get((response, common, local))
        if known is None:
            world = World(self._commons[common], self._locals[local])
            action, arguments = self._responses[response]
            action(world, *arguments)
            self._settle(world)
            known = self._responded[response, common, local] = self._locals.number(world.local)
        return known

    def _join(self, common: int, locals_: list[int]) -> State:
        """Lets go of connections and writers that no ticket has to do with any more."""
        key = (common, *map(self._claim, locals_))
        after = self._joined.get(key)
        if after is None:
            claims = [self._claims[number] for number in key[1:]]
            after = self._joined[key] = self._commons.number(self._let_go(self._commons[common], claims))
        tidy = [self._tidy(after, local) for local in locals_]
        return after, *(sorted(tidy) if self.setting.is_symmetric else tidy)

    # What the tickets share

    def _steps_of_all(self, common: Common) -> Iterator[tuple[str, Common, Response, bool]]:
        nothing: Response = (self._stay, ())
        if not common.is_alive and common.epoch == 1:
            yield "decode starts again, with epoch 2", common._replace(is_alive=True, epoch=2), (self._grant, ()), True
        for p, worker in enumerate(common.workers):
            if common.is_alive and (dead := self._dead_writers(common, p)):
                roster = common.roster
                for writer in dead:
                    roster, _ = self._rosters.step(roster, Roster.remove, writer)
                response = (self._tell_of_writers, (dead, self._writer_stopped))
                yield f"decode sees that prefill {p} is dead", common._replace(roster=roster), response, False
            if not worker.is_alive and worker.incarnation == 1:
                yield f"prefill {p} starts again", self._with_worker(common, p, Worker(2)), nothing, True
            current = self._current(common, p)
            is_lost = current is not None and current.side in {"failed", "ended"}
            if worker.is_alive and is_lost and current.owes_hello and self.may_connect_after(current):
                after = changed(common, current, owes_hello=False)
                # The memory of one that died, or started again, is gone.
                if common.is_alive and common.epoch == current.epoch:
                    after = self._connected(after, p, current.epoch, owes_hello=True, only_tells=True)
                yield f"prefill {p} connects to tell that its writes have ended", after, nothing, False
        for connection in common.connections:
            yield from self._receiver_steps(common, connection)
            yield from self._sender_steps(common, connection)
        if common.mishaps_left:
            for label, after, response in self._mishaps_of_all(common._replace(mishaps_left=common.mishaps_left - 1)):
                yield label, after, response, True

    def _receiver_steps(self, common: Common, connection: Connection) -> Iterator[tuple[str, Common, Response, bool]]:
        if common.is_alive and connection.num_hellos:
            yield self._hear_hello(common, connection)
        if not connection.is_up and connection.key in self._rosters[common.roster].connected:
            yield f"decode notices that {name_of(connection)} is broken", *self._lose(common, connection), False

    def _hear_hello(self, common: Common, connection: Connection) -> tuple[str, Common, Response, bool]:
        label = f"decode hears Hello on {name_of(connection)}"
        common = changed(common, connection, num_hellos=connection.num_hellos - 1)
        sender_id, greeting = connection.key[:2], connection.key[2]
        roster, stopped = self._rosters.step(common.roster, Roster.greet, connection.key, sender_id, greeting)
        if stopped is None:
            return label, common, (self._stay, ()), False
        # The process of a late Hello cannot be watched any more.
        transport = TCP if self._is_dead(common, connection.key) else self.setting.transport
        writer = ModelWriter(sender_id, greeting, transport, connection.key)
        writer = self._writers.setdefault(writer, writer)
        roster, _ = self._rosters.step(roster, Roster.add, connection.key, writer)
        welcome = pb.Welcome(worker_id="decode", epoch=common.epoch, transport=transport)
        response = (self._tell_of_writers, (tuple(stopped), self._writer_stopped))
        return label, self._welcomed(common._replace(roster=roster), connection.key, welcome), response, False

    def _lose(self, common: Common, connection: Connection) -> tuple[Common, Response]:
        roster, writer = self._rosters.step(common.roster, Roster.lose, connection.key)
        return common._replace(roster=roster), (self._tell_of_writers, ((writer,), self._writer_lost))

    def _sender_steps(self, common: Common, connection: Connection) -> Iterator[tuple[str, Common, Response, bool]]:
        if connection.side not in {"greeting", "ready"}:
            return
        name = name_of(connection)
        if connection.welcomes:
            yield f"prefill {connection.key[0]} hears Welcome on {name}", *self._hear_welcome(common, connection), False
        is_unanswered = connection.side == "greeting" and not connection.num_hellos and not connection.welcomes
        if not connection.is_up or is_unanswered:
            yield f"prefill {connection.key[0]} gives {name} up", *self._fail(common, connection), False

    def _hear_welcome(self, common: Common, connection: Connection) -> tuple[Common, Response]:
        number, *others = connection.welcomes
        common = changed(common, connection, welcomes=tuple(others))
        connection = next(other for other in common.connections if other.key == connection.key)
        welcome = self._frames[number][0].welcome
        if connection.side == "ready":
            return self._fail(common, connection) if welcome.refusal else (common, (self._stay, ()))
        try:
            pairing.check_welcome(welcome, "decode", connection.epoch, [self.setting.transport])
        except TransferRefused:
            return self._fail(common, connection, owes_hello=False)
        if connection.only_tells:
            return self._fail(common, connection, owes_hello=False)
        return changed(common, connection, side="ready", owes_hello=self.owes_hello()), (self._stay, ())

    def _fail(self, common: Common, connection: Connection, **changes: Any) -> tuple[Common, Response]:
        """Its sender takes it for gone: its pushes fail, and it has ended when they write no more."""
        after = changed(common, connection, side="failed", is_up=False, welcomes=(), **changes)
        return after, (self._fail_pushes, (connection.key,))

    def _mishaps_of_all(self, common: Common) -> Iterator[tuple[str, Common, Response]]:
        mishaps = self.setting.mishaps
        if "decode dies" in mishaps and common.is_alive:
            connections = tuple(connection._replace(is_up=False, num_hellos=0) for connection in common.connections)
            after = common._replace(is_alive=False, roster=self._rosters.number(Roster()), connections=connections)
            yield "decode dies", after, (self._lose_decode, ())
        for p, worker in enumerate(common.workers):
            if "prefill dies" in mishaps and worker.is_alive:
                yield f"prefill {p} dies", self._without_worker(common, p), (self._lose_pushes, (p,))
        for connection in common.connections:
            name = name_of(connection)
            if "break" in mishaps and connection.is_up:
                yield f"{name} breaks", changed(common, connection, is_up=False), (self._stay, ())
                if connection.num_hellos:
                    after = changed(common, connection, is_up=False, num_hellos=0)
                    yield f"{name} breaks before Hello gets through", after, (self._stay, ())
            is_known = connection.key in self._rosters[common.roster].connected
            if "overflow" in mishaps and connection.is_up and is_known:
                yield f"decode gives {name} up, whose queue is full", *self._lose(common, connection)
            hellos, welcomes = connection.num_hellos, connection.welcomes
            if "lose" in mishaps and hellos:
                yield f"Hello on {name} is lost", changed(common, connection, num_hellos=hellos - 1), (self._stay, ())
            if "lose" in mishaps and welcomes:
                yield f"Welcome on {name} is lost", changed(common, connection, welcomes=welcomes[1:]), (self._stay, ())
            if "repeat" in mishaps and hellos:
                yield f"Hello on {name} is repeated", changed(common, connection, num_hellos=hellos + 1), (self._stay, ())
            if "repeat" in mishaps and welcomes:
                twice = welcomes + welcomes[:1]
                yield f"Welcome on {name} is repeated", changed(common, connection, welcomes=twice), (self._stay, ())

    def _without_worker(self, common: Common, p: int) -> Common:
        """What it had sent may still be read."""
        gone = {"side": "ended", "is_up": False, "owes_hello": False, "welcomes": ()}
        connections = tuple(
            connection._replace(**gone) if connection.key[0] == p else connection for connection in common.connections
        )
        worker = common.workers[p]._replace(is_alive=False, num_greetings=0)
        return self._with_worker(common._replace(connections=connections), p, worker)

    def _connected(self, common: Common, p: int, epoch: int, owes_hello: bool, only_tells: bool = False) -> Common:
        worker = common.workers[p]
        worker = worker._replace(num_greetings=worker.num_greetings + 1)
        connection = Connection(
            (p, worker.incarnation, worker.num_greetings), epoch, owes_hello=owes_hello, only_tells=only_tells
        )
        connections = tuple(sorted([*common.connections, connection]))
        return self._with_worker(common._replace(connections=connections), p, worker)

    def _welcomed(self, common: Common, key: Key, welcome: pb.Welcome) -> Common:
        connection = next(connection for connection in common.connections if connection.key == key)
        number = self._frames.number((pb.TransferFrame(welcome=welcome), None))
        # The first refusal ends the connection, so that nobody reads a second.
        if not connection.is_up or (welcome.refusal and number in connection.welcomes):
            return common
        return changed(common, connection, welcomes=(*connection.welcomes, number))

    # How a ticket responds to what all share

    def _stay(self, world: World) -> None:
        pass

    def _grant(self, world: World) -> None:
        fresh = self._new_local(world.epoch, world.pushes)
        world.ticket, world.content, world.unchecked = fresh.ticket, fresh.content, fresh.unchecked

    def _tell_of_writers(self, world: World, writers: tuple[ModelWriter | None, ...], action: Callable[..., Any]) -> None:
        if world.ticket >= 0 and self._tickets[world.ticket].writer in [writer for writer in writers if writer is not None]:
            self._step_ticket(world, action)

    def _fail_pushes(self, world: World, key: Key) -> None:
        queue = world.queue(key)
        world.set_queue(queue._replace(down=()))
        push = world.pushes[key[0]]
        if push.key == key and push.phase == "waiting":
            world.change_push(key[0], phase="over", key=None)
        elif push.key == key and push.phase == "active":
            self._step_machine(world, key[0], self._fail_push)

    def _lose_decode(self, world: World) -> None:
        world.ticket, world.unchecked = NO_TICKET, ()
        world.queues = tuple(queue._replace(up=()) for queue in world.queues if queue.down)

    def _lose_pushes(self, world: World, p: int) -> None:
        """A ticket reaches a prefill worker once; another attempt has another ticket."""
        push = world.pushes[p]
        world.pushes = replaced(world.pushes, p, PushState("over" if push.epoch else "absent", push.epoch))
        for queue in world.queues:
            if queue.key[0] == p:
                world.set_queue(queue._replace(down=()))

    # One ticket's own steps

    def _steps_of_one(self, common: Common, local: Local, name: str) -> Iterator[tuple[str, World, bool]]:
        if local.unchecked:
            yield self._check(World(common, local, name))
        if local.ticket >= 0:
            yield from self._ticket_steps(common, local, name)
        for p, worker in enumerate(common.workers):
            if worker.is_alive:
                yield from self._ticket_comes(common, local, name, p)
                yield from self._push_steps(common, local, name, p)
        for queue in local.queues:
            if queue.up and common.is_alive:
                yield self._hear_up(World(common, local, name), queue)
            if queue.down and self._connection(common, queue.key).side in {"greeting", "ready"}:
                yield self._hear_down(World(common, local, name), queue)
            if common.mishaps_left:
                yield from self._frame_mishaps(common, local, queue, name)

    def _ticket_steps(self, common: Common, local: Local, name: str) -> Iterator[tuple[str, World, bool]]:
        ticket = self._tickets[local.ticket]
        if ticket.phase is ReceivePhase.ARRIVED:
            expected = tuple(self._tag(common.epoch, region) for region in range(self.setting.num_regions))
            if local.content != expected:
                raise Violation(f"decode accepts {name}", f"decode starts on bytes that are not the KV of {name}")
            yield f"decode accepts {name}", self._with_ticket_step(common, local, self._accept), False
        if ticket.phase not in {ReceivePhase.ACCEPTED, ReceivePhase.FAILED}:
            yield f"decode takes {name} back", self._with_ticket_step(common, local, self._take_back), True
        if ticket.phase in {ReceivePhase.GRANTED, ReceivePhase.OPEN}:
            world = self._with_ticket_step(common, local, self._expire)
            yield f"the lease of {name} runs out", world, not self._is_silent(common, local, ticket)
        if ticket.reminder() and self._waits_in_vain(common, local, ticket):
            yield f"decode says Revoke again for {name}", self._with_ticket_step(common, local, self._remind), False

    def _check(self, world: World) -> tuple[str, World, bool]:
        """The receiver's transfer thread looks at the bytes, which over TCP it also puts in their place, and says so."""
        (region, checksum, content), *others = world.unchecked
        world.unchecked = tuple(others)
        label = f"decode checks region {region} of {world.name}"
        is_right = self.bytes_are_right(world.content[region] if content is None else content, checksum)
        if content is not None:
            self._land(world, region, content, label)
        self._step_ticket(world, self._verified, is_right)
        return label, world, False

    def _land(self, world: World, region: int, content: int, label: str) -> None:
        if world.ticket < 0:
            raise Violation(label, f"a write for {world.name} lands in blocks that were given back, and may be anybody's")
        world.content = replaced(world.content, region, content)

    def _is_silent(self, common: Common, local: Local, ticket: ReceivingTicket) -> bool:
        """No word of the ticket is under way or will come, so that its lease does run out."""
        if any(queue.up for queue in local.queues):
            return False
        for p, worker in enumerate(common.workers):
            push = local.pushes[p]
            if not worker.is_alive or push.epoch != common.epoch or push.phase not in {"waiting", "active"}:
                continue
            is_heard = push.phase == "active" and self._connection(common, push.key).is_up
            if ticket.phase is ReceivePhase.GRANTED or (is_heard and self._machines[push.machine].reminder()):
                return False
        return True

    def _waits_in_vain(self, common: Common, local: Local, ticket: ReceivingTicket) -> bool:
        """The writer can be reached and has forgotten the ticket, and Revoked is not on its way."""
        key = ticket.writer.key if isinstance(ticket.writer, ModelWriter) else None
        is_reached = any(connection.key == key and connection.is_up for connection in common.connections)
        has_queue = any(queue.key == key for queue in local.queues)
        return is_reached and not has_queue and local.pushes[key[0]].phase != "active"

    def _hear_up(self, world: World, queue: Queue) -> tuple[str, World, bool]:
        number, *others = queue.up
        world.set_queue(queue._replace(up=tuple(others)))
        frame, content = self._frames[number]
        writer = self._rosters[world.roster].connected.get(queue.key)
        if writer is None:
            if self.answers_strangers():
                welcome = pb.Welcome(worker_id="decode", epoch=world.epoch, refusal="not known")
                world.connections = self._welcomed(world.common, queue.key, welcome).connections
        elif world.ticket < 0:
            world.post_down(queue.key, self._number(answer_without_ticket(frame)))
        else:
            label = f"decode hears {self._kind(number)} for {world.name}"
            world.ticket, (fresh, answers) = self._ticket_step(world.ticket, label, self._receive, writer, number)
            world.unchecked += tuple((region, checksum, content) for region, checksum in fresh)
            world.post_down(queue.key, answers)
        return f"decode hears {self._kind(number)} for {world.name} from prefill {queue.key[0]}", world, False

    def _hear_down(self, world: World, queue: Queue) -> tuple[str, World, bool]:
        number, *others = queue.down
        p = queue.key[0]
        world.set_queue(queue._replace(down=tuple(others)))
        label = f"prefill {p} hears {self._kind(number)} for {world.name}"
        push = world.pushes[p]
        if push.phase == "active" and push.key == queue.key:
            self._step_machine(world, p, self._hear, number)
            is_complete = self._machines[world.pushes[p].machine].phase is SendPhase.COMPLETE
            if is_complete and push.epoch == world.epoch and world.is_alive and world.ticket != ACCEPTED:
                raise Violation(label, f"prefill {p} has a receipt for {world.name}, which decode did not accept")
        else:
            world.post_up(queue.key, self._number(answer_without_push(self._frames[number][0])))
        return label, world, False

    def _ticket_comes(self, common: Common, local: Local, name: str, p: int) -> Iterator[tuple[str, World, bool]]:
        """By way of the router, which may be slow: the ticket may be of an earlier epoch."""
        push, current = local.pushes[p], self._current(common, p)
        if push.phase in {"waiting", "active"}:
            return
        for epoch in range(push.epoch + 1, common.epoch + 1):
            world = World(common, local)
            label = f"prefill {p} gets {name}, of epoch {epoch}"
            is_live = current is not None and current.side in {"greeting", "ready"} and not current.only_tells
            is_ending = current is not None and not current.only_tells and not self.may_connect_after(current)
            must_wait = current.epoch < epoch if is_live else is_ending
            if must_wait:
                continue
            if current.epoch > epoch if is_live else not common.is_alive:
                world.pushes = replaced(world.pushes, p, PushState("over", epoch))
                yield label, world, False
                continue
            if not is_live:
                closed = {"side": "ended", "is_up": False, "owes_hello": False, "welcomes": ()}
                after = changed(common, current, **closed) if current is not None else common
                after = self._connected(after, p, epoch, owes_hello=current is not None and current.owes_hello)
                world.workers, world.connections = after.workers, after.connections
                current_key = (p, after.workers[p].incarnation, after.workers[p].num_greetings)
            else:
                current_key = current.key
            world.pushes = replaced(world.pushes, p, PushState("waiting", epoch, current_key))
            yield label, world, False

    def _push_steps(self, common: Common, local: Local, name: str, p: int) -> Iterator[tuple[str, World, bool]]:
        push = local.pushes[p]
        if push.phase == "waiting":
            world = World(common, local)
            world.change_push(p, phase="over", key=None)
            yield f"prefill {p} waits no longer to open {name}", world, True
        if push.phase != "active":
            return
        machine, region = self._machines[push.machine], push.num_written
        if push.is_writing:
            yield self._end_write(World(common, local, name), p, is_damaged=False)
            if common.mishaps_left and "damage" in self.setting.mishaps:
                yield self._end_write(World(common, local, name), p, is_damaged=True)
        elif machine.may_write and region < self.setting.num_regions:
            world = World(common, local)
            world.change_push(p, is_writing=True)
            yield f"prefill {p} begins to write region {region} of {name}", world, False
        if machine.phase is SendPhase.OPEN and self.may_commit(push):
            yield f"prefill {p} commits {name}", self._with_machine_step(common, local, p, self._commit), False
        if not machine.is_over:
            yield f"prefill {p} abandons {name}", self._with_machine_step(common, local, p, self._abandon), True
        has_queue = any(queue.key == push.key for queue in local.queues)
        if (
            not machine.may_write
            and machine.reminder()
            and not has_queue
            and self._connection(common, push.key).side == "ready"
        ):
            yield f"prefill {p} asks again for {name}", self._with_machine_step(common, local, p, self._ask_again), False

    def _end_write(self, world: World, p: int, *, is_damaged: bool) -> tuple[str, World, bool]:
        push = world.pushes[p]
        region = push.num_written
        label = f"prefill {p} has written {'damaged bytes to ' if is_damaged else ''}region {region} of {world.name}"
        tag = self._tag(push.epoch, region)
        content = DAMAGED if is_damaged else tag
        world.mishaps_left -= is_damaged
        # A write for a decode worker that is gone ends in memory that nobody sees any more.
        if self.setting.transport == SHM and push.epoch == world.epoch and world.is_alive:
            self._land(world, region, content, label)
        payload = content if self.setting.transport == TCP else None
        world.change_push(p, is_writing=False, num_written=region + 1)
        self._step_machine(world, p, self._announce, region, tag, payload)
        return label, world, is_damaged

    def _frame_mishaps(self, common: Common, local: Local, queue: Queue, name: str) -> Iterator[tuple[str, World, bool]]:
        for way in ("up", "down"):
            frames = getattr(queue, way)
            for mishap, after in (("lose", frames[1:]), ("repeat", frames + frames[:1])):
                if frames and mishap in self.setting.mishaps:
                    world = World(common._replace(mishaps_left=common.mishaps_left - 1), local)
                    world.set_queue(queue._replace(**{way: after}))
                    what = "lost" if mishap == "lose" else "repeated"
                    yield f"{self._kind(frames[0])} for {name} is {what}", world, True

    # What happens at once

    def _settle(self, world: World) -> None:
        """A ticket that is fenced gives its blocks back; a push that waited opens; one that is over says its last words."""
        if world.ticket >= 0 and self._tickets[world.ticket].is_fenced:
            is_accepted = self._tickets[world.ticket].phase is ReceivePhase.ACCEPTED
            world.ticket = ACCEPTED if is_accepted else REFUSED
            world.content = (0,) * self.setting.num_regions
        for p, push in enumerate(world.pushes):
            connection = world.connection(push.key)
            if push.phase == "waiting" and connection is not None and connection.side == "ready":
                start = self._machines.number(SendingTicket(TICKET_ID, push.epoch))
                world.change_push(p, phase="active", machine=start)
                self._step_machine(world, p, self._open)
            elif push.phase == "active" and self._machines[push.machine].is_over and self.may_say_last_words(push):
                self._step_machine(world, p, self._last_words)
                if not push.is_writing:
                    world.pushes = replaced(world.pushes, p, PushState("over", push.epoch))

    def _claim(self, local: int) -> int:
        if (number := self._claimed.get(local)) is None:
            item = self._locals[local]
            keys = frozenset(push.key for push in item.pushes if push.phase in {"waiting", "active"})
            writer = self._tickets[item.ticket].writer if item.ticket >= 0 else None
            number = self._claimed[local] = self._claims.number((keys, writer))
        return number

    def _let_go(self, common: Common, claims: list[Claim]) -> Common:
        if self._rosters[common.roster].lost:
            busy = frozenset(writer for _, writer in claims)
            common = common._replace(roster=self._rosters.step(common.roster, Roster.forget_idle, busy)[0])
        connected = self._rosters[common.roster].connected
        kept = []
        for connection in common.connections:
            if connection.side == "failed" and not any(connection.key in keys for keys, _ in claims):
                connection = connection._replace(side="ended")
            if connection.side != "ended" or connection.key in connected or connection.num_hellos or connection.owes_hello:
                kept.append(connection)
        return common._replace(connections=tuple(kept))

    def _tidy(self, common: int, local: int) -> int:
        """Frames that nobody will read are gone."""
        known = self._tidied.get((common, local))
        if known is None:
            item, all_ = self._locals[local], self._commons[common]
            connections = {connection.key: connection for connection in all_.connections}
            connected = self._rosters[all_.roster].connected
            world = World(all_, item)
            for queue in item.queues:
                connection = connections.get(queue.key)
                is_read = connection is not None and (connection.is_up or queue.key in connected)
                has_reader = connection is not None and connection.side in {"greeting", "ready"}
                world.set_queue(Queue(queue.key, queue.up if is_read else (), queue.down if has_reader else ()))
            known = self._tidied[common, local] = self._locals.number(world.local)
        return known

    # Actions on the real objects; frames are given and returned by number

    def _receive(self, ticket: ReceivingTicket, writer: ModelWriter, number: int) -> Any:
        frame = self._frames[number][0]
        if not frame.HasField("push"):
            return [], self._number(ticket.on_frame(writer, writer.transport, REGION_BYTES, frame, 0.0))
        sizes = [REGION_BYTES] if writer.transport == TCP else []
        fresh, answers = ticket.push(writer, frame.push, sizes, 0.0)
        return [(frame.push.layer, checksum) for checksum in fresh.checksums], self._number(answers)

    def _verified(self, ticket: ReceivingTicket, is_right: bool) -> Any:
        return self._number(ticket.verified(1, None if is_right else Failure(ChecksumMismatch, "damaged")))

    def _accept(self, ticket: ReceivingTicket) -> Any:
        return self._number(ticket.accept())

    def _take_back(self, ticket: ReceivingTicket) -> Any:
        return self._number(ticket.revoke(Failure(TransferRefused, "taken back")))

    def _expire(self, ticket: ReceivingTicket) -> Any:
        return self._number(ticket.expire(now_s=1e9))

    def _remind(self, ticket: ReceivingTicket) -> Any:
        return self._number(ticket.reminder())

    def _writer_lost(self, ticket: ReceivingTicket) -> Any:
        ticket.writer_lost()
        return ()

    def _writer_stopped(self, ticket: ReceivingTicket) -> Any:
        ticket.writer_stopped()
        return ()

    def _open(self, machine: SendingTicket) -> Any:
        return self._number(machine.open())

    def _hear(self, machine: SendingTicket, number: int) -> Any:
        machine.on_frame(self._frames[number][0])
        return ()

    def _announce(self, machine: SendingTicket, region: int, tag: int, payload: int | None) -> Any:
        return self._number(machine.push(region, [0], [tag]), payload)

    def _commit(self, machine: SendingTicket) -> Any:
        return self._number(machine.commit(5, ()))

    def _abandon(self, machine: SendingTicket) -> Any:
        machine.abandon("cancelled")
        return ()

    def _ask_again(self, machine: SendingTicket) -> Any:
        """The Renew that goes with it would only be answered alike: leases are not counted here."""
        return self._number(machine.reminder()[:1])

    def _fail_push(self, machine: SendingTicket) -> Any:
        machine.fail(Failure(TransferError, "the connection was lost"))
        return ()

    def _last_words(self, machine: SendingTicket) -> Any:
        return self._number(machine.writes_stopped())

    def _ticket_step(self, ticket: int, label: str, action: Any, *arguments: Hashable) -> tuple[int, Any]:
        after, result = self._tickets.step(ticket, action, *arguments)
        before = self._tickets[ticket].phase
        if before in {ReceivePhase.ACCEPTED, ReceivePhase.FAILED} and self._tickets[after].phase is not before:
            raise Violation(label, "a ticket ends twice")
        return after, result

    def _step_ticket(self, world: World, action: Any, *arguments: Hashable) -> None:
        """What it has to say goes to its writer."""
        if world.ticket < 0:
            return
        world.ticket, frames = self._ticket_step(world.ticket, action.__name__.strip("_"), action, *arguments)
        writer = self._tickets[world.ticket].writer
        if writer is not None:
            world.post_down(writer.key, frames)

    def _step_machine(self, world: World, p: int, action: Any, *arguments: Hashable) -> None:
        before = world.pushes[p].machine
        after, frames = self._machines.step(before, action, *arguments)
        if self._machines[before].is_over and self._machines[after].phase is not self._machines[before].phase:
            raise Violation(action.__name__.strip("_"), "a push ends twice")
        world.change_push(p, machine=after)
        world.post_up(world.pushes[p].key, frames)

    def _with_ticket_step(self, common: Common, local: Local, action: Any) -> World:
        world = World(common, local)
        self._step_ticket(world, action)
        return world

    def _with_machine_step(self, common: Common, local: Local, p: int, action: Any) -> World:
        world = World(common, local)
        self._step_machine(world, p, action)
        return world

    # Helpers

    def _new_local(self, epoch: int, pushes: tuple[PushState, ...]) -> Local:
        num_regions = self.setting.num_regions
        ticket = ReceivingTicket(TICKET_ID, epoch, num_regions, 1, lease_s=1.0, heard_s=0.0)
        return Local(self._tickets.number(ticket), (0,) * num_regions, pushes)

    def _number(self, frames: Frames, payload: int | None = None) -> tuple[int, ...]:
        return tuple(self._frames.number((frame, payload)) for frame in frames)

    def _kind(self, number: int) -> str:
        return str(self._frames[number][0].WhichOneof("message")).capitalize()

    def _tag(self, epoch: int, region: int) -> int:
        """Stands for a region's bytes, which no two prompts have in common, and for their checksum."""
        return 10 * epoch + region

    def _dead_writers(self, common: Common, p: int) -> tuple[ModelWriter, ...]:
        """Those in shared memory, whose death a pidfd shows."""
        roster = self._rosters[common.roster]
        return tuple(
            writer
            for writer in chain(roster.connected.values(), roster.lost)
            if writer.key[0] == p and writer.transport == SHM and self._is_dead(common, writer.key)
        )

    @staticmethod
    def _is_dead(common: Common, key: Key) -> bool:
        worker = common.workers[key[0]]
        return key[1] < worker.incarnation or not worker.is_alive

    @staticmethod
    def _with_worker(common: Common, p: int, worker: Worker) -> Common:
        return common._replace(workers=replaced(common.workers, p, worker))

    @staticmethod
    def _connection(common: Common, key: Key | None) -> Connection:
        return next(connection for connection in common.connections if connection.key == key)

    @staticmethod
    def _current(common: Common, p: int) -> Connection | None:
        """The newest connection of the worker's present incarnation."""
        own: Iterable[Connection] = (
            connection for connection in common.connections if connection.key[:2] == (p, common.workers[p].incarnation)
        )
        return max(own, default=None)


def name_of(connection: Connection) -> str:
    return f"connection {connection.key[2]} of prefill {connection.key[0]}"
