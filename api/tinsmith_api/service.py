"""What the routes share: the journal, the workers, who waits for what, and a few short memories."""

import asyncio
import contextlib
import functools
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import sqlalchemy as sa

from tinsmith.errors import InvalidInput
from tinsmith.tokenizer import Tokenizer
from tinsmith_api.embedded import Workers
from tinsmith_api.house import PERIODS, House
from tinsmith_api.journal import leases, metrics
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.identities import Caller
from tinsmith_api.journal.leases import Pool
from tinsmith_api.journal.objects import ObjectStore
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.store import Result, Statement, Store
from tinsmith_api.limits import Calls, Limits, LocalCalls
from tinsmith_api.memory import Memory
from tinsmith_api.settings import Settings, open_objects
from tinsmith_api.signer import Signer
from tinsmith_api.streams import Streams
from tinsmith_api.uploads import Uploads

Json = dict[str, Any]

# How long a call waits for a base model that is being loaded; clients hang up after a minute.
_LOADING_SECONDS = 50.0
_PROMISES_AT_MOST = 100_000
# Calls whose payload is the client's alone: into that of others the service puts names of objects and seeds.
_COMPARED = (ops.FORWARD, ops.FORWARD_BACKWARD, ops.OPTIM_STEP)
# Of more bytes only the number is compared, or the journal would keep others waiting.
_COMPARED_BYTES = 1 << 20


