import pytest

from router.placement import WorkerFacts, least_loaded, place
from segue.errors import InvalidRequest, NoWorker


def worker(worker_id: str, roles: str, **facts: object) -> WorkerFacts:
    values = {"layout_fingerprint": "f", "capacity_tokens": 1000} | facts
    return WorkerFacts(worker_id=worker_id, roles=frozenset(roles.split("+")), **values)  # type: ignore[arg-type]


def test_the_least_loaded_pair_wins() -> None:
    workers = [
        worker("p0", "prefill", prefill_tokens=50),
        worker("p1", "prefill", prefill_tokens=10),
        worker("d0", "decode", decode_sequences=1),
        worker("d1", "decode", decode_sequences=2),
    ]
    prefill, decode = place(workers, 10, 10)
    assert (prefill.worker_id, decode.worker_id) == ("p1", "d0")


def test_free_memory_breaks_ties() -> None:
    workers = [
        worker("p0", "prefill"),
        worker("d0", "decode", available_blocks=5),
        worker("d1", "decode", available_blocks=6),
    ]
    assert place(workers, 10, 10)[1].worker_id == "d1"


def test_a_worker_with_both_roles_pairs_with_itself_only() -> None:
    workers = [worker("c0", "prefill+decode"), worker("d0", "decode", decode_sequences=-1)]
    pair = place(workers, 10, 10)
    assert pair[0] is pair[1]


def test_only_equal_layouts_pair() -> None:
    workers = [
        worker("p0", "prefill", layout_fingerprint="new"),
        worker("d0", "decode", layout_fingerprint="old"),
    ]
    with pytest.raises(NoWorker, match="fit together"):
        place(workers, 1, 1)


@pytest.mark.parametrize(
    ("workers", "missing"),
    [([], "no prefill and no decode"), ([worker("p", "prefill")], "no decode"), ([worker("d", "decode")], "no prefill")],
)
def test_a_missing_role_is_named(workers: list[WorkerFacts], missing: str) -> None:
    with pytest.raises(NoWorker, match=missing):
        place(workers, 1, 1)


def test_a_sequence_goes_where_it_fits_or_is_refused() -> None:
    workers = [
        worker("p0", "prefill"),
        worker("d0", "decode", capacity_tokens=100),
        worker("d1", "decode", decode_sequences=9),
    ]
    assert place(workers, 80, 40)[1].worker_id == "d1"
    with pytest.raises(InvalidRequest) as caught:
        place(workers, 800, 400)
    assert caught.value.field == "max_tokens"


def test_a_policy_sees_only_pairs_that_fit() -> None:
    seen = []

    def last(pairs):  # type: ignore[no-untyped-def]
        seen.extend(pairs)
        return least_loaded(pairs)

    workers = [worker("p0", "prefill"), worker("d0", "decode", capacity_tokens=1), worker("d1", "decode")]
    place(workers, 5, 5, last)
    assert [decode.worker_id for _, decode in seen] == ["d1"]
