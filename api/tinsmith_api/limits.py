"""What a caller may have at once, use in all, and ask for in a minute.

Looked up once a second, with what came in between counted along, and again before a call is told that too
many others are under way. A fleet's API processes count calls per minute together, in Redis; everything else
is the journal's.
"""

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tinsmith.errors import InvalidInput
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal import usage
from tinsmith_api.journal.identities import Caller
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.usage import Budget, Spent
from tinsmith_api.memory import Memory
from tinsmith_api.settings import Settings

Read = Callable[[Callable[[Any], Any]], Awaitable[Any]]

# By then what was let in before is in the journal.
_SETTLING_SECONDS = 0.1
# Waiting for results, and saying that one is still there, is no use of the service.
_UNCOUNTED = {
    f"/api/v1/{route}"
    for route in (
        "retrieve_future",
        "retrieve_futures",
        "session_heartbeat",
        "telemetry",
        "client/dynamic_config",
    )
}


class TooMany(Exception):  # noqa: N818 - answered as 429
    """More than the caller may have at once, or ask for in a minute; clients wait and repeat the call."""

    def __init__(self, sentence: str, retry_after_seconds: float = 0) -> None:
        super().__init__(sentence)
        self.headers = {"retry-after": f"{max(1, round(retry_after_seconds))}"} if retry_after_seconds else {}


class BudgetSpent(Exception):  # noqa: N818 - answered as 402
    """Clients pause, and go on by themselves when the budget was raised."""


class Calls(Protocol):
    async def count(self, key_id: int, minute: int) -> int:
        """Count one call of this key; how many it made in this minute."""
        ...


class LocalCalls:
    def __init__(self) -> None:
        self._minute = 0
        self._calls: dict[int, int] = {}

    async def count(self, key_id: int, minute: int) -> int:
        if minute != self._minute:
            self._minute, self._calls = minute, {}
        self._calls[key_id] = self._calls.get(key_id, 0) + 1
        return self._calls[key_id]


@dataclass
class _Key:
    samples: int
    tokens: int


@dataclass
class _Spent:
    tokens: int


