"""The torch engine: many runs' adapters trained at once on one frozen base.

work -> pieces (whole datums of one operation) -> passes (packed streams) -> model -> losses -> backward.

Shapes: T packed tokens, S sequences, D hidden, K targets per token, N rows of one piece, C columns of a loss.
"""

import functools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tinsmith.errors import InvalidInput
from tinsmith.wire.batch import Int32, Int64, TrainInput, TrainOutput
from tinsmith.wire.loss_graph import LOSS as CUSTOM
from tinsmith_worker import custom_loss, losses, optim
from tinsmith_worker.activations import Keeping
from tinsmith_worker.adapters import Adapter, adapter_elements
from tinsmith_worker.attention import CausalSequences
from tinsmith_worker.contract import (
    AdamParams,
    AdapterState,
    Answer,
    Failure,
    LoraSpec,
    OptimizerParams,
    StateOnTheWay,
    Work,
)
from tinsmith_worker.copies import HostCopier, to_device
from tinsmith_worker.model import Base
from tinsmith_worker.pieces import Block, Piece, add_up, by_adapter, computed_of, on_the_way, outputs_of
from tinsmith_worker.stream import LEAST_ROWS, Segment, Stream

log = logging.getLogger("tinsmith.worker")

_PIECES_PER_PASS = 8
_SCORED = "\0scored"  # no run's id
# Triton's kernels are compiled for blocks of 16, 32, 64 and 128 columns.
_USUAL_RANKS = (8, 16, 32, 64, 128)


@dataclass(frozen=True)
class EngineSettings:
    """max_tokens_per_pass: how much goes through the model at once; activations grow with it.
    deterministic: a run's bits never depend on what shares its passes. It costs speed on a GPU, and a CPU is
    used with two threads.
    """

    max_tokens_per_pass: int = 8192
    deterministic: bool = False


