"""The ledger that replicas share in Redis or Valkey: one script a reserve, one a settle, by the server's clock.

An account is a hash and, where it has a budget, a sorted set of holds; both are forgotten 40 days after the last
request. The braces in their names keep them on one node of a cluster. Lua's numbers are doubles: exact up to 2**53
microseconds, tokens and billionths.
"""

from __future__ import annotations

import asyncio
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from app.limits.ledger import Caps, Hold, LedgerDown, Standing

CONNECTIONS = 16

_GO_ON = """
local NONE, MINUTE, DAY = -1, 60000000, 86400000000
local account, holds = KEYS[1], KEYS[2]
local cap_requests, cap_tokens = tonumber(ARGV[1]), tonumber(ARGV[2])
local cap_day, cap_month = tonumber(ARGV[3]), tonumber(ARGV[4])
local lease, at = tonumber(ARGV[5]), tonumber(ARGV[6])
local id, hold_tokens, hold_nanos = ARGV[7], tonumber(ARGV[8]), tonumber(ARGV[9])
local member = id .. ':' .. ARGV[8] .. ':' .. ARGV[9]
local has_budget = cap_day ~= NONE or cap_month ~= NONE
local now = at
if at == 0 then
  local time = redis.call('TIME')
  now = time[1] * 1000000 + time[2]
end
local was = redis.call('HMGET', account, 'seen', 'clock', 'requests', 'tokens', 'day', 'day_used', 'month',
    'month_used', 'held_tokens', 'held_nanos')
local passed = math.min(math.max(now - (tonumber(was[1]) or now), 0), math.floor(lease / 2))
local clock = (tonumber(was[2]) or 0) + passed
local requests, tokens = tonumber(was[3]) or 0, tonumber(was[4]) or 0
local day, day_used = tonumber(was[5]) or 0, tonumber(was[6]) or 0
local month, month_used = tonumber(was[7]) or 0, tonumber(was[8]) or 0
local held_tokens, held_nanos = tonumber(was[9]) or 0, tonumber(was[10]) or 0

local function month_of(d) -- Howard Hinnant, civil_from_days
  local z = d + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local m = math.floor((5 * doy + 2) / 153)
  m = m < 10 and m + 3 or m - 9
  return (yoe + era * 400 + (m <= 2 and 1 or 0)) * 12 + m - 1
end

local function window(stored, used, current)
  if current > stored then return current, 0 end
  return (stored - current == 1) and stored or current, used
end

if cap_requests ~= NONE then requests = math.max(0, requests - passed * cap_requests / MINUTE) end
if cap_tokens ~= NONE then tokens = math.max(0, tokens - passed * cap_tokens / MINUTE) end
if has_budget then
  local today = math.floor(now / DAY)
  if today ~= day then day, day_used = window(day, day_used, today) end
  local this = month_of(today)
  if this ~= month then month, month_used = window(month, month_used, this) end
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', holds, '-inf', clock)) do
    local t, n = string.match(old, ':(%d+):(%d+)$')
    held_tokens, held_nanos = held_tokens - t, held_nanos - n
    redis.call('ZREM', holds, old)
  end
end

local function keep()
  redis.call('HSET', account, 'seen', now, 'clock', clock, 'requests', requests, 'tokens', tokens)
  redis.call('EXPIRE', account, 3456000)
  if has_budget then
    redis.call('HSET', account, 'day', day, 'day_used', day_used, 'month', month, 'month_used', month_used,
      'held_tokens', held_tokens, 'held_nanos', held_nanos)
    redis.call('EXPIRE', holds, 3456000)
  end
end
"""

_RESERVE = (
    _GO_ON
    + """
local SLACK = 0.000001
local refused = 0
if cap_day ~= NONE and day_used + held_tokens + hold_tokens > cap_day then refused = 1
elseif cap_month ~= NONE and month_used + held_nanos + hold_nanos > cap_month then refused = 2
elseif cap_requests ~= NONE and requests + 1 > cap_requests + SLACK then refused = 3
elseif cap_tokens ~= NONE and tokens + hold_tokens > cap_tokens + SLACK then refused = 4
end
if refused == 0 then
  if cap_requests ~= NONE then requests = requests + 1 end
  if cap_tokens ~= NONE then tokens = tokens + hold_tokens end
  if has_budget then
    redis.call('ZADD', holds, clock + lease, member)
    held_tokens, held_nanos = held_tokens + hold_tokens, held_nanos + hold_nanos
  end
end
keep()
-- a number in an answer would lose what stands behind the point
return {refused, now, string.format('%.6f', requests), string.format('%.6f', tokens), day, day_used, month, month_used,
  held_tokens, held_nanos}
"""
)

_SETTLE = (
    _GO_ON
    + """
local used_tokens, used_nanos = tonumber(ARGV[10]), tonumber(ARGV[11])
if cap_tokens ~= NONE then tokens = math.max(0, tokens + used_tokens - hold_tokens) end
if has_budget then
  if redis.call('ZREM', holds, member) == 1 then
    held_tokens, held_nanos = held_tokens - hold_tokens, held_nanos - hold_nanos
  end
  day_used, month_used = day_used + used_tokens, month_used + used_nanos
end
keep()
return 0
"""
)


class RedisLedger:
    """Accounts in a Redis at `url`. timeout: seconds for one answer, with the wait for a connection. lease: seconds.

    `at`, in microseconds, stands in for the server's clock unless it is 0: for drills of a clock that jumps.
    """

    __slots__ = ("_client", "_lease", "_prefix", "_reserve", "_settle", "_timeout", "at")

    def __init__(self, url: str, lease: float, timeout: float, prefix: str = "newel"):
        # a call is not tried twice: the caller waits, and one that was carried out unseen would be charged twice
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=CONNECTIONS,
            timeout=timeout,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
        )
        self._client = Redis.from_pool(pool)
        self._reserve, self._settle = self._client.register_script(_RESERVE), self._client.register_script(_SETTLE)
        self._lease, self._timeout, self._prefix, self.at = round(lease * 1e6), timeout, prefix, 0

    async def reserve(self, account: str, caps: Caps, hold: Hold) -> Standing:
        """The standing, with `hold` in it unless it is refused; raises LedgerDown."""
        said = await self._call(self._reserve, account, self._arguments(caps, hold))
        refused, now, requests, tokens, *windows = said
        return Standing(refused, now, float(requests), float(tokens), *windows)

    async def settle(self, account: str, caps: Caps, hold: Hold, tokens: int, nanos: int) -> None:
        """Puts what was used in the place of the hold; raises LedgerDown."""
        await self._call(self._settle, account, (*self._arguments(caps, hold), tokens, nanos))

    async def tend(self) -> None:
        """Does nothing: Redis forgets by itself."""

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    def _arguments(self, caps: Caps, hold: Hold) -> tuple[str | int, ...]:
        limits = (caps.requests, caps.tokens, caps.day, caps.month)
        return (*limits, self._lease, self.at, hold.id, hold.tokens, hold.nanos)

    async def _call(self, script: Any, account: str, arguments: tuple[str | int, ...]) -> Any:
        name = f"{self._prefix}:{{{account}}}"
        try:
            async with asyncio.timeout(self._timeout):
                return await script(keys=(name, f"{name}:holds"), args=arguments)
        except (RedisError, OSError, TimeoutError) as error:
            raise LedgerDown(f"Redis did not answer ({type(error).__name__})") from error
