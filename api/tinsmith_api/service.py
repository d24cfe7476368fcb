"""What the routes share: the journal, the workers, who waits for what, and a few short memories."""

import asyncio
import contextlib
import functools
import logging
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import sqlalchemy as sa

from tinsmith.errors import InvalidInput
from tinsmith_api.embedded import Workers
from tinsmith_api.journal import checkpoints, leases
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.objects import ObjectStore, open_store
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.store import Result, Statement, Store
from tinsmith_api.journal.tables import sampled_sequences
from tinsmith_api.settings import Settings

log = logging.getLogger("tinsmith")

Value = TypeVar("Value")
Json = dict[str, Any]

_DAY_SECONDS = 86400.0
_HOUSEKEEPING_SECONDS = 60.0
# What is deleted in one transaction: everybody else's writes wait for it.
_PIECE = 500


class Memory(Generic[Value]):
    """What was read lately: at most `size` values, each for `seconds`."""

    def __init__(self, seconds: float, size: int = 4096) -> None:
        self.seconds = seconds
        self.size = size
        self._values: dict[str, tuple[float, Value]] = {}

    def get(self, key: str) -> Value | None:
        found = self._values.get(key)
        return found[1] if found and found[0] > time.monotonic() else None

    def put(self, key: str, value: Value) -> Value:
        if len(self._values) >= self.size:
            self._values.pop(next(iter(self._values)))
        self._values[key] = (time.monotonic() + self.seconds, value)
        return value

    def forget(self, key: str) -> None:
        self._values.pop(key, None)


class Wakeups:
    """Who waits for which future; `wake` costs nothing when nobody does. And which futures this process
    knows to be unfinished without asking the journal: it submitted them and was not woken for them yet."""

    def __init__(self) -> None:
        self._waiting: defaultdict[str, list[asyncio.Event]] = defaultdict(list)
        self._unfinished: dict[str, str] = {}

    def promise(self, request_id: str, tenant_id: str) -> None:
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


class Service:
    """`on_failure` is called when the service cannot go on; `failure` says why in a sentence."""

    def __init__(self, settings: Settings, *, on_failure: Callable[[], None] = lambda: None) -> None:
        self.settings = settings
        self.failure = ""
        self._on_failure = on_failure
        settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.journal = Store(f"sqlite:///{settings.folder / 'journal.db'}")
        self.objects: ObjectStore = open_store(str(settings.folder / "objects"))
        self.wakeups = Wakeups()
        self.workers = Workers(
            settings,
            self.journal,
            on_done=self.wakeups.wake,
            on_ready=self.wakeups.wake_all,
            on_failure=self._fail,
        )
        self.key_owners: Memory[str] = Memory(seconds=10)
        self.owned: Memory[Any] = Memory(seconds=10)
        self._facts: dict[str, Facts] = {}
        self._housekeeping: asyncio.Task[None] | None = None

    async def start(self) -> None:
        await self.workers.start()
        self._housekeeping = asyncio.create_task(self._keep_house())

    async def stop(self) -> None:
        if self._housekeeping:
            self._housekeeping.cancel()
        await self.workers.stop()
        self.journal.close()

    def _fail(self, sentence: str) -> None:
        self.failure = sentence
        self._on_failure()

    async def write(self, statement: Statement[Result]) -> Result:
        return await asyncio.wrap_future(self.journal.write(statement))

    async def read(self, statement: Statement[Result]) -> Result:
        return await asyncio.wrap_future(self.journal.read(statement))

    async def read_apart(self, statement: Statement[Result]) -> Result:
        """As `read`, for what finds more than a few rows: nobody else waits meanwhile."""
        return await asyncio.wrap_future(self.journal.read_apart(statement))

    async def submit(
        self, operation: Operation, also: Statement[Json | None] = lambda _: None
    ) -> dict[str, Any]:
        """Journal one operation, ring for its worker; what the client is told.

        `also` runs in the same transaction if the operation is new; an error that it returns refuses it.
        InvalidInput, and nothing journaled, if its base model is not served (any more).
        """
        self.check_model(operation.base_model)
        operation = replace(operation, request_id=operation.request_id or uuid.uuid4().hex)
        # Before it can be finished, let alone announced.
        self.wakeups.promise(operation.request_id, operation.tenant_id)

        def statement(connection: sa.Connection) -> tuple[Operation, bool]:
            entered, is_new = ops.submit(connection, operation)
            if is_new and (error := also(connection)) is not None:
                entered = ops.refuse(connection, entered, error)
            return entered, is_new

        try:
            entered, is_new = await self.write(statement)
        except BaseException:
            self.wakeups.retract(operation.request_id)
            raise
        if not is_new or entered.error:
            self.wakeups.retract(operation.request_id)
        if is_new or entered.state == ops.QUEUED:
            self.workers.ring(entered.base_model, entered.request_id)
        return {"request_id": entered.request_id, **(entered.answer or {})}

    async def facts(self, base_model: str) -> Facts:
        """Waits for a worker that starts. InvalidInput, with the list of models, for an unknown name."""
        self.check_model(base_model)
        if base_model not in self._facts:
            child = self.workers.children[base_model]
            await asyncio.wait_for(child.ready.wait(), timeout=50)
            found = await self.read(lambda c: leases.facts_of(c, base_model))
            assert found is not None, base_model
            self._facts[base_model] = Facts(**found)
        return self._facts[base_model]

    def check_model(self, base_model: str) -> None:
        if base_model not in self.settings.models:
            raise InvalidInput(
                f"unknown base_model {base_model!r}: "
                f"this service has {', '.join(sorted(self.settings.models))}"
            )

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_SECONDS)
            try:
                await self.keep_house()
            except Exception:
                log.exception("housekeeping failed; it is tried again in a minute")

    async def keep_house(self) -> None:
        """Expire checkpoints, delete what nothing refers to, forget results nobody fetched for a day."""
        await self._repeat(functools.partial(checkpoints.expire, at_most=_PIECE))
        unnamed = functools.partial(checkpoints.unnamed_left, at_most=_PIECE)
        while paths := await self.read_apart(unnamed):
            await self.write(functools.partial(checkpoints.delete_all, paths=paths))
        for prefix in await self.read_apart(checkpoints.due_garbage):
            await asyncio.to_thread(self.objects.delete, prefix)
            await self.write(functools.partial(checkpoints.forget_garbage, object_prefix=prefix))
        day_ago = time.time() - _DAY_SECONDS
        await self._repeat(functools.partial(ops.purge_results, finished_before=day_ago, at_most=_PIECE))
        await self._repeat(functools.partial(_purge_sampled, created_before=day_ago))

    async def _repeat(self, purge: Statement[int]) -> None:
        """One piece after the other until nothing is left."""
        while await self.write(purge):
            pass


def _purge_sampled(connection: sa.Connection, created_before: float) -> int:
    old = (
        sa.select(sampled_sequences.c.id).where(sampled_sequences.c.created_at < created_before).limit(_PIECE)
    )
    return connection.execute(sa.delete(sampled_sequences).where(sampled_sequences.c.id.in_(old))).rowcount
