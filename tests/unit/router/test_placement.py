"""Placement over links that were never opened: what each worker says of itself is put there by the test."""

from __future__ import annotations

import pytest

from router.placement import Placement, Wanted
from router.workers import Charge, WorkerLink, Workers
from segue.cache_feed import CacheFeed
from segue.errors import ConfigError, InvalidRequest, NoWorker
from segue.membership import Membership
from segue.prefix import block_hashes
from segue.v1 import worker_pb2 as pb
from segue.v1.inference_pb2 import WorkerLoad


@pytest.fixture
def workers() -> Workers:
    return Workers(Membership("redis://127.0.0.1:1", "c"), "router", "m")


def join(
    workers: Workers, worker_id: str, role: str, *, layout: str = "f", num_blocks: int = 100, formats: str = ""
) -> WorkerLink:
    record = pb.WorkerRecord(
        worker_id=worker_id,
        roles=role.split("+"),
        layout_fingerprint=layout,
        total_blocks=num_blocks,
        block_size=4,
        number_formats=formats,
    )
    link = WorkerLink(record, "router", workers.fleet)
    workers._links[worker_id] = link
    link._deliver(pb.LinkResponse(opened=pb.LinkOpened(worker=record)))
    link._deliver(pb.LinkResponse(load=WorkerLoad(free_blocks=num_blocks)))
    return link


def wanted(num_tokens: int = 10, max_tokens: int = 10, suspects: frozenset[str] = frozenset()) -> Wanted:
    return Wanted(list(range(num_tokens)), max_tokens, suspects=suspects)


def pair(placement: Placement, what: Wanted) -> tuple[str, str]:
    placed = placement.place(what)
    return placed.prefill.record.worker_id, placed.decode.record.worker_id


def test_a_burst_spreads_and_leaves_nothing_charged(workers: Workers) -> None:
    for number in range(3):
        join(workers, f"p{number}", "prefill")
        join(workers, f"d{number}", "decode")
    placement = Placement(workers, "cost", may_join=False)
    placed = [placement.place(wanted()).__enter__() for _ in range(3)]
    assert {one.prefill.record.worker_id for one in placed} == {"p0", "p1", "p2"}
    assert {one.decode.record.worker_id for one in placed} == {"d0", "d1", "d2"}
    placed[0].end_prefill()
    assert placement.place(wanted()).prefill is placed[0].prefill, "its prompt is computed"
    for one in placed:
        one.__exit__(None, None, None)
    assert all(link.charged == Charge() for link in workers.all())


def test_charges_add_to_what_others_have(workers: Workers) -> None:
    """A report tells of this router's sequences as well: they count once, those of other routers beside them."""
    join(workers, "p0", "prefill")
    link = join(workers, "d0", "decode")

    def load_now() -> tuple[int, int, int]:
        facts = link.facts()
        return facts.queued_tokens, facts.sequences, facts.available_blocks

    def tell(queued_tokens: int, decode_sequences: int, free_blocks: int) -> None:
        load = WorkerLoad(queued_tokens=queued_tokens, decode_sequences=decode_sequences, free_blocks=free_blocks)
        link._deliver(pb.LinkResponse(load=load))

    tell(5000, 7, 60)
    assert load_now() == (5000, 7, 60)
    link.charge(tokens=300, sequences=2, blocks=10)
    assert load_now() == (5300, 9, 50)
    tell(5300, 9, 50)
    assert load_now() == (5300, 9, 50)
    link.charge(tokens=-300)
    assert load_now() == (5000, 9, 50)
    tell(100, 1, 50)
    assert load_now() == (100, 2, 50), "one has not arrived there yet"
    link.charge(sequences=-2, blocks=-10)
    assert load_now() == (100, 0, 50), "nobody has said that its blocks are free"
    link.charge(sequences=1, blocks=80)
    assert load_now() == (100, 1, 0)


