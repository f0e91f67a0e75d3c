"""What is said while a Ray cluster has no room."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from deploy.room import Demand, never_fits, not_free

ONE, RANKS = Demand({"CPU": 2.0, "decode_node": 0.5}, 1), Demand({"CPU": 1.0, "GPU": 1.0}, 4)


def test_what_the_whole_cluster_lacks_is_named_with_how_much_there_is() -> None:
    assert never_fits([ONE, ONE, RANKS], {"CPU": 8.0, "GPU": 2.0, "decode_node": 1.0}) == (
        "all 3 workers take 4 GPU, and the whole cluster has 2 GPU"
    )
    assert never_fits([ONE], {"CPU": 2.0}) == "all 1 workers take 0.5 decode_node, and the whole cluster has 0 decode_node"


def test_what_others_use_is_named_as_well() -> None:
    assert not_free(ONE, {"CPU": 1.0}, {"CPU": 8.0, "decode_node": 3.0}) == (
        "it takes 2 CPU, 0.5 decode_node, and free in the whole cluster are 1 of 8 CPU, 0 of 3 decode_node"
    )
    assert not_free(RANKS, {}, {}).startswith("on one node each of its 4 ranks takes 1 CPU, 1 GPU, and free")


amounts = st.dictionaries(st.sampled_from(["CPU", "GPU", "own"]), st.integers(0, 8).map(float))


@given(st.lists(st.builds(Demand, amounts, st.integers(1, 4))), amounts)
def test_it_fits_or_not(demands: list[Demand], total: dict[str, float]) -> None:
    fits = all(sum(demand.of(name) for demand in demands) <= total.get(name, 0.0) for name in ("CPU", "GPU", "own"))
    assert (never_fits(demands, total) == "") is fits
