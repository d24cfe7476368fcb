"""The torch engine: many runs' adapters trained at once on one frozen base.

work -> pieces (whole datums of one operation) -> passes (packed streams) -> model -> losses -> backward.

Shapes: T packed tokens, S sequences, D hidden, K targets per token, N rows of one piece, C columns of a loss.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinsmith.errors import InvalidInput
from tinsmith.wire.batch import Int64, TrainInput, TrainOutput
from tinsmith_worker import losses, optim
from tinsmith_worker.adapters import Adapter, adapter_elements
from tinsmith_worker.attention import CausalSequences
from tinsmith_worker.contract import AdamParams, AdapterState, Failure, LoraSpec, Work
from tinsmith_worker.copies import to_device
from tinsmith_worker.model import Base
from tinsmith_worker.stream import Segment, Stream

# A product of fewer rows may take another kernel, and so give other bits, than the same rows among more.
_LEAST_ROWS = 64


@dataclass(frozen=True)
class EngineSettings:
    """max_tokens_per_pass: how much goes through the model at once; activations grow with it.
    deterministic: a run's bits never depend on what shares its passes. It costs speed on a GPU, and a CPU is
    used with two threads.
    """

    max_tokens_per_pass: int = 8192
    deterministic: bool = False


@dataclass(frozen=True)
class _Piece:
    """Some whole datums of an operation, which go through the model in one pass: `rows` of its arrays."""

    adapter: Adapter
    given: TrainInput
    rows: slice
    lengths_S: Int64
    results: torch.Tensor  # [tokens of the operation, K + 1]: logprobs, then the loss of the row

    @property
    def tokens(self) -> int:
        return int(self.rows.stop - self.rows.start)


class TorchEngine:
    """Keeps `contract.Engine`. One thread."""

    def __init__(self, base: Base, settings: EngineSettings | None = None) -> None:
        self.base = base
        self.facts = base.facts
        self._settings = settings or EngineSettings()
        self._adapters: dict[str, Adapter] = {}
        if self._settings.deterministic:
            _make_deterministic(base)

    @property
    def memory_bytes(self) -> int:
        if self.base.device.type == "cuda":
            return torch.cuda.mem_get_info(self.base.device)[0]
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

    def size_bytes(self, spec: LoraSpec) -> int:
        """float32 weights, gradient and two moments, and the copy the base multiplies with."""
        copy = 0 if self.base.dtype == torch.float32 else self.base.dtype.itemsize
        return adapter_elements(spec, self.base.sites) * (4 * 4 + copy)

    def create(self, run_id: str, spec: LoraSpec) -> None:
        self._check_rank(spec)
        self._adapters[run_id] = self.base.new_adapter(spec)

    def drop(self, run_id: str) -> None:
        self._adapters.pop(run_id, None)

    def holds(self, run_id: str) -> bool:
        return run_id in self._adapters

    def forward_backward(self, work: Sequence[Work]) -> list[TrainOutput]:
        """See `contract.Engine`. Waits for the device once per operation, at the end."""
        results = [self._empty_results(one.given) for one in work]
        pieces = [
            piece for one, result in zip(work, results, strict=True) for piece in self._pieces(one, result)
        ]
        for train in (True, False):
            for group in self._passes([p for p in pieces if p.given.forward_only is not train]):
                self._run(group, train=train)
        on_host = [result.cpu().numpy() for result in results]
        return [TrainOutput(logprobs_TK=r[:, :-1], losses_T=r[:, -1]) for r in on_host]

    def optim_step(self, run_id: str, params: AdamParams) -> dict[str, float] | Failure:
        return optim.step(self._adapters[run_id], params)

    def state(self, run_id: str) -> AdapterState:
        return self._adapters[run_id].state()

    def restore(self, run_id: str, state: AdapterState) -> None:
        self._check_rank(state.spec)
        self._adapters[run_id] = self.base.adapter_of(state, optimizer=True)

    def load(self, run_id: str, state: AdapterState, *, optimizer: bool) -> None:
        adapter = self._adapters[run_id]
        ours, theirs = _described(adapter.spec), _described(state.spec)
        if ours != theirs:
            raise InvalidInput(f"the checkpoint is of an adapter of {theirs}, this run's is of {ours}")
        adapter.take(state, optimizer=optimizer)
        adapter.clear_gradient()

    def _check_rank(self, spec: LoraSpec) -> None:
        if not 1 <= spec.rank <= self.facts.max_rank:
            raise InvalidInput(f"rank must be from 1 to {self.facts.max_rank}, got {spec.rank}")

    def _empty_results(self, given: TrainInput) -> torch.Tensor:
        tokens, width = given.targets_TK.shape
        return torch.empty(tokens, width + 1, dtype=torch.float32, device=self.base.device)

    def _pieces(self, work: Work, results: torch.Tensor) -> list[_Piece]:
        """As many datums each as fit into a pass, a longer one alone. Depends on this operation only."""
        adapter, offsets_S = self._adapters[work.run_id], work.given.offsets_S
        pieces, first, datums = [], 0, len(work.given.lengths_S)
        while first < datums:
            limit = offsets_S[first] + self._settings.max_tokens_per_pass
            last = max(first + 1, int(np.searchsorted(offsets_S, limit, side="right")) - 1)
            rows = slice(int(offsets_S[first]), int(offsets_S[last]))
            pieces.append(_Piece(adapter, work.given, rows, work.given.lengths_S[first:last], results))
            first = last
        return pieces

    def _passes(self, pieces: list[_Piece]) -> list[list[_Piece]]:
        """Pieces that go through the model together. One adapter's stay in order and side by side."""
        seen = {id(piece.adapter): number for number, piece in reversed(list(enumerate(pieces)))}
        passes: list[list[_Piece]] = []
        room = 0
        for piece in sorted(pieces, key=lambda p: (*_neighbourhood(p.adapter.spec), seen[id(p.adapter)])):
            if piece.tokens > room:
                passes.append([])
                room = self._settings.max_tokens_per_pass
            passes[-1].append(piece)
            room -= piece.tokens
        return passes

    def _run(self, pieces: list[_Piece], *, train: bool) -> None:
        if train:
            for piece in pieces:
                piece.adapter.open_gradient()
        stream = self._pack(pieces)
        with torch.set_grad_enabled(train):
            hidden_TD = self.base.forward(stream)
        states_TD = hidden_TD.detach()
        if not train:
            for piece, segment in zip(pieces, stream.segments, strict=True):
                self._score(piece, states_TD[segment.start : segment.stop])
            return
        gradient_TD = torch.zeros_like(states_TD)
        for piece, segment in zip(pieces, stream.segments, strict=True):
            rows = slice(segment.start, segment.stop)
            self._score_and_differentiate(piece, states_TD[rows], gradient_TD[rows])
        hidden_TD.backward(gradient_TD)
        for piece in pieces:
            piece.adapter.has_gradient = True

    def _pack(self, pieces: list[_Piece]) -> Stream:
        lengths_S = np.concatenate([piece.lengths_S for piece in pieces])
        starts_S = np.cumsum(lengths_S) - lengths_S
        tokens = int(lengths_S.sum())
        tokens_T = np.zeros(self._bucket(tokens), np.int64)
        positions_T = np.zeros_like(tokens_T)
        tokens_T[:tokens] = np.concatenate([piece.given.tokens_T[piece.rows] for piece in pieces])
        positions_T[:tokens] = np.arange(tokens) - np.repeat(starts_S, lengths_S)
        segments, start = [], 0
        for piece in pieces:
            segments.append(Segment(start, start + piece.tokens, piece.adapter))
            start += piece.tokens
        return Stream(
            tokens_T=to_device(tokens_T, self.base.device),
            positions_T=to_device(positions_T, self.base.device),
            segments=tuple(segments),
            attention=CausalSequences(lengths_S, one_by_one=self.base.one_by_one),
        )

    def _bucket(self, tokens: int) -> int:
        """Rows of the stream for so many tokens. On a GPU a product's kernel, and with it the bits, may
        follow from the number of rows: there the deterministic engine knows one size only.
        """
        if self._settings.deterministic and self.base.device.type == "cuda":
            tokens = max(tokens, self._settings.max_tokens_per_pass)
        return -(-tokens // _LEAST_ROWS) * _LEAST_ROWS

    def _score(self, piece: _Piece, hidden_ND: torch.Tensor) -> None:
        targets_NK, columns = self._inputs(piece)
        logprobs_NK = self.base.head.logprobs(hidden_ND, piece.adapter, targets_NK)
        if losses.needs_whole_sequences(piece.given.loss):
            columns[losses.SEQUENCE_LOG_RATIO] = losses.sequence_log_ratio(
                logprobs_NK[:, 0], columns, piece.lengths_S
            )
        results = piece.results[piece.rows]
        results[:, :-1] = logprobs_NK
        results[:, -1] = losses.evaluate(piece.given.loss, logprobs_NK, columns)[0]

    def _score_and_differentiate(
        self, piece: _Piece, hidden_ND: torch.Tensor, gradient_ND: torch.Tensor
    ) -> None:
        head, loss, adapter = self.base.head, piece.given.loss, piece.adapter
        targets_NK, columns = self._inputs(piece)
        if losses.needs_whole_sequences(loss):
            logprobs_N = head.logprobs(hidden_ND, adapter, targets_NK)[:, 0]
            columns[losses.SEQUENCE_LOG_RATIO] = losses.sequence_log_ratio(
                logprobs_N, columns, piece.lengths_S
            )
        results = piece.results[piece.rows]

        def slope_of(rows: slice, logprobs_NK: torch.Tensor) -> torch.Tensor:
            of_rows = {name: column[rows] for name, column in columns.items()}
            losses_N, slope_NK = losses.evaluate(loss, logprobs_NK, of_rows)
            results[rows, :-1] = logprobs_NK
            results[rows, -1] = losses_N
            return slope_NK

        head.backward(hidden_ND, adapter, targets_NK, slope_of, gradient_ND)

    def _inputs(self, piece: _Piece) -> tuple[torch.Tensor, losses.Columns]:
        """Targets [N, K] and the loss's columns, on the device in one copy each."""
        given, rows, device = piece.given, piece.rows, self.base.device
        targets_NK = to_device(given.targets_TK[rows].astype(np.int64), device)
        if given.loss == "cross_entropy":
            return targets_NK, {
                "weights": to_device(given.columns["weights"][rows].astype(np.float32), device)
            }
        columns_CN = to_device(np.stack([column[rows] for column in given.columns.values()]), device)
        return targets_NK, dict(zip(given.columns, columns_CN, strict=True))


def _neighbourhood(spec: LoraSpec) -> tuple[int, int]:
    """Sorts adapters so that those acting on attention are one stretch of rows, and so are those acting on
    the MLPs; and equal ranks meet, which are padded to the widest of a pass."""
    return {(True, False): 0, (True, True): 1, (False, True): 2, (False, False): 3}[
        spec.train_attn, spec.train_mlp
    ], spec.rank


def _described(spec: LoraSpec) -> str:
    names = [name for name in ("train_attn", "train_mlp", "train_unembed") if getattr(spec, name)]
    return f"rank {spec.rank} with {', '.join(names)}"


def _make_deterministic(base: Base) -> None:
    """A run's numbers from its own rows only. Changes torch's settings for the whole process."""
    base.grouped_deltas = False
    base.one_by_one = True
    if base.device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    else:
        # Threads share the elements of a map evenly, and the last few of a share take a path that rounds
        # otherwise. Halves of a stream end between two rows; thirds, which four threads may make, do not. And
        # one thread alone adds up some sums in another order than two: always two, whatever the machine has.
        torch.set_num_threads(2)
