"""The engine of a group: data parallel over whole sequences.

Every rank has every adapter, and the base, whole or its part of it. A run's accumulated gradient is the sum
of what the ranks have in their buffers; it is summed up when it is needed, by a step or to be saved. All
ranks then take the same step with the same bits.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tinsmith.wire.batch import TrainOutput
from tinsmith_worker import optim
from tinsmith_worker.activations import Keeping
from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import (
    AdapterState,
    Answer,
    Failure,
    LoraSpec,
    OptimizerParams,
    StateOnTheWay,
    Work,
)
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.parallel.group import Group, all_or_none
from tinsmith_worker.parallel.shard import ShardedBase
from tinsmith_worker.pieces import Block, Computed, Piece, by_adapter, computed_of, on_the_way, outputs_of

log = logging.getLogger("tinsmith.worker")

# Pieces of an operation for each rank at least, if it has so many datums: they are what is dealt out.
_PIECES_PER_RANK = 4


class GroupEngine(TorchEngine):
    """A TorchEngine of one rank. The leader's is called as any engine, tells the others and answers; theirs
    `follow`. In deterministic mode operations go one by one, each shared out by its own lengths alone."""

    def __init__(self, base: Base, group: Group, settings: EngineSettings | None = None) -> None:
        super().__init__(base, settings)
        self._group = group
        self._ranks = group.ranks

    def follow(self) -> None:
        """On all ranks but the leader's: do what it does until it closes."""
        does = self._verbs()
        while True:
            verb, given = self._group.hear()
            if verb == "close":
                return
            with all_or_none():
                does[verb](*given)

    def _verbs(self) -> dict[str, Callable[..., object]]:
        does: dict[str, Callable[..., object]] = {
            "compile": self.base.compile,
            "keep": self._keep,
            "memory": lambda: self.memory_bytes,
            "mirror": self._mirror,
            "drop": self.drop,
            "forward_backward": self.forward_backward,
            "fold": self._fold,
            "optim_steps": self.optim_steps,
        }
        if isinstance(self.base, ShardedBase):
            does["accompany"] = functools.partial(self.base.accompany, train=False)
        return does

    def close(self) -> None:
        super().close()
        self._group.tell("close")
        self._group.close()

    def warm_up(self) -> None:
        if self.base.can_compile:
            self._group.tell("compile")
        super().warm_up()

    def _keep(self, keeping: Keeping | None) -> None:
        self._group.tell("keep", keeping)
        super()._keep(keeping)

    @property
    def memory_bytes(self) -> int:
        self._group.tell("memory")
        return self._group.least(super().memory_bytes)

    def create(self, run_id: str, spec: LoraSpec) -> None:
        super().create(run_id, spec)
        self._tell_state(run_id)

    def restore(self, run_id: str, state: AdapterState) -> None:
        super().restore(run_id, state)
        self._tell_state(run_id)

    def load(self, run_id: str, state: AdapterState, *, optimizer: bool) -> None:
        super().load(run_id, state, optimizer=optimizer)
        self._tell_state(run_id)

    def drop(self, run_id: str) -> None:
        self._group.tell("drop", run_id)
        super().drop(run_id)

    def begin_state(self, run_id: str, *, only_weights: bool = False, leaves: bool = False) -> StateOnTheWay:
        if self._adapters[run_id].has_gradient and not only_weights:
            self._fold(run_id)
        return super().begin_state(run_id, only_weights=only_weights, leaves=leaves)

    def begin_forward_backward(self, work: Sequence[Work]) -> Answer[list[TrainOutput]]:
        """Computed at once: the leader waits for what the others send it."""
        outputs = self._forward_backward(work)
        return Answer(lambda: outputs)

    def _forward_backward(self, work: Sequence[Work]) -> list[TrainOutput]:
        if not self._settings.deterministic or not self._group.leads:
            return self._together(work)
        outputs = []
        for one in work:
            outputs += self._together([one])
            if not one.given.forward_only:
                # At once: when else somebody asks for the state must not decide on the order of sums.
                self._fold(one.run_id)
        return outputs

    def _together(self, work: Sequence[Work]) -> list[TrainOutput]:
        """On the leader the outputs, on the others nothing that means anything."""
        self._group.tell("forward_backward", list(work))
        return outputs_of(work, self._compute(self._all_pieces(work)))

    def begin_optim_steps(
        self, steps: Sequence[tuple[str, OptimizerParams]]
    ) -> Answer[list[dict[str, float] | Failure]]:
        """Taken at once, as passes are."""
        self._group.tell("optim_steps", list(steps))
        for run_id, _ in steps:
            adapter = self._adapters[run_id]
            adapter.open_gradient()
            self._group.sum_up(_gradient(adapter))
        answers = optim.begin([(self._adapters[run_id], params) for run_id, params in steps]).get()
        for run_id, _ in steps:
            # Of a step that was refused the gradient is left: the leader has all of it.
            if self._adapters[run_id].has_gradient and not self._group.leads:
                _gradient(self._adapters[run_id]).zero_()
        return Answer(lambda: answers)

    def _tell_state(self, run_id: str) -> None:
        adapter = self._adapters[run_id]
        moments = [name for name in ("moment1", "moment2") if getattr(adapter, name) is not None]
        self._group.tell("mirror", run_id, adapter.spec, adapter.step, moments, adapter.has_gradient)
        self._share(adapter, moments)

    def _mirror(self, run_id: str, spec: LoraSpec, step: int, moments: list[str], has_gradient: bool) -> None:
        """Of a follower: have the leader's adapter, but for the gradient, which the leader holds."""
        self._adapters.pop(run_id, None)
        adapter = self.base.blank_adapter(spec)
        for name in moments:
            setattr(adapter, name, torch.empty_like(adapter.weights))
        self._share(adapter, moments)
        adapter.refresh()
        adapter.step, adapter.has_gradient = step, has_gradient
        if has_gradient:
            adapter.open_gradient()
        self._adapters[run_id] = adapter

    def _share(self, adapter: Adapter, moments: list[str]) -> None:
        for name in ("weights", *moments):
            self._group.share(getattr(adapter, name))

    def _fold(self, run_id: str) -> None:
        """Bring the accumulated gradient together in the leader's buffer."""
        self._group.tell("fold", run_id)
        gradient = _gradient(self._adapters[run_id])
        self._group.sum_up(gradient)
        if not self._group.leads:
            gradient.zero_()

    def _piece_tokens(self, tokens: int) -> int:
        return min(super()._piece_tokens(tokens), -(-tokens // (self._ranks * _PIECES_PER_RANK)))

    def _compute(self, pieces: list[Piece]) -> Computed:
        """On the leader everything, on the others nothing."""
        parts = deal(pieces, self._ranks)
        for piece in pieces:
            if not piece.given.forward_only:
                piece.adapter.open_gradient()
                piece.adapter.has_gradient = True
        # A base in parts is gathered in every pass: whoever leaves it midway leaves the others waiting.
        is_sharded = isinstance(self.base, ShardedBase)
        try:
            with all_or_none() if is_sharded else contextlib.nullcontext():
                blocks = self._run_all(parts)
                mine = _in_order(computed_of(blocks, on_the_way(blocks)), parts[self._group.rank])
        except Exception as error:
            log.exception("rank %d failed in its part of a pass", self._group.rank)
            mine = {"error": str(error) or repr(error), "no_room": isinstance(error, MemoryError)}
        collected = self._group.collect(mine)
        for rank, of_rank in enumerate(collected):
            if "error" in of_rank:
                kind = MemoryError if of_rank["no_room"] else RuntimeError
                raise kind(f"rank {rank}: {of_rank['error']}")
        return _all_of(parts, collected)

    def _run_all(self, parts: list[list[Piece]]) -> list[Block]:
        """This rank's part; with a base in parts, in as many passes as the rank that has most."""
        blocks: list[Block] = []
        for train in (True, False):
            passes = [self._passes(part, train=train) for part in parts]
            ours = passes[self._group.rank]
            for group in ours:
                blocks += self._run(group, train=train)
            if isinstance(self.base, ShardedBase):
                for _ in range(max(map(len, passes)) - len(ours)):
                    self.base.accompany(train=train)
        return blocks


def deal(pieces: list[Piece], ranks: int) -> list[list[Piece]]:
    """A part for each rank, of about as many tokens; one adapter's pieces side by side. Some may be empty."""
    parts: list[list[Piece]] = [[] for _ in range(ranks)]
    for train in (True, False):
        ordered = by_adapter([piece for piece in pieces if piece.given.forward_only is not train])
        total, start = sum(piece.tokens for piece in ordered), 0
        for piece in ordered:
            # Each goes where its middle falls when the whole stream is cut into equal stretches.
            parts[(2 * start + piece.tokens) * ranks // (2 * total)].append(piece)
            start += piece.tokens
    return parts


def _in_order(computed: Computed, part: list[Piece]) -> dict[str, Any]:
    """What a rank's part came to, as it is sent: all rows in the order of the part."""
    found = {id(piece): results for piece, results in computed.results}
    rows = [found[id(piece)].reshape(-1) for piece in part]
    return {"rows": np.concatenate([np.empty(0, np.float32), *rows]), "sums": computed.metric_sums}


def _all_of(parts: list[list[Piece]], collected: list[dict[str, Any]]) -> Computed:
    computed = Computed([], [])
    for part, of_rank in zip(parts, collected, strict=False):
        start = 0
        for piece in part:
            width = piece.given.targets_TK.shape[1] + 1
            stop = start + piece.tokens * width
            computed.results.append((piece, of_rank["rows"][start:stop].reshape(piece.tokens, width)))
            start = stop
        computed.metric_sums.extend((operation, own) for operation, own in of_rank["sums"])
    return computed


def _gradient(adapter: Adapter) -> Any:
    assert adapter.gradient is not None
    return adapter.gradient
