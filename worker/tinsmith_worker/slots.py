"""Where adapters are: in a slot of the engine, or in host memory. (The third place is the object store: a run
that was snapshotted and forgotten.)

Everything here runs on the engine's thread.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping

from tinsmith_api.journal import metrics
from tinsmith_worker.contract import AdapterState, Engine, LoraSpec, StateOnTheWay


class Slots:
    """An engine whose adapters come and go: at most `slot_bytes` of them on its device at once, except that
    what one pass needs is there together. Those of the tenant that has most there leave first, of them the
    least recently used: nobody is pushed out by somebody else's thousand runs.

    An adapter that was out has the bits it had: weights, moments, step and accumulated gradient.
    """

    def __init__(self, engine: Engine, *, slot_bytes: int, host_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.host_bytes = host_bytes
        self._engine = engine
        self._on_device: dict[str, int] = {}  # run -> bytes, least recently used first
        self._in_host: dict[str, StateOnTheWay] = {}  # least recently used first
        self._host_total = 0
        self._tenants: dict[str, str] = {}  # run -> tenant
        self._held: Counter[str] = Counter()  # bytes of each tenant's adapters, in both places

    def holds(self, run_id: str) -> bool:
        return run_id in self._on_device or run_id in self._in_host

    def create(self, run_id: str, spec: LoraSpec, tenant_id: str) -> None:
        self.drop(run_id)
        self._tenants[run_id] = tenant_id
        self._make_room(self._engine.size_bytes(spec), keep=())
        self._engine.create(run_id, spec)
        self._enter(run_id, spec)

    def restore(self, run_id: str, state: AdapterState, tenant_id: str) -> None:
        self.drop(run_id)
        self._tenants[run_id] = tenant_id
        self._make_room(self._engine.size_bytes(state.spec), keep=())
        self._engine.restore(run_id, state)
        self._enter(run_id, state.spec)

    def drop(self, run_id: str) -> None:
        if run_id in self._on_device:
            self._leave_device(run_id)
            self._engine.drop(run_id)
        self._leave_host(run_id)
        self._tenants.pop(run_id, None)
        self._count()

    def bring(self, run_ids: Collection[str]) -> None:
        """Have these on the device, all at once."""
        for run_id in run_ids:
            if (size := self._on_device.pop(run_id, None)) is not None:
                self._on_device[run_id] = size  # the most recently used, now
        for run_id in run_ids:
            if (state := self._in_host.get(run_id)) is not None:
                self._make_room(self._engine.size_bytes(state.spec), keep=run_ids)
                self._engine.restore(run_id, state.arrival.result())
                self._leave_host(run_id)
                self._enter(run_id, state.spec)
                metrics.PAGE_INS.labels("host").inc()

    def in_parts(self, run_ids: Collection[str]) -> list[list[str]]:
        """The runs in parts that can be on the device at once."""
        parts: list[list[str]] = []
        room = 0
        for run_id in run_ids:
            size = self._on_device.get(run_id) or self._engine.size_bytes(self._in_host[run_id].spec)
            if size > room:
                parts.append([])
                room = self.slot_bytes
            parts[-1].append(run_id)
            room -= size
        return parts

    def begin_state(self, run_id: str, *, only_weights: bool = False) -> StateOnTheWay:
        """A copy of it, from wherever it is: of all, or of less if less is wanted."""
        return self._in_host.get(run_id) or self._engine.begin_state(run_id, only_weights=only_weights)

    def surplus(self, limits: Mapping[str, int], *, is_idle: Callable[[str], bool]) -> list[str]:
        """Idle runs that should leave this worker's memory: those that the host has no room for, and those of
        tenants that have more than their limit (tenant -> bytes) on device and host together."""
        leaving: list[str] = []
        if self._host_total > self.host_bytes:
            sizes = {run_id: state.nbytes for run_id, state in self._in_host.items()}
            total = self._host_total
            for run_id in self._in_order(sizes, filter(is_idle, sizes)):
                leaving.append(run_id)
                total -= sizes[run_id]
                if total <= self.host_bytes:
                    break
        for tenant_id, limit in limits.items():
            if self._held[tenant_id] <= limit:
                continue
            # Those in host memory were used less recently than those on the device.
            sizes = {r: state.nbytes for r, state in self._in_host.items()} | self._on_device
            its = [r for r in sizes if self._tenants.get(r) == tenant_id]
            total = sum(sizes[r] for r in its if r not in leaving)
            for run_id in its:
                if total > limit and run_id not in leaving and is_idle(run_id):
                    leaving.append(run_id)
                    total -= sizes[run_id]
        return leaving

    def _make_room(self, size: int, keep: Collection[str]) -> None:
        total = sum(self._on_device.values())
        if total + size <= self.slot_bytes:
            return
        sizes = dict(self._on_device)
        for run_id in self._in_order(sizes, (r for r in sizes if r not in keep)):
            # If there is no memory for it, it stays where it is.
            state = self._engine.begin_state(run_id, leaves=True)
            self._engine.drop(run_id)
            total -= self._leave_device(run_id)
            self._in_host[run_id] = state
            self._host_total += state.nbytes
            self._held[self._tenants[run_id]] += state.nbytes
            metrics.PAGE_OUTS.labels("host").inc()
            if total + size <= self.slot_bytes:
                return

    def _in_order(self, sizes: Mapping[str, int], may_leave: Iterable[str]) -> Iterable[str]:
        """Runs in the order in which they should leave a place that holds `sizes`, given in order of use."""
        has: Counter[str] = Counter()
        for run_id, size in sizes.items():
            has[self._tenants[run_id]] += size
        waiting: dict[str, deque[str]] = {}
        for run_id in may_leave:
            waiting.setdefault(self._tenants[run_id], deque()).append(run_id)
        while waiting:
            # Of equals the one whose adapter was used least recently: the first.
            tenant_id = max(waiting, key=lambda t: has[t])
            run_id = waiting[tenant_id].popleft()
            has[tenant_id] -= sizes[run_id]
            if not waiting[tenant_id]:
                del waiting[tenant_id]
            yield run_id

    def _enter(self, run_id: str, spec: LoraSpec) -> None:
        size = self._on_device[run_id] = self._engine.size_bytes(spec)
        self._held[self._tenants[run_id]] += size
        self._count()

    def _leave_device(self, run_id: str) -> int:
        size = self._on_device.pop(run_id)
        self._held[self._tenants[run_id]] -= size
        return size

    def _leave_host(self, run_id: str) -> None:
        if (state := self._in_host.pop(run_id, None)) is not None:
            self._host_total -= state.nbytes
            self._held[self._tenants[run_id]] -= state.nbytes

    def _count(self) -> None:
        metrics.SLOTS.labels("device").set(len(self._on_device))
        metrics.SLOTS.labels("host").set(len(self._in_host))
        metrics.SLOT_BYTES.labels("device").set(sum(self._on_device.values()))
        metrics.SLOT_BYTES.labels("host").set(self._host_total)
