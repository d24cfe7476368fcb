"""The engine and the sampler of a single-tenant worker that is several processes.

With parallel none every rank holds all of a run, and its gradient is summed as an adapter's is. With fsdp2
a rank holds its rows of everything; for a file the leader asks for the others' tensor by tensor.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from tinsmith.wire.batch import Float32
from tinsmith_worker import optim
from tinsmith_worker.adapters import elements
from tinsmith_worker.contract import (
    AdapterState,
    Answer,
    Failure,
    LoraSpec,
    OptimizerParams,
    StateOnTheWay,
    arrived,
)
from tinsmith_worker.copies import on_host
from tinsmith_worker.engine import EngineSettings
from tinsmith_worker.in_pieces import FLATS, Held
from tinsmith_worker.parallel.engine import GroupEngine
from tinsmith_worker.parallel.group import Group
from tinsmith_worker.pieces import Computed, Piece
from tinsmith_worker.tuning.engine import TunedEngine, TunedSampler
from tinsmith_worker.tuning.shards import Counterparts, CutForm, ShardedTunedBase, Shards


class TunedGroupEngine(TunedEngine, GroupEngine):
    """Every rank has all of a run."""


class ShardedTunedEngine(TunedGroupEngine):
    """Every rank has its rows of a run, and of the states that were taken of it."""

    base: ShardedTunedBase
    has_states_in_pieces = True

    def __init__(self, base: ShardedTunedBase, group: Group, settings: EngineSettings | None = None) -> None:
        super().__init__(base, group, settings)
        self.rows = Rows(group, base.counterparts)

    def _verbs(self) -> dict[str, Callable[..., object]]:
        base, of = self.base, self.base.counterparts
        return super()._verbs() | {
            "accompany": lambda number: self._accompany(of[number] if number else None),
            "forget": of.forget,
            "create": self.create,
            "state": self._copy,
            "frozen": self.frozen,
            "open": base.open,
            "name": lambda run_id, number: self._adapters.update({run_id: of[number]}),
            "clear": lambda number, flats, step: base.clear(of[number], flats, step),
            "fill": lambda number, flat, at: base.fill(of[number], flat, at),
            "filled": lambda number: of[number].refresh(),
            "take_back": lambda run_id, number: self._take_back(run_id, of[number]),
        }

    def close(self) -> None:
        self.rows.close()
        super().close()

    def create(self, run_id: str, spec: LoraSpec) -> None:
        self._check_rank(spec)
        self._say("create", run_id, spec)
        self._adapters[run_id] = self.base.new_adapter(spec)

    def drop(self, run_id: str) -> None:
        if (adapter := self._adapters.get(run_id)) is not None and adapter is self.base.accompanied:
            self.base.accompanied = None
        super().drop(run_id)

    def restore(self, run_id: str, state: AdapterState) -> None:
        self._check_rank(state.spec)
        if isinstance(state, Held):
            self._say("take_back", run_id, state.handle.number)
            self._take_back(run_id, {flat: getattr(state, flat) for flat in FLATS} | {"step": state.step})
            return
        made = self.base.adapter_of(state, optimizer=True)
        self._say("name", run_id, made.number)
        self._adapters[run_id] = made

    def load(self, run_id: str, state: AdapterState, *, optimizer: bool) -> None:
        adapter = self._adapters[run_id]
        self._check_alike(adapter.spec, state.spec)
        assert isinstance(adapter, Shards)
        self.base.take(adapter, replace(state, gradient=None), optimizer=optimizer)

    def begin_state(self, run_id: str, *, only_weights: bool = False, leaves: bool = False) -> StateOnTheWay:
        """Copies in every rank's host memory, for which this waits."""
        self._say("state", run_id, only_weights)
        return arrived(self._copy(run_id, only_weights))

    def _copy(self, run_id: str, only_weights: bool) -> Held:
        adapter = self._adapters[run_id]
        wanted = {"weights": adapter.weights} if only_weights else adapter.flats()
        flats: dict[str, Any] = dict.fromkeys(FLATS) | {name: on_host(flat) for name, flat in wanted.items()}
        step = 0 if only_weights else adapter.step
        handle = _Handle()
        handle.number = self.base.counterparts.add(flats | {"step": step}, mark=handle)
        self._group.least(0)  # from here on all ranks have theirs
        form = self.base.form
        return Held(
            spec=adapter.spec,
            tensors=form.whole_layout,
            **flats,
            step=step,
            config=form.config,
            size=elements(form.whole_layout),
            tensor=lambda flat, number: self.rows.tensor(form, handle.number, flats[flat], flat, number),
            handle=handle,
        )

    def frozen(self, run_id: str) -> Shards:
        """In every rank's host memory: the model has its own copy of what is sampled."""
        self._say("frozen", run_id)
        adapter = self._adapters[run_id]
        compute = torch.empty(adapter.compute.shape, dtype=adapter.compute.dtype).copy_(adapter.compute)
        return self.base.blank_adapter(adapter.spec, device=compute.device, frozen=compute)

    def begin_optim_steps(
        self, steps: Sequence[tuple[str, OptimizerParams]]
    ) -> Answer[list[dict[str, float] | Failure]]:
        self._say("optim_steps", list(steps))
        answers = optim.begin([(self._adapters[run_id], params) for run_id, params in steps]).get()
        self.base.weights_changed()
        return Answer(lambda: answers)

    def _compute(self, pieces: list[Piece]) -> Computed:
        if pieces:
            adapter = pieces[0].adapter
            assert isinstance(adapter, Shards)
            self.base.accompanied = adapter
        return super()._compute(pieces)

    def _fold(self, run_id: str) -> None:
        """Every rank's rows of a gradient are summed up as it is computed."""

    def _say(self, verb: str, *given: Any) -> None:
        self.base.counterparts.bury()
        self._group.tell(verb, *given)

    def _accompany(self, adapter: Shards | None) -> None:
        self.base.accompanied = adapter
        self.base.accompany(train=False)

    def _take_back(self, run_id: str, given: dict[str, Any]) -> None:
        """This rank's rows of a run, as `state` left them."""
        adapter = self.base.blank_adapter(self.base.form.spec)
        flats = [flat for flat in FLATS if given[flat] is not None]
        self.base.clear(adapter, flats, given["step"])
        for flat in flats:
            getattr(adapter, flat).copy_(torch.from_numpy(given[flat]))
        adapter.refresh()
        self._adapters[run_id] = adapter


