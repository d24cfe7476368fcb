"""A step that gives each of N sequences its next logits, recorded as a CUDA graph and replayed: one launch
instead of some five hundred. What differs from step to step lies in buffers that stay where they are.

Shapes: N rows, W pages of a sequence, V vocabulary.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tinsmith_worker.adapters import Adapter, Kind
from tinsmith_worker.copies import to_device
from tinsmith_worker.lora import Deltas
from tinsmith_worker.model import Base
from tinsmith_worker.sampler.cache import Cache
from tinsmith_worker.sampler.gathered import Gathered, Table
from tinsmith_worker.sampler.paged import Paged
from tinsmith_worker.stream import Stream

log = logging.getLogger("tinsmith.sampler")

# Adapters that can be on the device for sampling at once.
MOST_ADAPTERS = 512


class Steps:
    """`last_tokens`: of each seat; the last one is nobody's. `pages` of the cache, `most_rows` of a step."""

    def __init__(
        self, base: Base, cache: Cache, last_tokens: torch.Tensor, pages: int, most_rows: int
    ) -> None:
        from tinsmith_worker.sampler import kernels

        self._base = base
        self._cache = cache
        self._kernels = kernels
        self._last_tokens = last_tokens
        self._nobody = len(last_tokens) - 1
        most_rows = bucket(most_rows)
        width = min(pages, -(-base.facts.max_context_length // cache.page_tokens))
        self._seats_N = torch.full((most_rows,), self._nobody, dtype=torch.int64, device=base.device)
        self._tokens_N = torch.full_like(self._seats_N, -1)
        self._positions_N = torch.zeros(most_rows, dtype=torch.int64, device=base.device)
        self._tables_NW = torch.zeros(most_rows, width, dtype=torch.int32, device=base.device)
        groups: dict[int, list[int]] = {}
        inputs = {}
        for site in base.sites:
            groups.setdefault(site.group, []).append(site.outputs)
            inputs[site.group] = site.inputs
        self.table = Table(
            [inputs[group] for group in sorted(inputs)], MOST_ADAPTERS, base.facts.max_rank, most_rows,
            base.device, base.dtype,
        )  # fmt: skip
        self._deltas = {step: Gathered(self.table, step, kernels) for step in (0, 1, 8)}
        for group, widths in groups.items():
            for gathered in self._deltas.values():
                gathered.prepare(group, widths)
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph | None, torch.Tensor]] = {}
        self._pool: Any = None

    def run(
        self,
        positions: np.ndarray,
        tables: np.ndarray,
        adapters: Sequence[Adapter | None],
        *,
        seats: np.ndarray | None = None,
        tokens: np.ndarray | None = None,
    ) -> torch.Tensor:
        """[N, V] logits, which the next step overwrites. Each row's token is the last one of its seat, or
        given."""
        rows, count = bucket(len(positions)), len(positions)
        step = self.table.seat(adapters)
        device = self._base.device
        padded = np.zeros((3, rows), np.int64)
        padded[0], padded[1] = self._nobody, -1
        if seats is not None:
            padded[0, :count] = seats
        if tokens is not None:
            padded[1, :count] = tokens
        padded[2, :count] = positions
        on_device = to_device(padded, device)
        self._seats_N[:rows].copy_(on_device[0])
        self._tokens_N[:rows].copy_(on_device[1])
        self._positions_N[:rows].copy_(on_device[2])
        # A row of padding writes to nobody's page.
        whole = np.zeros((rows, tables.shape[1]), np.int32)
        whole[:count] = tables
        self._tables_NW[:rows, : tables.shape[1]].copy_(to_device(whole, device))
        if self._base.device.type != "cuda":
            return self._step(rows, step)[:count]
        if (rows, step) not in self._graphs:
            self._graphs[rows, step] = self._record(rows, step)
        graph, logits_NV = self._graphs[rows, step]
        if graph is None:
            return self._step(rows, step)[:count]
        graph.replay()
        return logits_NV[:count]

    def warm_up(self) -> None:
        """Record a step of every size, without adapters and with some of usual ranks."""
        sizes = sorted({bucket(n) for n in range(1, len(self._seats_N) + 1)}, reverse=True)
        with torch.no_grad():
            self.table.count.zero_()
            self._seats_N.fill_(self._nobody)
            self._tokens_N.fill_(-1)
            self._positions_N.zero_()
            self._tables_NW.zero_()
            for step in (0, 8):
                for rows in sizes:
                    self._graphs[rows, step] = self._record(rows, step)

    def _record(self, rows: int, step: int) -> tuple[torch.cuda.CUDAGraph | None, torch.Tensor]:
        logits_NV = self._step(rows, step)  # whatever is compiled at first use is compiled now
        torch.cuda.synchronize(self._base.device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits_NV = self._step(rows, step)
        except RuntimeError:
            # Some architecture waits for the device in the middle of its forward: it is sampled slowly.
            log.exception("a step of %d rows cannot be recorded; it is launched piece by piece", rows)
            return None, logits_NV
        self._pool = self._pool or graph.pool()
        return graph, logits_NV

    def _step(self, rows: int, step: int) -> torch.Tensor:
        base, gathered = self._base, self._deltas[step]
        given_N = self._tokens_N[:rows]
        tokens_N = torch.where(given_N < 0, self._last_tokens[self._seats_N[:rows]], given_N)
        positions_N, tables_NW = self._positions_N[:rows], self._tables_NW[:rows]
        attention = Paged(self._cache, tables_NW, positions_N, self._kernels)
        deltas: dict[Kind, Deltas] = {"attn": gathered, "mlp": gathered}
        hidden_ND = base.forward(Stream(tokens_N, positions_N, (), attention), deltas)
        return gathered.add(base.head.group, hidden_ND, lambda: base.head.logits(hidden_ND, None))


def bucket(rows: int) -> int:
    """Rows of the recorded step that takes so many. Never one: it would be compiled apart from all others."""
    for size in (2, 4, 8):
        if rows <= size:
            return size
    step = 8 if rows <= 32 else 16 if rows <= 64 else 32 if rows <= 256 else 64
    return -(-rows // step) * step