class Limits:
    def __init__(self, settings: Settings, read: Read, calls: Calls) -> None:
        self._settings = settings
        self._read = read
        self._calls = calls
        self._tenants: Memory[ops.Usage] = Memory(seconds=1)
        self._budgets: Memory[list[Budget]] = Memory(seconds=1)  # by session
        self._spent: Memory[_Spent] = Memory(seconds=1)  # by tenant or project: all its sessions share it
        # The same with what was used long ago, added up once. Anew now and then, as sessions change projects.
        self._totals: Memory[list[Spent]] = Memory(seconds=600)
        self._keys: Memory[_Key] = Memory(seconds=1)

    async def check_rate(self, caller: Caller, route: str) -> None:
        limit = caller.requests_per_minute
        if limit is None or route in _UNCOUNTED:
            return
        now = time.time()
        if await self._calls.count(caller.key_id, int(now // 60)) > limit:
            raise TooMany(f"this key may make {limit} calls a minute: wait for the next one", 60 - now % 60)

    async def check(self, operation: Operation, caller: Caller | None) -> None:
        """TooMany, BudgetSpent, or InvalidInput if it cannot be let in now. Otherwise it is counted."""
        budgets = await self._budgets_of(operation) if operation.tokens else []
        tenant, key = await self._tenant(operation.tenant_id), await self._key(caller)
        if self._of_calls(operation, tenant, caller, key) is not None:
            # By what was under way when it was looked up, which may be finished since.
            await asyncio.sleep(_SETTLING_SECONDS)
            self._tenants.forget_this(operation.tenant_id, tenant)
            tenant = await self._tenant(operation.tenant_id)
            if caller is not None and key is not None:
                self._keys.forget_this(str(caller.key_id), key)
                key = await self._key(caller)
        refusal = self._of_calls(operation, tenant, caller, key)
        for budget, spent in budgets:
            refusal = refusal or _of_budget(operation, budget, spent.tokens)
        if refusal is not None:
            # A call that is sent again was let in before.
            if not await self._read(lambda c: ops.is_known(c, operation.subject, operation.seq_id)):
                raise refusal
            return
        tenant.queued += 1
        tenant.queued_bytes += len(operation.payload or b"")
        tenant.runs += operation.kind == ops.CREATE_MODEL
        for _, spent in budgets:
            spent.tokens += operation.tokens
        if key is not None:
            key.samples += operation.kind == ops.SAMPLE
            key.tokens += operation.tokens

    async def _tenant(self, tenant_id: str) -> ops.Usage:
        known = self._tenants.get(tenant_id)
        if known is None:
            found = await self._read(lambda c: ops.usage(c, tenant_id))
            known = self._tenants.get(tenant_id) or self._tenants.put(tenant_id, found)
        return known

    async def _budgets_of(self, operation: Operation) -> list[tuple[Budget, _Spent]]:
        session_id = usage.session_of(operation.subject)
        budgets = self._budgets.get(session_id)
        if budgets is None:
            find = functools.partial(usage.budgets, session_id=session_id)
            budgets = self._budgets.put(session_id, await self._read(find))
        return [(budget, await self._spent_of(budget)) for budget in budgets]

    async def _spent_of(self, budget: Budget) -> _Spent:
        whose = budget.project_id or budget.tenant_id
        known = self._spent.get(whose)
        if known is None:
            total = self._totals.get(whose) or self._totals.put(whose, [Spent()])
            found = await self._read(functools.partial(usage.spent, budget=budget, before=total[0]))
            total[0] = found
            # If somebody else asked meanwhile, theirs: calls were counted to it already.
            known = self._spent.get(whose) or self._spent.put(whose, _Spent(found.settled + found.recent))
        return known

    def forget_totals(self, project_id: str) -> None:
        """A session came into this project, or left it."""
        self._totals.forget(project_id)
        self._spent.forget(project_id)

    async def _key(self, caller: Caller | None) -> _Key | None:
        """None if it has no limits."""
        if caller is None or (caller.concurrent_samples is None and caller.tokens_per_day is None):
            return None
        known = self._keys.get(str(caller.key_id))
        if known is None:
            found = await self._read(lambda c: usage.of_key(c, caller.tenant_id, caller.key_id))
            known = self._keys.get(str(caller.key_id)) or self._keys.put(str(caller.key_id), _Key(*found))
        return known

    def _of_calls(
        self, operation: Operation, tenant: ops.Usage, caller: Caller | None, key: _Key | None
    ) -> Exception | None:
        """Why it cannot be let in beside what its tenant and its key have under way."""
        refusal = self._of_tenant(operation, tenant)
        if refusal is None and caller is not None and key is not None:
            refusal = _of_key(operation, caller, key)
        return refusal

    def _of_tenant(self, operation: Operation, tenant: ops.Usage) -> Exception | None:
        limit = tenant.max_queued or self._settings.max_queued
        if tenant.queued >= limit:
            return TooMany(
                f"{tenant.queued} calls of yours wait to be executed, the limit is {limit}: "
                "wait for some of their results before sending more"
            )
        limit = tenant.max_queued_bytes or self._settings.max_queued_bytes
        # One call is always let in, or it never could be.
        if tenant.queued and tenant.queued_bytes + len(operation.payload or b"") > limit:
            return TooMany(
                f"{tenant.queued_bytes:,} bytes of your calls wait to be executed, the limit is {limit:,}: "
                "wait for some of their results before sending more"
            )
        limit = tenant.max_runs or self._settings.max_runs
        if operation.kind == ops.CREATE_MODEL and tenant.runs >= limit:
            return InvalidInput(
                f"{tenant.runs} runs of yours are open, the limit is {limit}: finish the sessions that "
                "you no longer need"
            )
        return None


def _of_budget(operation: Operation, budget: Budget, spent: int) -> Exception | None:
    if spent + operation.tokens <= budget.tokens:
        return None
    return BudgetSpent(
        f"the budget of {budget.of} is {budget.tokens} tokens, {spent} are used or under way, "
        f"and this call may take {operation.tokens}: an admin can raise it, calls then go on"
    )


def _of_key(operation: Operation, caller: Caller, key: _Key) -> Exception | None:
    most = caller.concurrent_samples
    if most is not None and operation.kind == ops.SAMPLE and key.samples >= most:
        return TooMany(
            f"{key.samples} samples of this key are under way, it may have {most}: wait for one of them", 1
        )
    most = caller.tokens_per_day
    if most is not None and operation.tokens and key.tokens + operation.tokens > most:
        return TooMany(
            f"this key may use {most} tokens in 24 hours; {key.tokens} are used or under way, and this call "
            f"may take {operation.tokens}: send less, or later",
            60,
        )
    return None