class _Handle:
    """Lives as long as anybody may ask for the other ranks' rows of a state."""

    number = 0


class Rows:
    """The rows of states that ranks have, for the leader's other threads; a thread of each other rank
    answers."""

    def __init__(self, group: Group, states: Counterparts) -> None:
        self._group, self._states = group, states
        self._channel = group.another_channel()
        self._asking = threading.Lock()
        self._is_closed = False
        if not group.leads:
            threading.Thread(target=self._answer, name="rows", daemon=True).start()

    def tensor(self, form: CutForm, state: int, own: Float32, flat: str, number: int) -> Float32:
        """On the leader: all of a tensor, of which `own` has this rank's rows."""
        _, offset, shape = form.layout[number]
        whole = form.shapes[number]
        count, found = int(np.prod(shape)), np.empty(whole, np.float32)
        into, total = found.reshape(-1), found.size
        with self._asking:
            for rank in range(self._group.ranks):
                part = into[min(rank * count, total) : min((rank + 1) * count, total)]
                if rank == 0:
                    part[:] = own[offset : offset + len(part)]
                elif len(part):
                    self._channel.send(torch.tensor([state, FLATS.index(flat), offset, len(part)]), rank)
                    self._channel.receive(torch.from_numpy(part), rank)
        return found

    def close(self) -> None:
        with self._asking:
            for rank in range(1, self._group.ranks):
                self._channel.send(torch.zeros(4, dtype=torch.int64), rank)

    def _answer(self) -> None:
        asked = torch.zeros(4, dtype=torch.int64)
        while True:
            self._channel.receive(asked, 0)
            state, flat, offset, count = asked.tolist()
            if not count:
                return
            flats = self._states[state]
            self._channel.send(torch.from_numpy(flats[FLATS[flat]][offset : offset + count]), 0)


class ShardedTunedSampler(TunedSampler):
    """Samples what is in all ranks' host memory."""

    base: ShardedTunedBase

    def hold(self, sampler_id: str, weights: Any) -> None:
        if isinstance(weights, AdapterState) and not self.holds(sampler_id):
            weights = self.base.adapter_of(weights, device=torch.device("cpu"))
        super().hold(sampler_id, weights)
