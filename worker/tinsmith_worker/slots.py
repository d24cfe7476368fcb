"""Where adapters are: in a slot of the engine, or in host memory. (The third place is the object store: a run
that was snapshotted and forgotten.)

Everything here runs on the engine's thread.
"""

from collections.abc import Callable, Collection

from tinsmith_api.journal import metrics
from tinsmith_worker.contract import AdapterState, Engine, LoraSpec


class Slots:
    """An engine whose adapters come and go: at most `slot_bytes` of them on its device at once, except that
    what one pass needs is there together. Least recently used ones leave first.

    An adapter that was out has the bits it had: weights, moments, step and accumulated gradient.
    """

    def __init__(self, engine: Engine, *, slot_bytes: int, host_bytes: int) -> None:
        self.slot_bytes = slot_bytes
        self.host_bytes = host_bytes
        self._engine = engine
        self._on_device: dict[str, int] = {}  # run -> bytes, least recently used first
        self._in_host: dict[str, AdapterState] = {}  # least recently used first
        self._host_total = 0

    def holds(self, run_id: str) -> bool:
        return run_id in self._on_device or run_id in self._in_host

    def create(self, run_id: str, spec: LoraSpec) -> None:
        self.drop(run_id)
        self._make_room(self._engine.size_bytes(spec), keep=())
        self._engine.create(run_id, spec)
        self._enter(run_id, spec)

    def restore(self, run_id: str, state: AdapterState) -> None:
        self.drop(run_id)
        self._make_room(self._engine.size_bytes(state.spec), keep=())
        self._engine.restore(run_id, state)
        self._enter(run_id, state.spec)

    def drop(self, run_id: str) -> None:
        if self._on_device.pop(run_id, None) is not None:
            self._engine.drop(run_id)
        self._leave_host(run_id)
        self._count()

    def bring(self, run_ids: Collection[str]) -> None:
        """Have these on the device, all at once."""
        for run_id in run_ids:
            if (size := self._on_device.pop(run_id, None)) is not None:
                self._on_device[run_id] = size  # the most recently used, now
        for run_id in run_ids:
            if (state := self._in_host.get(run_id)) is not None:
                self._make_room(self._engine.size_bytes(state.spec), keep=run_ids)
                self._engine.restore(run_id, state)
                self._leave_host(run_id)
                self._enter(run_id, state.spec)
                metrics.PAGE_INS.labels("host").inc()

    def state(self, run_id: str) -> AdapterState:
        """A copy of all of it, from wherever it is."""
        return self._in_host.get(run_id) or self._engine.state(run_id)

    def surplus(self, *, is_idle: Callable[[str], bool]) -> list[str]:
        """Idle runs that should leave host memory, least recently used first."""
        leaving, total = [], self._host_total
        for run_id, state in self._in_host.items():
            if total <= self.host_bytes:
                break
            if is_idle(run_id):
                leaving.append(run_id)
                total -= _bytes(state)
        return leaving

    def _make_room(self, size: int, keep: Collection[str]) -> None:
        total = sum(self._on_device.values())
        for run_id in [r for r in self._on_device if r not in keep]:
            if total + size <= self.slot_bytes:
                return
            state = self._engine.state(run_id)  # if there is no memory for it, it stays where it is
            self._engine.drop(run_id)
            total -= self._on_device.pop(run_id)
            self._in_host[run_id] = state
            self._host_total += _bytes(state)
            metrics.PAGE_OUTS.labels("host").inc()

    def _enter(self, run_id: str, spec: LoraSpec) -> None:
        self._on_device[run_id] = self._engine.size_bytes(spec)
        self._count()

    def _leave_host(self, run_id: str) -> None:
        if (state := self._in_host.pop(run_id, None)) is not None:
            self._host_total -= _bytes(state)

    def _count(self) -> None:
        metrics.SLOTS.labels("device").set(len(self._on_device))
        metrics.SLOTS.labels("host").set(len(self._in_host))
        metrics.SLOT_BYTES.labels("device").set(sum(self._on_device.values()))
        metrics.SLOT_BYTES.labels("host").set(self._host_total)


def _bytes(state: AdapterState) -> int:
    flats = (state.weights, state.moment1, state.moment2, state.gradient)
    return sum(flat.nbytes for flat in flats if flat is not None)
