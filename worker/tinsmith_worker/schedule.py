"""Which operations run next. Pure: no torch, no clock of its own, no I/O.

Two rules. Within a run, operations execute in the order of their numbers, whatever order they arrive in.
Between tenants, tokens are shared fairly: the tenant that was served least goes first (start-time fair
queueing, Goyal et al. 1996: a tenant that was idle joins at the least virtual time of the busy ones).
"""

from dataclasses import dataclass, field

FORWARD, FORWARD_BACKWARD, OTHER = "forward", "forward_backward", "other"

# What a call without tokens (optim_step, save_weights, …) is charged.
_CALL_TOKENS = 64


@dataclass(frozen=True)
class Item:
    """One operation, as far as scheduling goes. `alone`: nothing may share its pass."""

    request_id: str
    run_id: str
    seq_id: int
    group: str  # FORWARD, FORWARD_BACKWARD or OTHER
    tokens: int = 0
    alone: bool = False


@dataclass
class _Run:
    tenant_id: str
    next_seq: int
    items: dict[int, Item] = field(default_factory=dict)
    consumed: set[int] = field(default_factory=set)  # numbers that need no execution
    waiting_since: float | None = None  # when an item began to wait for a number that has not come

    def head(self) -> Item | None:
        return self.items.get(self.next_seq)

    def advance(self) -> None:
        self.items.pop(self.next_seq, None)
        self.next_seq += 1
        self.skip_consumed()

    def skip_consumed(self) -> None:
        while self.next_seq in self.consumed:
            self.consumed.discard(self.next_seq)
            self.next_seq += 1


class Schedule:
    """`pass_tokens`: a pass takes operations until it holds this many tokens (a larger one goes alone)."""

    def __init__(self, *, pass_tokens: int, gap_seconds: float) -> None:
        self.pass_tokens = pass_tokens
        self.gap_seconds = gap_seconds
        self._runs: dict[str, _Run] = {}
        self._served: dict[str, float] = {}

    def open_run(self, run_id: str, tenant_id: str, next_seq: int) -> None:
        """Begin (or begin again) a run whose operations before `next_seq` are in its adapter already."""
        self._runs[run_id] = _Run(tenant_id, next_seq)

    def close_run(self, run_id: str) -> None:
        self._runs.pop(run_id, None)

    def add(self, item: Item, now: float) -> bool:
        """False if this number was executed or given up already."""
        run = self._runs[item.run_id]
        if item.seq_id < run.next_seq or item.seq_id in run.consumed:
            return False
        busy = {r.tenant_id for r in self._runs.values() if r.head()}
        if run.tenant_id not in busy:
            least = min((self._served[t] for t in busy), default=0.0)
            self._served[run.tenant_id] = max(self._served.get(run.tenant_id, 0.0), least)
        run.items[item.seq_id] = item
        self._note_gap(run, now)
        return True

    def consume(self, run_id: str, seq_id: int, now: float) -> None:
        """This number will never be executed (its submission was refused)."""
        run = self._runs[run_id]
        if seq_id >= run.next_seq:
            run.consumed.add(seq_id)
            run.skip_consumed()
            self._note_gap(run, now)

    def next_batch(self, now: float) -> list[Item]:
        """What to execute now, in order; empty if nothing is ready.

        Calls that take no pass come first: they are short, and they free the operations behind them to
        share the next one. Otherwise: forward_backwards (or forwards) of as many runs as fit.
        """
        ready = self._ready()
        if not ready:
            return []
        others = [item for item in ready if item.group == OTHER]
        if others:
            return [self._take(item, now) for item in others]
        first = ready[0]
        batch = [self._take(first, now)]
        total = first.tokens
        while not first.alone:
            fitting = [
                item
                for item in self._ready()
                if item.group == first.group and not item.alone and total + item.tokens <= self.pass_tokens
            ]
            if not fitting:
                break
            batch.append(self._take(fitting[0], now))
            total += fitting[0].tokens
        return batch

    def ready(self) -> bool:
        return any(run.head() for run in self._runs.values())

    def overdue(self, now: float) -> list[tuple[str, list[int], list[int]]]:
        """(run, numbers that never came, numbers of the operations behind them), given up from now on."""
        found = []
        for run_id, run in self._runs.items():
            if run.waiting_since is None or now - run.waiting_since < self.gap_seconds:
                continue
            behind = sorted(run.items)
            expected = range(run.next_seq, behind[-1])
            missing = [n for n in expected if n not in run.items and n not in run.consumed]
            found.append((run_id, missing, behind))
            run.consumed.difference_update(expected)
            run.next_seq = behind[-1] + 1
            run.items.clear()
            run.waiting_since = None
            run.skip_consumed()
        return found

    def next_deadline(self) -> float | None:
        """When `overdue` could next find something."""
        since = [run.waiting_since for run in self._runs.values() if run.waiting_since is not None]
        return min(since) + self.gap_seconds if since else None

    def _ready(self) -> list[Item]:
        """Every run's next operation, least-served tenant first; equals in the order of the runs."""
        runs = sorted((r for r in self._runs.values() if r.head()), key=lambda r: self._served[r.tenant_id])
        return [run.items[run.next_seq] for run in runs]

    def _take(self, item: Item, now: float) -> Item:
        run = self._runs[item.run_id]
        run.advance()
        self._note_gap(run, now)
        self._served[run.tenant_id] += item.tokens or _CALL_TOKENS
        return item

    def _note_gap(self, run: _Run, now: float) -> None:
        if not run.items or run.head():
            run.waiting_since = None
        elif run.waiting_since is None:
            run.waiting_since = now
