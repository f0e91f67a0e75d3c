"""What API keys have left of their limits, shared by all routers: token buckets in Redis, one round trip for each request.

    segue:<cluster>:quota:<key id>    hash: requests and tokens left, and when that was; expires when both are full again

A bucket holds what a minute allows and fills evenly. It may be in debt: what an answer took beyond its share is paid later.
`refilled` is the same in Python, for when the store is away.
"""

from __future__ import annotations

import redis.asyncio as redis_client

from segue.membership import as_store_unavailable

# KEYS: the hash. ARGV: limits of requests and tokens (0: none), requests and tokens to take (negative: to give back), 1 to take
# them in any case. Gives 0 when they were taken, else the milliseconds until they could be.
_TAKE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local seen = tonumber(redis.call('HGET', KEYS[1], 'at') or now)
local wait = 0
local left = {}
for index, name in ipairs({'requests', 'tokens'}) do
  local limit, wanted = tonumber(ARGV[index]), tonumber(ARGV[index + 2])
  if limit > 0 then
    local has = tonumber(redis.call('HGET', KEYS[1], name) or limit)
    has = math.min(limit, has + (now - seen) * limit / 60)
    if wanted > has and ARGV[5] == '0' then
      wait = math.max(wait, (wanted - has) * 60 / limit)
    end
    left[name] = math.min(limit, has - wanted)
  end
end
if wait > 0 then
  return math.ceil(wait * 1000)
end
redis.call('HSET', KEYS[1], 'at', tostring(now))
for name, has in pairs(left) do
  redis.call('HSET', KEYS[1], name, tostring(has))
end
redis.call('EXPIRE', KEYS[1], 600)
return 0
"""


class QuotaStore:
    """Every method raises StoreUnavailable when Redis does not answer."""

    def __init__(self, redis_url: str, cluster_id: str) -> None:
        # A request waits for it: rather limits of this router alone than a slow answer.
        self._redis = redis_client.Redis.from_url(redis_url, socket_connect_timeout=0.5, socket_timeout=0.5)
        self._script = self._redis.register_script(_TAKE)
        self._prefix = f"segue:{cluster_id}:quota"

    async def __aenter__(self) -> QuotaStore:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._redis.aclose()

    async def take(self, key_id: str, limits: tuple[int, int], requests: int, tokens: int, *, always: bool = False) -> float:
        """`limits` are those of requests and tokens in a minute, 0 for none. Gives the seconds until so much is there; 0: it was
        taken."""
        async with as_store_unavailable():
            wait_ms = await self._script(keys=[f"{self._prefix}:{key_id}"], args=[*limits, requests, tokens, int(always)])
        return int(wait_ms) / 1000


def refilled(left: float, limit: int, seconds: float) -> float:
    """What is in a bucket `seconds` after `left` was."""
    return min(float(limit), left + seconds * limit / 60)
