"""The part `full` of scale.py: all weights of a base trained by several cards, each with its rows of everything.

In float32 gradients and a step against one card's; in bfloat16 how fast it steps, what a card holds, what a
snapshot takes, and how fast it samples.
"""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import train

from tinsmith_worker.contract import AdamParams, SampleInput, Work
from tinsmith_worker.in_pieces import Held, write
from tinsmith_worker.parallel.shard import shard
from tinsmith_worker.tuning.base import TunedBase
from tinsmith_worker.tuning.engine import FULL, TunedEngine
from tinsmith_worker.tuning.group import ShardedTunedEngine, ShardedTunedSampler
from tinsmith_worker.tuning.shards import ShardedTunedBase

ADAM = AdamParams(1e-5, eps=1e-6, grad_clip_norm=1.0)


def full(run: Any) -> None:
    compare(run)
    measure(run)


def compare(run: Any) -> None:
    shape, dtype, train.DTYPE = run.shape("0.6B"), train.DTYPE, torch.float32
    expected: list[Any] = []
    if run.group.leads:
        expected += told(TunedEngine(TunedBase(train.model_of(shape)), run.settings), run)
    engine = cut(run, shape)

    def leads() -> None:
        for name, found, by_one in zip(("gradient", "step"), told(engine, run), expected, strict=True):
            pairs = list(zip(found, by_one, strict=True))
            squares = [(np.linalg.norm(a - b) ** 2, np.linalg.norm(b) ** 2) for a, b in pairs]
            off, size = np.sqrt(np.sum(squares, 0))
            run.row(shape=shape, dtype="float32", **{f"{name}_against_one_card": float(off / size)})
        engine.rows.close()

    run.follow(engine, leads)
    train.DTYPE = dtype


def cut(run: Any, shape: str) -> ShardedTunedEngine:
    base = ShardedTunedBase(shard(train.model_of(shape), run.group), run.group)
    return ShardedTunedEngine(base, run.group, run.settings)


def told(engine: TunedEngine, run: Any) -> Iterator[list[np.ndarray]]:
    """The gradient of a batch, and how far a step went; tensor by tensor."""
    engine.create("compared", FULL)
    before = tensors(engine, "weights")
    engine.forward_backward([Work("compared", run.batch(1, seed=2))])
    yield tensors(engine, "gradient")
    engine.optim_steps([("compared", ADAM)])
    after = tensors(engine, "weights")
    yield [b - a for a, b in zip(before, after, strict=True)]
    engine.drop("compared")


def tensors(engine: TunedEngine, flat: str) -> list[np.ndarray]:
    state = engine.state("compared")
    if isinstance(state, Held):
        return [state.tensor(flat, number) for number in range(len(state.tensors))]
    values = getattr(state, flat)
    return [values[at : at + int(np.prod(shape))].reshape(shape) for _, at, shape in state.tensors]


def measure(run: Any) -> None:
    engine = cut(run, run.shape("8B"))

    def leads() -> None:
        time_all(engine, run)
        engine.rows.close()

    run.follow(engine, leads)


def time_all(engine: ShardedTunedEngine, run: Any) -> None:
    cards, on_gpu = run.group.ranks, train.ON_GPU
    engine.create("timed", FULL)
    work = [Work("timed", run.batch(cards))]

    def step() -> None:
        engine.forward_backward(work)
        (answer,) = engine.optim_steps([("timed", ADAM)])
        assert isinstance(answer, dict), answer

    step()
    about = {"cards": cards, "shape": run.shape("8B")}
    run.row(**about, **train.timed(step, work[0].given.tokens, seconds=run.seconds))
    if engine.base.can_compile:
        engine.warm_up()
        run.row(**about, compiled=True, **train.timed(step, work[0].given.tokens, seconds=run.seconds))
    if on_gpu:
        run.row(**about, peak_gib=torch.cuda.max_memory_allocated() / 2**30)
    began = time.perf_counter()
    state = engine.state("timed")
    copied = time.perf_counter()
    assert isinstance(state, Held)
    size = sum(len(piece) for pieces in write(state).values() for piece in pieces())
    run.row(**about, snapshot_bytes=size, copied_s=copied - began, brought_s=time.perf_counter() - copied)
    sampler = ShardedTunedSampler(engine.base)
    sampler.hold("then", engine.frozen("timed"))
    sampler.add(SampleInput("drawn", "then", np.arange(8, dtype=np.int32), 16, 8, seed=1, stop_tokens=()))
    began, tokens = time.perf_counter(), 0
    while sampler.busy:
        for done in sampler.step():
            assert not isinstance(done, tuple), done
            tokens += sum(len(sequence.tokens) for sequence in done.sequences)
    run.row(**about, sampled_tokens=tokens, sampled_per_s=tokens / (time.perf_counter() - began))