def test_memory_that_a_burst_will_take_counts_at_once(workers: Workers) -> None:
    join(workers, "p0", "prefill")
    join(workers, "d0", "decode", num_blocks=1000)._deliver(pb.LinkResponse(load=WorkerLoad(free_blocks=25)))
    join(workers, "d1", "decode", num_blocks=1000)._deliver(pb.LinkResponse(load=WorkerLoad(free_blocks=100)))
    placement = Placement(workers, "cost", may_join=False)
    placed = [placement.place(wanted(90)).__enter__() for _ in range(4)]  # 23 blocks each
    assert [one.decode.record.worker_id for one in placed] == ["d0", "d1", "d1", "d1"]


def test_who_takes_over_decode_holds_the_answer_too(workers: Workers) -> None:
    for number, num_blocks in enumerate((20, 100)):
        join(workers, f"p{number}", "prefill", formats="int8", num_blocks=num_blocks).charge(tokens=number)
    join(workers, "d0", "decode", formats="int8")._deliver(pb.LinkResponse(load=WorkerLoad(free_blocks=0)))
    placement = Placement(workers, "cost", may_join=True)
    assert pair(placement, wanted(40, 10)) == ("p0", "p0")
    assert pair(placement, wanted(40, 100)) == ("p0", "d0"), "p1 could hold it, but has something to do"


@pytest.mark.parametrize("policy", ["round_robin", "random", "least_loaded"])
def test_each_layout_has_its_turn(workers: Workers, policy: str) -> None:
    for layout in ("old", "new"):
        join(workers, f"p-{layout}", "prefill", layout=layout)
        join(workers, f"d-{layout}", "decode", layout=layout)
    placement = Placement(workers, policy, may_join=False)
    assert {pair(placement, wanted()) for _ in range(4)} == {("p-old", "d-old"), ("p-new", "d-new")}


def test_only_equal_layouts_pair(workers: Workers) -> None:
    join(workers, "p0", "prefill", layout="new")
    join(workers, "d0", "decode", layout="old")
    placement = Placement(workers, "cost", may_join=True)
    with pytest.raises(NoWorker, match="fit together"):
        placement.place(wanted())
    join(workers, "d1", "decode", layout="new")
    assert pair(placement, wanted()) == ("p0", "d1")


@pytest.mark.parametrize(
    ("roles", "missing"), [([], "no prefill and no decode"), (["prefill"], "no decode"), (["decode"], "no prefill")]
)
def test_a_missing_role_is_named(workers: Workers, roles: list[str], missing: str) -> None:
    for role in roles:
        join(workers, role, role)
    with pytest.raises(NoWorker, match=missing):
        Placement(workers, "cost", may_join=True).place(wanted())


def test_a_sequence_goes_where_it_fits_or_is_refused(workers: Workers) -> None:
    join(workers, "p0", "prefill")
    join(workers, "d0", "decode", num_blocks=20)
    join(workers, "d1", "decode").charge(sequences=9)
    placement = Placement(workers, "cost", may_join=False)
    assert pair(placement, wanted(80, 40)) == ("p0", "d1")
    with pytest.raises(InvalidRequest) as caught:
        placement.place(wanted(300, 200))
    assert caught.value.field == "max_tokens"


def test_suspects_are_avoided_on_either_side_while_there_are_others(workers: Workers) -> None:
    join(workers, "p0", "prefill")
    join(workers, "d0", "decode")
    join(workers, "d1", "decode").charge(sequences=5)
    placement = Placement(workers, "cost", may_join=False)
    assert pair(placement, wanted()) == ("p0", "d0")
    assert pair(placement, wanted(suspects=frozenset({"p0", "d0"}))) == ("p0", "d1")
    assert pair(placement, wanted(suspects=frozenset({"p0", "d0", "d1"}))) == ("p0", "d0")


def test_a_worker_that_leaves_is_forgotten_with_its_cache(workers: Workers) -> None:
    join(workers, "p0", "prefill")
    known = join(workers, "p1", "prefill")
    join(workers, "d0", "decode")
    placement = Placement(workers, "cost", may_join=False)
    stored = b"".join(block_hashes(range(10), 4))
    known._deliver(pb.LinkResponse(cache_events=pb.CacheEvents(number=3, snapshot=True, stored=stored)))
    assert pair(placement, wanted()) == ("p1", "d0")
    known.leave_fleet()
    del workers._links["p1"]
    assert pair(placement, wanted()) == ("p0", "d0")
    known.charge(tokens=5)  # a sequence that ends late
    again = join(workers, "p1", "prefill")
    again.charge(tokens=1)
    assert pair(placement, wanted()) == ("p0", "d0"), "the row's next worker has none of it"


