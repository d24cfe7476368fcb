"""What the sampler has the device do: read parts of prompts, give every row its next logits, draw tokens.

Shapes: T packed tokens, N rows, one of each sequence that gets a token, W pages of a sequence, D hidden, V
vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import TopK
from tinsmith_worker.copies import to_device
from tinsmith_worker.model import Base
from tinsmith_worker.sampler.cache import Cache, Decode, Piece, Prefill, Shapes
from tinsmith_worker.sampler.drawing import draw_by_kernels, draw_in_torch
from tinsmith_worker.sampler.gathered import Looped
from tinsmith_worker.sampler.order import segments
from tinsmith_worker.sampler.places import Part
from tinsmith_worker.sampler.recorded import Steps
from tinsmith_worker.sampler.requests import Continuation, fill_topk
from tinsmith_worker.sampler.side import SideBySide
from tinsmith_worker.stream import Attention, Segment, Stream

# Logits of a prompt that are held at once while it is scored: 2^26 float32 are 256 MB.
_SCORED_LOGITS = 1 << 26
# Rows of a pass on a GPU come in multiples of this: one of a single row would be compiled by itself.
_ROW_STEP = 8
# What a recorded step reads of prompts: so many tokens, which see so many in all.
_LITTLE_ROWS, _LITTLE_CELLS = 256, 1 << 17


@dataclass(frozen=True)
class Drawn:
    """The next token of each row and its logprob, on their way from the device: `wait` for them."""

    wait: Callable[[], tuple[list[int], list[float], TopK | None]]


class Runner:
    """`seats`: how many sequences can be under way; the device keeps the last token of each."""

    def __init__(self, base: Base, seats: int, page_tokens: int) -> None:
        self.base = base
        self.cache = Cache(_shapes(base), page_tokens)
        self._seats = seats
        self._last_tokens = torch.zeros(seats + 1, dtype=torch.int64, device=base.device)
        self._steps: Steps | None = None
        self._side: SideBySide | None = None
        base.join_groups()

    @property
    def is_ahead(self) -> bool:
        """Whether tokens come back later than they are asked for."""
        return self.base.device.type == "cuda"

    def open(self, pages: int) -> None:
        """Make the cache. RuntimeError where there is no memory for so much."""
        self.cache.open(pages + 1, device=self.base.device, dtype=self.base.dtype)
        # A recorded step has no segments, and a mixture's experts ask whose rows they are given.
        may_record = not self.base.has_experts and self.base.weights_stay
        if self.base.kernels and self.cache.is_uniform and may_record:
            self._steps = Steps(self.base, self.cache, self._last_tokens, pages, self._seats)
        if self.base.device.type == "cpu":
            self._side = SideBySide(self.cache, pages * self.cache.page_bytes(self.base.dtype) // 4)

    def clean(self, pages: Sequence[int]) -> None:
        """These held what may not be finite."""
        self.cache.clean(pages)
        if self._side:
            self._side.clear()

    def enter(self, adapter: Adapter) -> None:
        """It may be sampled from now on."""
        if self._steps:
            self._steps.table.enter(adapter)

    def leave(self, adapter: Adapter) -> None:
        if self._steps:
            self._steps.table.leave(adapter)

    def warm_up(self) -> None:
        """Have the usual steps compiled and recorded before somebody waits for them."""
        if self._steps:
            self._steps.warm_up()

    def read(self, parts: Sequence[Part]) -> torch.Tensor:
        """Read, score what is asked; [N, V] logits after each text that is now complete."""
        if self._steps and self._is_little(parts):
            return self._read_by_rows(self._steps, parts)
        device = self.base.device
        tokens = np.concatenate([p.reading.tokens[p.start : p.stop] for p in parts])
        positions = np.concatenate([np.arange(p.start, p.stop) for p in parts])
        rows = len(tokens) if device.type == "cpu" else -(-len(tokens) // _ROW_STEP) * _ROW_STEP
        pieces = [Piece(p.reading.pages, p.start, p.stop) for p in parts]
        stream = Stream(
            tokens_T=to_device(np.resize(tokens, rows).astype(np.int64), device),
            positions_T=to_device(np.resize(positions, rows), device),
            segments=segments([(p.reading.request.adapter, p.rows) for p in parts]),
            attention=Prefill(self.cache, pieces, rows),
        )
        hidden_TD = self.base.forward(stream)
        row, ends = 0, []
        for part in parts:
            self._score(part, hidden_TD[row : row + part.rows])
            row += part.rows
            if part.completes:
                ends.append((part.reading.request.adapter, row - 1))
        rows_N = to_device(np.array([end for _, end in ends], np.int64), device)
        return self._logits(hidden_TD[rows_N], segments([(adapter, 1) for adapter, _ in ends]))

    def _is_little(self, parts: Sequence[Part]) -> bool:
        """Whether a recorded step takes them sooner than a pass, which has a thousand launches. It attends
        row by row: a long past would be read again for each."""
        rows, longest = sum(part.rows for part in parts), max(part.stop for part in parts)
        is_scored = any(part.reading.scores for part in parts)
        return rows <= min(self._seats, _LITTLE_ROWS) and rows * longest <= _LITTLE_CELLS and not is_scored

    def _read_by_rows(self, steps: Steps, parts: Sequence[Part]) -> torch.Tensor:
        counts = [part.rows for part in parts]
        tables = np.zeros((len(parts), max(len(p.reading.pages) for p in parts)), np.int32)
        for table, part in zip(tables, parts, strict=True):
            table[: len(part.reading.pages)] = part.reading.pages
        logits_NV = steps.run(
            np.concatenate([np.arange(p.start, p.stop) for p in parts]),
            np.repeat(tables, counts, 0),
            [adapter for p in parts for adapter in [p.reading.request.adapter] * p.rows],
            tokens=np.concatenate([p.reading.tokens[p.start : p.stop] for p in parts]),
        )
        ends = np.cumsum(counts) - 1
        complete = np.array([end for end, part in zip(ends, parts, strict=True) if part.completes], np.int64)
        return logits_NV[to_device(complete, self.base.device)]

    def share(self, pairs: Sequence[tuple[Continuation, Continuation]], tokens: int, full: int) -> None:
        """Copy what the first of each pair has of its text of `tokens` tokens beyond `full` pages to the
        second."""
        start = full * self.cache.page_tokens
        cells = [[self.cache.cells(c.pages, start, tokens) for c in pair] for pair in pairs]
        if cells and start < tokens:
            sources, targets = (np.concatenate(side) for side in zip(*cells, strict=True))
            self.cache.copy(sources, targets)

    def next_logits(self, rows: Sequence[Continuation]) -> torch.Tensor:
        """What the base says after the last token of each row: [N, V]."""
        positions = np.array([c.length - 1 for c in rows])
        if self._steps:
            adapters = [c.request.adapter for c in rows]
            return self._steps.run(positions, _tables(rows), adapters, seats=_seats(rows))
        device = self.base.device
        positions_N = to_device(positions, device)
        of_adapters = segments([(c.request.adapter, 1) for c in rows])
        attention: Attention | None = None
        if self._side:
            attention = self._side.step(rows, [c.pages for c in rows], positions)
        if attention is None:
            tables_NW = to_device(_tables(rows).astype(np.int64), device)
            attention = Decode(self.cache, tables_NW, positions_N, longest=int(positions.max()) + 1)
        tokens_N = self._last_tokens[to_device(_seats(rows), device)]
        stream = Stream(tokens_N, positions_N, of_adapters, attention)
        # Without a recorded step there are some thousand operators, each of which asks less in this mode; but
        # what a single-tenant base makes in it could not be trained.
        with torch.inference_mode(device.type == "cpu" and not self.base.facts.single_tenant):
            hidden_ND = self.base.forward(stream, Looped.of(of_adapters))
            return self._logits(hidden_ND, of_adapters)

    def pick(self, logits_NV: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        return logits_NV[to_device(np.array(rows, np.int64), logits_NV.device)]

    def draw(self, rows: Sequence[Continuation], logits_NV: torch.Tensor) -> Drawn:
        """The next token of every row and its logprob, and the likeliest ones as far as somebody asks for
        them."""
        device, given = logits_NV.device, [c.request.given for c in rows]
        settings = [(g.temperature, g.top_k, g.top_p) for g in given]
        uniforms = np.array([c.uniform for c in rows])
        width = max(g.topk_sample_logprobs for g in given)
        take = draw_by_kernels if self._steps else draw_in_torch
        tokens_N, chosen_N, table = take(logits_NV, settings, uniforms, width)
        self._last_tokens[to_device(_seats(rows), device)] = tokens_N
        arrived = _send([tokens_N, chosen_N, *table])

        def wait() -> tuple[list[int], list[float], TopK | None]:
            tokens, chosen, *likeliest = arrived()
            return tokens.tolist(), chosen.tolist(), fill_topk(width, *likeliest) if width else None

        return Drawn(wait)

    def _score(self, part: Part, hidden_TD: torch.Tensor) -> None:
        if (scores := part.reading.scores) is None:
            return
        wanted = scores.rows(part.start, part.stop)
        rows_at_once = max(1, _SCORED_LOGITS // self.base.facts.vocab_size)
        for start in range(wanted.start, wanted.stop, rows_at_once):
            stop = min(start + rows_at_once, wanted.stop)
            chunk_ND = hidden_TD[start - part.start : stop - part.start]
            scores.take(start, self.base.head.logits(chunk_ND, part.reading.request.adapter))

    def _logits(self, hidden_ND: torch.Tensor, of_adapters: Sequence[Segment]) -> torch.Tensor:
        if not of_adapters:
            return hidden_ND.new_empty((0, self.base.facts.vocab_size), dtype=torch.float32)
        return torch.cat([self.base.head.logits(hidden_ND[s.start : s.stop], s.adapter) for s in of_adapters])


def _tables(rows: Sequence[Continuation]) -> np.ndarray:
    """[N, W] the pages of each."""
    tables = np.zeros((len(rows), max(len(c.pages) for c in rows)), np.int32)
    for table, continuation in zip(tables, rows, strict=True):
        table[: len(continuation.pages)] = continuation.pages
    return tables


def _seats(rows: Sequence[Continuation]) -> np.ndarray:
    return np.array([c.seat for c in rows], np.int64)


def _send(tensors: Sequence[torch.Tensor]) -> Callable[[], list[np.ndarray]]:
    """Copies on their way to the host, and how to wait for them."""
    if not tensors[0].is_cuda:
        return lambda: [tensor.numpy() for tensor in tensors]
    copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()

    def wait() -> list[np.ndarray]:
        event.synchronize()
        return [copy.numpy() for copy in copies]

    return wait


def _shapes(base: Base) -> list[tuple[torch.Size, torch.Size]]:
    """One token through the base tells what its keys and values are, whatever the architecture."""
    probe = Shapes()
    zero_T = torch.zeros(1, dtype=torch.int64, device=base.device)
    with torch.no_grad():
        base.forward(Stream(zero_T, zero_T, (Segment(0, 1, None),), probe))
    return probe.found