class TorchEngine:
    """Keeps `contract.Engine`. One thread."""

    _ranks = 1
    has_states_in_pieces = False

    def __init__(self, base: Base, settings: EngineSettings | None = None) -> None:
        self.base = base
        self.facts = base.facts
        self._settings = settings or EngineSettings()
        self._adapters: dict[str, Adapter] = {}
        self._last_steps: Answer[list[dict[str, float] | Failure]] = Answer(list)  # not counted yet, maybe
        self._stepping: set[str] = set()
        self._copier = HostCopier(base.device)
        if self._settings.deterministic:
            _make_deterministic(base)

    def warm_up(self) -> None:
        """Have everything compiled before somebody waits for it: the layers, and the kernels for usual ranks.
        A minute the first time on a machine, seconds once it is cached. And see what layers keep of a token,
        in passes too small to be in the way: the first large one would keep all of it, room or not."""
        if self.base.can_compile:
            self.base.compile()
        elif self.base.device.type != "cuda":
            return
        try:
            self._warm_up()
        except Exception:
            # They run as well as they are, only slower.
            if not self.base.has_experts or self._ranks > 1:
                raise
            log.exception("the layers of this mixture cannot be compiled: training is slower")
            self.base.run_eagerly()
            self.drop("")
            self._warm_up()

    def _warm_up(self) -> None:
        lengths_S = np.array([256, 200], np.int64)
        given = _any_input(np.tile(lengths_S, self._ranks), self.facts.vocab_size)
        lean = Keeping(lean_layers=self.base.activations.layers)
        for rank in _USUAL_RANKS:
            self.create("", LoraSpec(rank, 0))
            for keeping in (Keeping(), lean):
                self._keep(keeping)
                self.forward_backward([Work("", given)])
            self.forward_backward([Work("", replace(given, forward_only=True))])
            self.optim_steps([("", AdamParams())])
            self.drop("")
        self._keep(None)

    def _keep(self, keeping: Keeping | None) -> None:
        self.base.keeping = keeping

    @property
    def memory_bytes(self) -> int:
        if self.base.device.type == "cuda":
            return torch.cuda.mem_get_info(self.base.device)[0]
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2

    def size_bytes(self, spec: LoraSpec) -> int:
        """float32 weights, gradient and two moments, and the copy the base multiplies with."""
        copy = 0 if self.base.dtype == torch.float32 else self.base.dtype.itemsize
        return adapter_elements(spec, self.base.sites) * (4 * 4 + copy)

    def close(self) -> None:
        self._copier.close()

    def check(self, given: TrainInput) -> None:
        if given.custom is not None:
            custom_loss.check(given.custom, given.lengths_S, given.target_widths_S)

    def create(self, run_id: str, spec: LoraSpec) -> None:
        self._check_rank(spec)
        self._adapters[run_id] = self.base.new_adapter(spec)

    def drop(self, run_id: str) -> None:
        self._adapters.pop(run_id, None)

    def holds(self, run_id: str) -> bool:
        return run_id in self._adapters

    def forward_backward(self, work: Sequence[Work]) -> list[TrainOutput]:
        return self.begin_forward_backward(work).get()

    def begin_forward_backward(self, work: Sequence[Work]) -> Answer[list[TrainOutput]]:
        """See `contract.Engine`. Nothing in it waits for the device."""
        pieces = self._all_pieces(work)
        blocks: list[Block] = []
        for train in (True, False):
            for group in self._passes(pieces, train=train):
                blocks += self._run(group, train=train)
        results = on_the_way(blocks)

        @functools.cache
        def get() -> list[TrainOutput]:
            return outputs_of(work, computed_of(blocks, results))

        return Answer(get, results.wait)

    def optim_steps(self, steps: Sequence[tuple[str, OptimizerParams]]) -> list[dict[str, float] | Failure]:
        return self.begin_optim_steps(steps).get()

    def begin_optim_steps(
        self, steps: Sequence[tuple[str, OptimizerParams]]
    ) -> Answer[list[dict[str, float] | Failure]]:
        self._last_steps.get()
        self._stepping = {run_id for run_id, _ in steps}
        self._last_steps = optim.begin([(self._adapters[run_id], params) for run_id, params in steps])
        return self._last_steps

    def state(self, run_id: str) -> AdapterState:
        return self.begin_state(run_id).arrival.result()

    def begin_state(self, run_id: str, *, only_weights: bool = False, leaves: bool = False) -> StateOnTheWay:
        if run_id in self._stepping:  # and not counted yet
            self._last_steps.get()
        adapter = self._adapters[run_id]
        flats, make = adapter.flats(), adapter.state_maker()
        if only_weights:
            flats, make = {"weights": adapter.weights}, functools.partial(make, step=0)
        size = sum(flat.nbytes for flat in flats.values())
        return StateOnTheWay(adapter.spec, size, self._copier.begin(flats, make, leave=leaves))

    def frozen(self, run_id: str) -> Adapter:
        """A copy of its weights on the device, for a sampler to hold."""
        adapter = self._adapters[run_id]
        return self.base.blank_adapter(adapter.spec, frozen=adapter.compute.clone())

    def score(self, texts: Sequence[tuple[Adapter, Int32]]) -> list[npt.NDArray[np.float32]]:
        """log p of every token of each text but its first, as a run with this adapter has it that is trained
        on the text: in deterministic mode bit for bit."""
        run_of = {id(adapter): f"{_SCORED}{n}" for n, (adapter, _) in enumerate(texts)}
        self._adapters |= {run_of[id(adapter)]: adapter for adapter, _ in texts}
        try:
            # Each by itself, as a call of its own: the head's product of other rows may round otherwise.
            work = [Work(run_of[id(adapter)], _scored(text)) for adapter, text in texts]
            # By this process alone, if it is one of a group: the others do not have the adapter.
            outputs = TorchEngine.begin_forward_backward(self, work).get()
        finally:
            for run_id in run_of.values():
                del self._adapters[run_id]
        return [output.logprobs_TK[:, 0] for output in outputs]

    def restore(self, run_id: str, state: AdapterState) -> None:
        self._check_rank(state.spec)
        self._adapters[run_id] = self.base.adapter_of(state, optimizer=True)

    def load(self, run_id: str, state: AdapterState, *, optimizer: bool) -> None:
        self._last_steps.get()
        adapter = self._adapters[run_id]
        self._check_alike(adapter.spec, state.spec)
        adapter.take(state, optimizer=optimizer)
        adapter.clear_gradient()

    def _check_alike(self, of_run: LoraSpec, of_checkpoint: LoraSpec) -> None:
        ours, theirs = _described(of_run), _described(of_checkpoint)
        if ours != theirs:
            raise InvalidInput(f"the checkpoint is of an adapter of {theirs}, this run's is of {ours}")

    def _check_rank(self, spec: LoraSpec) -> None:
        if not 1 <= spec.rank <= self.facts.max_rank:
            raise InvalidInput(f"rank must be from 1 to {self.facts.max_rank}, got {spec.rank}")

    def _all_pieces(self, work: Sequence[Work]) -> list[Piece]:
        return [piece for number, one in enumerate(work) for piece in self._pieces(number, one)]

    def _pieces(self, operation: int, work: Work) -> list[Piece]:
        """As many datums each as fit into a part of a pass, a longer one alone. Depends on this operation
        only. A part and not the whole, so that passes are filled whatever the lengths."""
        adapter, offsets_S = self._adapters[work.run_id], work.given.offsets_S
        pieces, first, datums = [], 0, len(work.given.lengths_S)
        while first < datums:
            limit = offsets_S[first] + self._piece_tokens(work.given.tokens)
            last = max(first + 1, int(np.searchsorted(offsets_S, limit, side="right")) - 1)
            rows = slice(int(offsets_S[first]), int(offsets_S[last]))
            lengths_S = work.given.lengths_S[first:last]
            pieces.append(Piece(operation, adapter, work.given, rows, lengths_S, slice(first, last)))
            first = last
        return pieces

    def _piece_tokens(self, tokens: int) -> int:
        """How large the pieces of an operation of so many tokens are."""
        return self._settings.max_tokens_per_pass // _PIECES_PER_PASS

    def _passes(self, pieces: list[Piece], *, train: bool) -> list[list[Piece]]:
        """Those pieces that train, or do not, as they go through the model together."""
        passes: list[list[Piece]] = []
        room = 0
        for piece in by_adapter([p for p in pieces if p.given.forward_only is not train]):
            if piece.tokens > room:
                passes.append([])
                room = self._settings.max_tokens_per_pass
            passes[-1].append(piece)
            room -= piece.tokens
        return passes

    def _run(self, pieces: list[Piece], *, train: bool) -> list[Block]:
        if train:
            for piece in pieces:
                piece.adapter.open_gradient()
        try:
            return self._computed(pieces, train=train)
        except torch.OutOfMemoryError as error:
            self.base.leave_more_room()
            raise MemoryError(f"no room on the device for a pass: {error}") from error

    def _computed(self, pieces: list[Piece], *, train: bool) -> list[Block]:
        stream = self._pack(pieces)
        blocks = self._blocks(pieces, stream)
        compiled = self.base.runs_compiled and self.base.weights_stay
        as_training = train or (self._settings.deterministic and compiled)
        with torch.set_grad_enabled(as_training):
            hidden_TD = self.base.forward(stream, only_forward=not train)
        states_TD = hidden_TD.detach()
        if not train:
            for block in blocks:
                self._score(block, states_TD[block.rows])
            return blocks
        gradient_TD = torch.empty_like(states_TD)
        gradient_TD[blocks[-1].rows.stop :] = 0  # rows of padding
        for block in blocks:
            self._score_and_differentiate(block, states_TD[block.rows], gradient_TD[block.rows])
        self.base.backward(hidden_TD, gradient_TD)
        for piece in pieces:
            piece.adapter.has_gradient = True
        return blocks

    def _blocks(self, pieces: list[Piece], stream: Stream) -> list[Block]:
        """Neighbours of one loss and width as one. In deterministic mode every piece by itself: with others
        its rows could fall into other chunks."""
        runs: list[list[tuple[Piece, Segment]]] = []
        before = None
        for piece, segment in zip(pieces, stream.segments, strict=True):
            kind = piece.given.loss, piece.given.targets_TK.shape[1]
            if kind != before or self._settings.deterministic:
                runs.append([])
            runs[-1].append((piece, segment))
            before = kind
        blocks = []
        for run in runs:
            first, rows = run[0][0].given, slice(run[0][1].start, run[-1][1].stop)
            counted = [Segment(s.start - rows.start, s.stop - rows.start, s.adapter) for _, s in run]
            shape = rows.stop - rows.start, first.targets_TK.shape[1] + 1
            results = torch.empty(shape, dtype=torch.float32, device=self.base.device)
            ours = [piece for piece, _ in run]
            lengths_S = np.concatenate([piece.lengths_S for piece in ours])
            blocks.append(Block(ours, counted, rows, first.loss, lengths_S, results))
        return blocks

    def _pack(self, pieces: list[Piece]) -> Stream:
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
            attention=CausalSequences(lengths_S, is_deterministic=self.base.is_deterministic),
        )

    def _bucket(self, tokens: int) -> int:
        """Rows of the stream for so many tokens. On a GPU a product's kernel, and with it the bits, may
        follow from the number of rows: there the deterministic engine knows one size only.
        """
        if self._settings.deterministic and self.base.device.type == "cuda":
            tokens = max(tokens, self._settings.max_tokens_per_pass)
        return -(-tokens // LEAST_ROWS) * LEAST_ROWS

    def _score(self, block: Block, hidden_ND: torch.Tensor) -> None:
        targets_NK, columns = self._inputs(block)
        logprobs_NK = self.base.head.logprobs(hidden_ND, block.segments, targets_NK)
        if block.loss == CUSTOM:
            self._custom(block, logprobs_NK)
            return
        if losses.needs_whole_sequences(block.loss):
            columns[losses.SEQUENCE_LOG_RATIO] = losses.sequence_log_ratio(
                logprobs_NK[:, 0], columns, block.lengths_S
            )
        block.results[:, :-1] = logprobs_NK
        block.results[:, -1] = losses.evaluate(block.loss, logprobs_NK, columns)[0]

    def _score_and_differentiate(
        self, block: Block, hidden_ND: torch.Tensor, gradient_ND: torch.Tensor
    ) -> None:
        head, loss = self.base.head, block.loss
        targets_NK, columns = self._inputs(block)
        if loss == CUSTOM:
            slopes_NK = self._custom(block, head.logprobs(hidden_ND, block.segments, targets_NK))
            head.backward(hidden_ND, block.segments, targets_NK, lambda rows, _: slopes_NK[rows], gradient_ND)
            return
        if losses.needs_whole_sequences(loss):
            logprobs_N = head.logprobs(hidden_ND, block.segments, targets_NK)[:, 0]
            columns[losses.SEQUENCE_LOG_RATIO] = losses.sequence_log_ratio(
                logprobs_N, columns, block.lengths_S
            )

        def slope_of(rows: slice, logprobs_NK: torch.Tensor) -> torch.Tensor:
            of_rows = {name: column[rows] for name, column in columns.items()}
            losses_N, slope_NK = losses.evaluate(loss, logprobs_NK, of_rows)
            block.results[rows, :-1] = logprobs_NK
            block.results[rows, -1] = losses_N
            return slope_NK

        head.backward(hidden_ND, block.segments, targets_NK, slope_of, gradient_ND)

    def _custom(self, block: Block, logprobs_NK: torch.Tensor) -> torch.Tensor:
        """dL/dlogprob [N, K] of losses that their clients described; waits for the device."""
        logprobs = logprobs_NK.cpu().numpy()
        losses_N, slopes_NK = np.zeros(len(logprobs), np.float32), np.zeros_like(logprobs)
        row = 0
        for piece in block.pieces:
            custom, sums = piece.given.custom, block.metric_sums.setdefault(piece.operation, {})
            assert custom is not None
            for datum in range(piece.datums.start, piece.datums.stop):
                rows = slice(row, row + int(piece.given.lengths_S[datum]))
                width = int(piece.given.target_widths_S[datum])
                own = logprobs[rows, :width] if width else logprobs[rows, 0]
                losses_N[row], slope, metrics = custom_loss.evaluate(custom, datum, own)
                slopes_NK[rows, : max(width, 1)] = slope.reshape(len(slope), -1)
                add_up(sums, metrics)
                row = rows.stop
        block.results[:, :-1] = logprobs_NK
        block.results[:, -1] = to_device(losses_N, self.base.device)
        return to_device(slopes_NK, self.base.device)

    def _inputs(self, block: Block) -> tuple[torch.Tensor, losses.Columns]:
        """Targets [N, K] and the loss's columns, on the device in one copy each."""
        given, device = [(piece.given, piece.rows) for piece in block.pieces], self.base.device
        targets = np.concatenate([g.targets_TK[rows] for g, rows in given]).astype(np.int64)
        targets_NK = to_device(targets, device)
        names = list(given[0][0].columns)
        if block.loss == CUSTOM:
            return targets_NK, {}
        if block.loss == "cross_entropy":
            weights = np.concatenate([g.columns["weights"][rows] for g, rows in given])
            return targets_NK, {"weights": to_device(weights.astype(np.float32), device)}
        columns = [np.stack([g.columns[name][rows] for name in names]) for g, rows in given]
        columns_CN = to_device(np.concatenate(columns, 1), device)
        return targets_NK, dict(zip(names, columns_CN, strict=True))


def _any_input(lengths_S: Int64, vocabulary: int) -> TrainInput:
    tokens = int(lengths_S.sum())
    return TrainInput(
        loss="cross_entropy",
        forward_only=False,
        lengths_S=lengths_S,
        tokens_T=(np.arange(tokens) % vocabulary).astype(np.int32),
        targets_TK=np.zeros((tokens, 1), np.int64),
        target_widths_S=np.zeros(len(lengths_S), np.int64),
        columns={"weights": np.ones((tokens, 1), np.float32)},
    )


def _scored(text: Int32) -> TrainInput:
    return TrainInput(
        loss="cross_entropy",
        forward_only=True,
        lengths_S=np.array([len(text) - 1], np.int64),
        tokens_T=text[:-1],
        targets_TK=text[1:, None].astype(np.int64),
        target_widths_S=np.zeros(1, np.int64),
        columns={"weights": np.ones((len(text) - 1, 1), np.float32)},
    )


def _described(spec: LoraSpec) -> str:
    if spec.method != "lora":
        return " ".join([spec.method, *(f"{name} {value}" for name, value in sorted(spec.settings.items()))])
    names = [name for name in ("train_attn", "train_mlp", "train_unembed") if getattr(spec, name)]
    return f"rank {spec.rank} with {', '.join(names)}"


def _make_deterministic(base: Base) -> None:
    """A run's numbers from its own rows only. Changes torch's settings for the whole process."""
    base.is_deterministic = True
    if base.device.type == "cuda":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    else:
        # Threads share the elements of a map evenly, and the last few of a share take a path that rounds
        # otherwise. Halves of a stream end between two rows; thirds, which four threads may make, do not. And
        # one thread alone adds up some sums in another order than two: always two, whatever the machine has.
        torch.set_num_threads(2)