@pytest.mark.parametrize(("pulls_kv", "num_queued"), [(True, 2), (False, 10)])
def test_what_is_fetched_from_decode_is_not_queued(workers: Workers, pulls_kv: bool, num_queued: int) -> None:
    prefill, decode = join(workers, "p0", "prefill"), join(workers, "d0", "decode")
    prefill.record.pulls_kv = pulls_kv
    prefill.charge()
    stored = b"".join(block_hashes(range(10), 4))
    decode._deliver(pb.LinkResponse(cache_events=pb.CacheEvents(number=1, snapshot=True, stored=stored)))
    with Placement(workers, "cost", may_join=False).place(wanted(10)):
        assert prefill.charged == Charge(tokens=num_queued)
        assert decode.charged == Charge(sequences=1, unreserved=1, blocks=1)


def test_after_a_gap_nothing_is_known_until_a_snapshot(workers: Workers) -> None:
    join(workers, "p0", "prefill")
    known = join(workers, "p1", "prefill")
    fleet, stored = workers.fleet, b"".join(block_hashes(range(8), 4))

    def tell(number: int, **events: object) -> int:
        known._deliver(pb.LinkResponse(cache_events=pb.CacheEvents(number=number, **events)))  # type: ignore[arg-type]
        return int(fleet.cached_tokens(list(range(10)), b"")[known.row])

    assert tell(1, stored=stored) == 0, "no snapshot yet"
    assert tell(1, stored=stored, snapshot=True) == 8
    assert tell(2, evicted=stored[16:]) == 4
    assert tell(4, stored=stored[16:]) == 0, "3 is missing"
    assert tell(5, stored=stored[16:]) == 0
    assert tell(5, stored=stored, snapshot=True) == 8
    assert int(fleet.cached_tokens(list(range(10)), b"other tenant")[known.row]) == 0


def test_workers_that_compute_other_bits_do_not_take_over_a_phase(workers: Workers) -> None:
    join(workers, "p0", "prefill", formats="int8")
    join(workers, "d0", "decode", formats="int8")
    placement = Placement(workers, "cost", may_join=True)
    for _ in range(20):
        placement._near.add(5, 500.0)  # a hand-over takes half a second
    assert pair(placement, wanted(5, 1)) == ("d0", "d0")
    join(workers, "d1", "decode", formats="int4").charge(sequences=50)
    assert pair(placement, wanted(5, 1)) == ("p0", "d0")


def test_an_unknown_policy_is_refused(workers: Workers) -> None:
    with pytest.raises(ConfigError, match="cost, least_loaded"):
        Placement(workers, "best", may_join=True)


def test_a_feed_tells_the_net_change() -> None:
    held = {b"a" * 16, b"b" * 16}
    feed = CacheFeed(lambda: held)
    assert feed.take() is None
    feed.stored(b"a" * 16)
    feed.stored(b"c" * 16)
    feed.evicted(b"c" * 16)
    feed.evicted(b"b" * 16)
    assert feed.changed.is_set()
    events = feed.take()
    assert events == pb.CacheEvents(number=1, stored=b"a" * 16, evicted=b"b" * 16)
    assert feed.take() is None
    assert not feed.changed.is_set()
    assert feed.snapshot() == pb.CacheEvents(number=1, snapshot=True, stored=b"".join(held))


def test_what_is_handed_over_from_worker_to_worker_is_counted(workers: Workers) -> None:
    join(workers, "p0", "prefill")
    join(workers, "d0", "decode")
    placement = Placement(workers, "cost", may_join=False)
    placement.place(wanted()).handed_over(10, 5000, 0.001)
    (rate,) = placement.transfers.to_pb()
    assert (rate.prefill_worker, rate.decode_worker, rate.bytes_per_s) == ("p0", "d0", 500.0)
    both = Placement(workers, "cost", may_join=True)
    alone = both.place(wanted())
    alone.decode = alone.prefill
    alone.handed_over(10, 5000, 0.001)
    assert both.transfers.to_pb() == []