class Wakeups:
    """Who waits for which future; `wake` costs nothing when nobody does. And which futures this process
    knows to be unfinished without asking the journal: it submitted them and was not woken for them yet."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, list[asyncio.Event]] = defaultdict(list)
        self._unfinished: dict[str, str] = {}

    def promise(self, request_id: str, tenant_id: str) -> None:
        if len(self._unfinished) >= _PROMISES_AT_MOST:  # whose end was never heard of, some of them
            self._unfinished.clear()
        self._unfinished[request_id] = tenant_id

    def retract(self, request_id: str) -> None:
        self._unfinished.pop(request_id, None)

    def is_unfinished(self, request_id: str, tenant_id: str) -> bool:
        return self._unfinished.get(request_id) == tenant_id

    @contextlib.contextmanager
    def expecting(self, request_id: str) -> Iterator[asyncio.Event]:
        event = asyncio.Event()
        self._waiting[request_id].append(event)
        try:
            yield event
        finally:
            self._waiting[request_id].remove(event)
            if not self._waiting[request_id]:
                del self._waiting[request_id]

    def wake(self, request_id: str) -> None:
        self._unfinished.pop(request_id, None)
        for event in self._waiting.get(request_id, ()):
            event.set()

    def wake_all(self) -> None:
        """A worker is new: what the one before it finished last may never have been announced."""
        self._unfinished.clear()
        for events in self._waiting.values():
            for event in events:
                event.set()


@dataclass(frozen=True)
class Facts:
    """What validation needs to know of a base model."""

    vocab_size: int
    max_context_length: int
    max_rank: int
    architecture: str
    tokenizer: str
    tokenizer_files: str = ""
    single_tenant: bool = False


class Doorbell(Protocol):
    """How workers hear of operations: `embedded.Workers` or `fleet.Fleet`."""

    @property
    def ready(self) -> bool: ...
    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    def ring(self, worker_id: str, request_id: str) -> None:
        """Say that an operation is ready. Nothing is lost if nobody hears it."""
        ...


class Service:
    """`on_failure` is called when the service cannot go on; `failure` says why in a sentence."""

    def __init__(self, settings: Settings, *, on_failure: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self.failure = ""
        self._on_failure = on_failure
        settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.journal = Store(settings.database_url)
        self.objects: ObjectStore = open_objects(settings)
        self.signer = Signer(self.journal)
        self.wakeups = Wakeups()
        self.streams = Streams()
        self.doorbell = self._open_doorbell()
        self.callers: Memory[Caller] = Memory(seconds=10)
        self.owned: Memory[Any] = Memory(seconds=10)
        self.tokenizers: Memory[bytes] = Memory(seconds=600, size=8)
        self.open_tokenizers: Memory[Tokenizer] = Memory(seconds=3600, size=8)
        self.samplers: Memory[str] = Memory(seconds=86400)  # of callers that open none themselves
        self.opening_sampler = asyncio.Lock()
        self._pools: Memory[dict[str, Pool]] = Memory(seconds=1)
        self._workers_changed = asyncio.Event()
        self.limits = Limits(settings, self.read, self._open_calls())
        self.uploads = Uploads(2 * settings.max_forward_backward_bytes)
        self._chores: list[asyncio.Task[None]] = []
        self._retrieved: dict[str, float] = {}

    def _open_doorbell(self) -> Doorbell:
        if not self.settings.is_fleet:
            return Workers(
                self.settings,
                self.journal,
                on_done=self.wakeups.wake,
                on_piece=self.streams.put,
                on_ready=self._worker_is_ready,
                on_failure=self._fail,
            )
        from tinsmith_api.fleet import Fleet

        redis = self.settings.redis.get_secret_value()
        return Fleet(
            redis,
            name=self.streams.name,
            on_done=self.wakeups.wake,
            on_piece=self.streams.put,
            on_missed=self._worker_is_ready,
        )

    def _open_calls(self) -> Calls:
        if not self.settings.is_fleet:
            return LocalCalls()
        from tinsmith_api.fleet import SharedCalls

        return SharedCalls(self.settings.redis.get_secret_value())

    async def start(self) -> None:
        await self.doorbell.start()
        if not self.settings.is_fleet:
            house = House(self.settings, self.journal, self.objects)
            self._chores = [asyncio.create_task(_repeat(house, name)) for name in PERIODS]
        self._chores.append(asyncio.create_task(self._note_retrieved()))

    async def stop(self) -> None:
        for chore in self._chores:
            chore.cancel()
        await self.doorbell.stop()
        self.uploads.stop()
        await asyncio.to_thread(self.journal.close)

    def retrieved(self, request_id: str) -> None:
        """A result was fetched. Traces show it; nobody waits for it to be written."""
        self._retrieved.setdefault(request_id, time.time())

    def cancelled(self, sample: Operation) -> None:
        """A sample was given up: wake who waits for it here, and have its worker look at it, which stops it
        and wakes those who wait elsewhere."""
        self.wakeups.wake(sample.request_id)
        self.wakeups.wake(sample.subject)
        if sample.worker_id is not None:
            self.doorbell.ring(sample.worker_id, sample.request_id)

    async def _note_retrieved(self) -> None:
        while True:
            await asyncio.sleep(1.0)
            if self._retrieved:
                times, self._retrieved = self._retrieved, {}
                with contextlib.suppress(Exception):  # lost, and nothing else is
                    await self.write(functools.partial(ops.note_retrieved, times=times))

    def _fail(self, sentence: str) -> None:
        self.failure = sentence
        self._on_failure()

    def _worker_is_ready(self) -> None:
        self.wakeups.wake_all()
        self._pools.forget("")
        self._workers_changed.set()

    async def write(self, statement: Statement[Result]) -> Result:
        return await asyncio.wrap_future(self.journal.write(statement))

    async def read(self, statement: Statement[Result]) -> Result:
        return await asyncio.wrap_future(self.journal.read(statement))

    async def read_apart(self, statement: Statement[Result]) -> Result:
        """As `read`, for what finds more than a few rows: nobody else waits meanwhile."""
        return await asyncio.wrap_future(self.journal.read_apart(statement))

    async def submit(
        self,
        operation: Operation,
        caller: Caller | None = None,
        also: Statement[Json | None] = lambda _: None,
    ) -> dict[str, Any]:
        """Journal one operation, place it, ring for its worker; what the client is told.

        `also` runs in the same transaction if the operation is new; an error that it returns refuses it.
        Nothing is journaled and InvalidInput raised if its base model is not served (any more), TooMany or
        BudgetSpent if its tenant or caller has or used as much as it may.
        """
        pool = await self.pool(operation.base_model)
        await self.limits.check(operation, caller)
        operation = replace(
            operation,
            request_id=operation.request_id or uuid.uuid4().hex,
            key_id=caller.key_id if caller else None,
        )
        if operation.kind == ops.SAMPLE:
            operation = replace(operation, worker_id=pool.sampling_worker(operation.subject))
        # Before it can be finished, let alone announced.
        self.wakeups.promise(operation.request_id, operation.tenant_id)

        def statement(connection: sa.Connection) -> tuple[Operation, bool, str | None]:
            entered, is_new = ops.submit(connection, operation)
            if not is_new:
                _check_same(connection, entered, operation)
            if is_new and (error := also(connection)) is not None:
                entered = ops.refuse(connection, entered, error)
            if entered.kind == ops.SAMPLE:
                return entered, is_new, entered.worker_id
            if not is_new and entered.state != ops.QUEUED:
                return entered, is_new, None
            return entered, is_new, leases.place(connection, entered.subject, entered.base_model)

        try:
            entered, is_new, worker_id = await self.write(statement)
        except BaseException:
            self.wakeups.retract(operation.request_id)
            raise
        if not is_new or entered.error:
            self.wakeups.retract(operation.request_id)
        if is_new:
            metrics.SUBMITTED.labels(entered.kind, entered.base_model).inc()
        if worker_id is not None and (is_new or entered.state == ops.QUEUED):
            self.doorbell.ring(worker_id, entered.request_id)
        return {"request_id": entered.request_id, **(entered.answer or {})}

    async def check_rate(self, caller: Caller, route: str) -> None:
        await self.limits.check_rate(caller, route)

    async def pools(self) -> dict[str, Pool]:
        found = self._pools.get("")
        if found is None:
            # A worker is silent for a quarter of a lease between two heartbeats.
            heard = 1.5 * self.settings.lease_seconds if self.settings.is_fleet else None
            found = await self.read(lambda c: leases.pools(c, heard_within_seconds=heard))
            if not self.settings.is_fleet:  # what was served on this directory before is not served now
                found = {name: found.get(name, Pool(name, None, ())) for name in self.settings.models}
            self._pools.put("", found)
        return found

    async def pool(self, base_model: str) -> Pool:
        """InvalidInput, with the list of models, for an unknown name."""
        pools = await self.pools()
        if base_model not in pools:
            known = ", ".join(sorted(pools)) or "none yet"
            raise InvalidInput(f"unknown base_model {base_model!r}: this service has {known}")
        return pools[base_model]

    async def facts(self, base_model: str) -> Facts:
        """Waits for the first worker of this base model to load it; TimeoutError if that takes too long."""
        async with asyncio.timeout(_LOADING_SECONDS):
            while (facts := (await self.pool(base_model)).facts) is None:
                self._workers_changed.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._workers_changed.wait(), 1.0)
        # A worker of another version may know more or less.
        return Facts(**{name: facts[name] for name in Facts.__dataclass_fields__ if name in facts})


def _check_same(connection: sa.Connection, first: Operation, again: Operation) -> None:
    """InvalidInput if a number that was used is sent with another call, which would be lost without a word.
    What was refused, or would be now, says nothing of what it was."""
    if first.error or again.error:
        return
    is_same = (first.kind, first.base_model, first.tokens) == (again.kind, again.base_model, again.tokens)
    before = ops.payload(connection, first.request_id)
    if is_same and again.kind in _COMPARED and before is not None and again.payload is not None:
        # Protobuf writes maps in any order: of equal calls the bytes are the same, not their places.
        is_same = len(before) == len(again.payload) and (
            len(before) > _COMPARED_BYTES or Counter(before) == Counter(again.payload)
        )
    if not is_same:
        raise InvalidInput(
            f"seq_id {again.seq_id} of {again.subject} is taken by a {first.kind} of {first.tokens} tokens, "
            f"and this {again.kind} of {again.tokens} is not the same: give every call a number of its own"
        )


async def _repeat(house: House, chore: str) -> None:
    while True:
        await asyncio.sleep(PERIODS[chore])
        await asyncio.to_thread(house.do, chore)
