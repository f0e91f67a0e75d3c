"""Limits of API keys, in a real store and without one."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.valkey import Valkey
from router.caller import ANONYMOUS, Caller, CallerLimits
from router.quotas import LocalQuotas, Quotas
from segue.errors import RateLimited
from segue.membership import Membership
from segue.quota_store import QuotaStore

MINUTE = 60.0


@pytest.fixture
async def store(valkey: Valkey, membership: Membership) -> AsyncIterator[QuotaStore]:
    async with QuotaStore(valkey.url, membership._prefix) as store:
        yield store


def caller(requests: int | None = None, tokens: int | None = None, key_id: str = "k") -> Caller:
    return Caller(key_id=key_id, limits=CallerLimits(requests, tokens))


async def ask(quotas: Quotas, who: Caller, num_tokens: int, num_used: int | None = None) -> None:
    async with quotas.taken(who, num_tokens) as taken:
        taken.num_used = num_tokens if num_used is None else num_used


@pytest.fixture(params=["store", "alone"])
async def quotas(request: pytest.FixtureRequest, store: QuotaStore) -> Quotas:
    return Quotas(QuotaStore("redis://127.0.0.1:1", "c") if request.param == "alone" else store)


async def test_requests_are_counted_by_key(quotas: Quotas) -> None:
    for _ in range(3):
        await ask(quotas, caller(requests=3), 10)
    with pytest.raises(RateLimited, match="3 requests a minute") as caught:
        await ask(quotas, caller(requests=3), 10)
    assert 15 < (caught.value.retry_after_s or 0) <= 20
    await ask(quotas, caller(requests=3, key_id="another"), 10)
    await ask(quotas, ANONYMOUS, 10)


async def test_tokens_that_were_not_used_are_given_back(quotas: Quotas) -> None:
    for _ in range(5):
        await ask(quotas, caller(tokens=1000), 500, num_used=100)
    with pytest.raises(RateLimited, match="1000 tokens a minute") as caught:
        await ask(quotas, caller(tokens=1000), 600)
    assert 5 < (caught.value.retry_after_s or 0) <= 6
    await ask(quotas, caller(tokens=1000), 500)


async def test_who_asks_for_more_than_a_minute_allows_pays_afterwards(quotas: Quotas) -> None:
    await ask(quotas, caller(tokens=100), 10_000, num_used=250)
    with pytest.raises(RateLimited) as caught:
        await ask(quotas, caller(tokens=100), 1)
    assert 89 < (caught.value.retry_after_s or 0) <= 91, "150 in debt, and one more"


async def test_a_request_that_failed_costs_no_tokens(quotas: Quotas) -> None:
    with pytest.raises(KeyError):
        async with quotas.taken(caller(tokens=100), 100):
            raise KeyError
    await ask(quotas, caller(tokens=100), 99)


async def test_two_routers_share_what_is_left(store: QuotaStore) -> None:
    one, other = Quotas(store), Quotas(store)
    await ask(one, caller(requests=2), 1)
    await ask(other, caller(requests=2), 1)
    for quotas in (one, other):
        with pytest.raises(RateLimited):
            await ask(quotas, caller(requests=2), 1)


@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 60)), min_size=1, max_size=40), st.integers(60, 120))
def test_no_minute_gets_more_than_twice_its_limit(asked: list[tuple[float, int]], limit: int) -> None:
    """A full bucket and what flows in; and who is refused gets it after the time that it was told."""
    now_s = 0.0
    quotas = LocalQuotas(lambda: now_s)
    given_at: list[tuple[float, int]] = []
    for pause_s, tokens in asked:
        now_s += pause_s
        if wait_s := quotas.take("k", (0, limit), 1, tokens):
            now_s += wait_s * 1.0001
            assert not quotas.take("k", (0, limit), 1, tokens)
        given_at.append((now_s, tokens))
        assert sum(size for at_s, size in given_at if at_s > now_s - MINUTE) <= 2 * limit + 1
