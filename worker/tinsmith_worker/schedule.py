"""Which operations run next. Pure: no torch, no clock of its own, no I/O.

Within a run, operations execute in the order of their numbers, whatever order they arrive in.
Between tenants, tokens are shared by weight: the tenant that was served least goes first (start-time fair
queueing, Goyal et al. 1996: a tenant that was idle joins at the least virtual time of the busy ones; see
docs/decisions/0005-fair-shares.md). Who has a higher priority goes before all of that. And while several
tenants are about, a pass is filled up with one tenant's further operations only to a quarter, so that nobody
waits for the end of somebody else's long pass.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

FORWARD, FORWARD_BACKWARD, OTHER = "forward", "forward_backward", "other"

# What a call without tokens (optim_step, save_weights, …) is charged.
_CALL_TOKENS = 64
# So many calls that take no pass are executed in a row, of each tenant; then it is a pass's turn. More where
# a tenant is alone: what waits behind them are its own.
_CALLS_IN_A_ROW = 8
_CALLS_IN_A_ROW_ALONE = 64
# A tenant is about until so long after its last call; a training loop is silent for about a step at a time.
_ABOUT_SECONDS = 5.0
# After so long a missing number is looked for in the journal.
_LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Item:
    """One operation, as far as scheduling goes. `alone`: nothing may share its pass. `copies`: it leaves a
    copy of its adapter for the archive."""

    request_id: str
    run_id: str
    seq_id: int
    group: str  # FORWARD, FORWARD_BACKWARD or OTHER
    tokens: int = 0
    alone: bool = False
    copies: bool = False


@dataclass
class _Run:
    tenant_id: str
    next_seq: int
    weight: float = 1.0
    priority: int = 0
    size_bytes: int = 0
    items: dict[int, Item] = field(default_factory=dict)
    consumed: set[int] = field(default_factory=set)  # numbers that need no execution
    waiting_since: float | None = None  # when an item began to wait for a number that has not come
    was_looked_for: bool = False

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
    """`pass_tokens`: a pass takes operations until it holds this many tokens, and adapters until they are
    `slot_bytes` (a larger one goes alone)."""

    def __init__(self, *, pass_tokens: int, gap_seconds: float, slot_bytes: float = math.inf) -> None:
        self.pass_tokens = pass_tokens
        self.gap_seconds = gap_seconds
        self.slot_bytes = slot_bytes
        self.archive_is_full = False  # what would leave a copy for it has to wait
        self._owes_pass = False
        self._runs: dict[str, _Run] = {}
        self._ready: dict[str, _Run] = {}  # those with a next operation
        self._waiting: dict[str, _Run] = {}  # those that wait for a number that has not come
        self._served: dict[str, float] = {}
        # By priority, the least counter of those that were busy when the last batch was chosen. It stays
        # while nobody is: a tenant that had the worker for itself owes nothing to who comes after.
        self._clock: dict[int, float] = {}
        self._about: dict[str, float] = {}  # tenant -> when its last operation came

    def open_run(
        self,
        run_id: str,
        tenant_id: str,
        next_seq: int,
        *,
        weight: float = 1.0,
        priority: int = 0,
        size_bytes: int = 0,
    ) -> None:
        """Begin (or begin again) a run whose operations before `next_seq` are in its adapter already."""
        self._runs[run_id] = _Run(tenant_id, next_seq, weight, priority, size_bytes)
        self._ready.pop(run_id, None)
        self._waiting.pop(run_id, None)

    def close_run(self, run_id: str) -> None:
        for runs in (self._runs, self._ready, self._waiting):
            runs.pop(run_id, None)

    def is_idle(self, run_id: str) -> bool:
        return not self._runs[run_id].items

    def add(self, item: Item, now: float) -> bool:
        """False if this number was executed or given up already."""
        run = self._runs[item.run_id]
        if item.seq_id < run.next_seq or item.seq_id in run.consumed:
            return False
        self._about[run.tenant_id] = now
        if all(r.tenant_id != run.tenant_id or r.priority != run.priority for r in self._ready.values()):
            clock = self._clock.get(run.priority, 0.0)
            self._served[run.tenant_id] = max(self._served.get(run.tenant_id, 0.0), clock)
        run.items[item.seq_id] = item
        self._note(item.run_id, now)
        return True

    def consume(self, run_id: str, seq_id: int, now: float) -> None:
        """This number will never be executed (its submission was refused, or it was given up)."""
        run = self._runs[run_id]
        run.items.pop(seq_id, None)
        if seq_id >= run.next_seq:
            run.consumed.add(seq_id)
            run.skip_consumed()
            self._note(run_id, now)

    def next_batch(self, now: float) -> list[Item]:
        """What to execute now, in order; empty if nothing is ready.

        Calls that take no pass come first: they are short, and they free the operations behind them to
        share the next one. Otherwise: forward_backwards (or forwards) of as many runs as fit. Where there are
        too many of the first for others to wait for, the two take turns.
        """
        heads = self._heads()
        if not heads:
            return []
        least = self._runs[heads[0].run_id]
        self._clock[least.priority] = self._served[least.tenant_id]
        others = [item for item in heads if item.group == OTHER]
        if others and not (self._owes_pass and len(others) < len(heads)):
            now_executed = self._some_of_each(others, now)
            self._owes_pass = len(now_executed) < len(others)
            return [self._take(item, now) for item in now_executed]
        self._owes_pass = False
        first = next(item for item in heads if item.group != OTHER)
        batch, tokens, slots = [self._take(first, now)], first.tokens, self._runs[first.run_id].size_bytes
        runs, tenants = {first.run_id}, {self._runs[first.run_id].tenant_id}
        further_tokens = self._further_tokens(now)
        while not first.alone:
            for item in self._heads():
                run = self._runs[item.run_id]
                limit = self.pass_tokens if run.tenant_id not in tenants else further_tokens
                needs = 0 if item.run_id in runs else run.size_bytes
                if (
                    item.group == first.group
                    and not item.alone
                    and tokens + item.tokens <= limit
                    and slots + needs <= self.slot_bytes
                ):
                    break
            else:
                break
            batch.append(self._take(item, now))
            tokens, slots = tokens + item.tokens, slots + needs
            runs.add(item.run_id)
            tenants.add(run.tenant_id)
        return batch

    def _some_of_each(self, items: list[Item], now: float) -> list[Item]:
        """Of each tenant so many that nobody waits long for its next pass."""
        at_most = _CALLS_IN_A_ROW_ALONE if self._is_alone(now) else _CALLS_IN_A_ROW
        counts: Counter[str] = Counter()
        chosen: list[Item] = []
        for item in items:
            tenant_id = self._runs[item.run_id].tenant_id
            # One copy at a time: whether there is room for the next, the archive says.
            if counts[tenant_id] < at_most and not (item.copies and any(c.copies for c in chosen)):
                counts[tenant_id] += 1
                chosen.append(item)
        return chosen

    def _further_tokens(self, now: float) -> int:
        """Up to how many tokens a pass is filled with operations of tenants that have one in it already."""
        return self.pass_tokens if self._is_alone(now) else self.pass_tokens // 4

    def _is_alone(self, now: float) -> bool:
        """Whether at most one tenant is about."""
        for tenant_id, since in list(self._about.items()):
            if now - since > _ABOUT_SECONDS:
                del self._about[tenant_id]
        return len(self._about) < 2

    def ready(self) -> bool:
        return bool(self._heads())

    def overdue(self, now: float) -> list[tuple[str, list[int], list[int]]]:
        """(run, numbers that never came, numbers of the operations behind them), given up from now on."""
        found = []
        for run_id, run in list(self._waiting.items()):
            if run.waiting_since is None or now - run.waiting_since < self.gap_seconds:
                continue
            behind = sorted(run.items)
            expected = range(run.next_seq, behind[-1])
            missing = [n for n in expected if n not in run.items and n not in run.consumed]
            found.append((run_id, missing, behind))
            run.consumed.difference_update(expected)
            run.next_seq = behind[-1] + 1
            run.items.clear()
            run.skip_consumed()
            self._note(run_id, now)
        return found

    def stuck(self, now: float) -> list[tuple[str, int]]:
        """(run, number) that have waited for a few seconds for that number, each once: it may have come
        and not been heard of."""
        found = []
        for run_id, run in self._waiting.items():
            since = now if run.was_looked_for or run.waiting_since is None else run.waiting_since
            if now - since >= min(_LOOK_SECONDS, self.gap_seconds / 2):
                run.was_looked_for = True
                found.append((run_id, run.next_seq))
        return found

    def next_deadline(self) -> float | None:
        """When `stuck` or `overdue` could next find something."""
        look = min(_LOOK_SECONDS, self.gap_seconds / 2)
        return min(
            (
                run.waiting_since + (self.gap_seconds if run.was_looked_for else look)
                for run in self._waiting.values()
                if run.waiting_since is not None
            ),
            default=None,
        )

    def _heads(self) -> list[Item]:
        """Every run's next operation that can be executed now: by priority, then least-served tenant first;
        equals in the order they became ready."""
        runs = sorted(self._ready.values(), key=lambda r: (-r.priority, self._served[r.tenant_id]))
        heads = [run.items[run.next_seq] for run in runs]
        return [item for item in heads if not (item.copies and self.archive_is_full)]

    def _take(self, item: Item, now: float) -> Item:
        run = self._runs[item.run_id]
        run.advance()
        self._note(item.run_id, now)
        self._served[run.tenant_id] += (item.tokens or _CALL_TOKENS) / run.weight
        return item

    def _note(self, run_id: str, now: float) -> None:
        """Which of the lists this run belongs to, now that something about it has changed."""
        run = self._runs[run_id]
        if run.head():
            self._ready.setdefault(run_id, run)
        else:
            self._ready.pop(run_id, None)
        if not run.items or run.head():
            run.waiting_since = None
            self._waiting.pop(run_id, None)
        elif run.waiting_since is None:
            run.waiting_since = now
            run.was_looked_for = False
            self._waiting[run_id] = run
