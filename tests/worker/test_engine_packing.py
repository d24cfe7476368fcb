"""Many tenants in one pass: each gets the numbers it would get alone."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.worker import tiny
from tinsmith_worker import packed
from tinsmith_worker.contract import AdamParams, LoraSpec, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.stream import Segment

# Different ranks, targets, losses, settings, shapes; the third's datums do not fit into one pass.
TENANTS = {
    "ada": (LoraSpec(8, 1), tiny.batch("cross_entropy", (33, 90, 5), seed=1)),
    "bob": (LoraSpec(3, 2, train_mlp=False), tiny.batch("ppo", (64,), seed=2, clip_low_threshold=0.9)),
    "cyd": (LoraSpec(16, 3, train_attn=False), tiny.batch("gspo", (70, 41, 88, 2, 60), seed=3)),
    "dee": (LoraSpec(8, 4, train_unembed=False), tiny.batch("cross_entropy", (12, 50), seed=4, width=3)),
    "eve": (LoraSpec(8, 5, train_attn=False, train_mlp=False), tiny.batch("dro", (40,), seed=5, beta=0.3)),
    "fay": (LoraSpec(8, 6), tiny.batch("cispo", (1,), seed=6)),
}
Results = dict[str, tuple[Any, ...]]
MODEL: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192}


def make(**settings: bool) -> TorchEngine:
    engine = TorchEngine(tiny.base(**MODEL), EngineSettings(max_tokens_per_pass=256, **settings))
    for run, (spec, _) in TENANTS.items():
        engine.restore(run, tiny.trained(engine.base, spec, seed=spec.seed))
    return engine


def train(engine: TorchEngine, runs: list[str]) -> Results:
    """Two operations of each run: what they answer, and the gradients after."""
    work = [Work(run, TENANTS[run][1]) for run in runs]
    outputs = engine.forward_backward(work + work)
    return {
        run: (
            outputs[i].logprobs_TK,
            outputs[i].losses_T,
            outputs[i + len(runs)].losses_T,
            engine.state(run).gradient,
        )
        for i, run in enumerate(runs)
    }


@pytest.fixture(scope="module")
def alone() -> Results:
    return {run: train(make(), [run])[run] for run in TENANTS}


def test_tenants_packed_together_equal_each_alone(alone: Results) -> None:
    for run, found in train(make(), list(TENANTS)).items():
        for a, b in zip(found, alone[run], strict=True):
            assert tiny.worst(a, b) <= 1e-5, run


@pytest.mark.parametrize("seed", range(4))
def test_in_deterministic_mode_tenants_packed_in_any_order_equal_each_alone_bit_for_bit(seed: int) -> None:
    runs = np.random.default_rng(seed).permutation(list(TENANTS))[: 6 - seed].tolist()
    alone = {run: train(make(deterministic=True), [run])[run] for run in runs}
    for run, found in train(make(deterministic=True), runs).items():
        for a, b in zip(found, alone[run], strict=True):
            assert np.array_equal(a, b), run


def test_in_deterministic_mode_one_token_alone_equals_one_token_among_many_bit_for_bit() -> None:
    found = train(make(deterministic=True), ["fay", "ada", "cyd"])["fay"]
    for a, b in zip(found, train(make(deterministic=True), ["fay"])["fay"], strict=True):
        assert np.array_equal(a, b)


def test_in_deterministic_mode_neighbours_of_a_wide_base_change_no_bit() -> None:
    """A CPU's library may add up 896 products of 64 rows otherwise than of 128."""
    base = tiny.base(hidden_size=320, intermediate_size=896)
    engine = TorchEngine(base, EngineSettings(deterministic=True))
    work = []
    for seed, lengths in ((1, (8, 24, 13)), (2, (30, 9)), (3, (120, 60))):
        engine.restore(f"run-{seed}", tiny.trained(base, LoraSpec(4, seed), seed))
        work.append(Work(f"run-{seed}", tiny.batch(lengths=lengths, seed=seed)))
    alone = [engine.forward_backward([one])[0].logprobs_TK for one in work]
    single = [engine.state(one.run_id).gradient for one in work]
    for one in work:
        engine.optim_steps([(one.run_id, AdamParams(learning_rate=0.0))])
    together = engine.forward_backward(work)
    for one, before, gradient, after in zip(work, alone, single, together, strict=True):
        assert np.array_equal(before, after.logprobs_TK)
        assert np.array_equal(gradient, engine.state(one.run_id).gradient)


def test_in_deterministic_mode_operations_given_together_or_one_by_one_leave_the_same_bits() -> None:
    """A worker that replays a run's operations after a crash may group them otherwise than the first time."""
    given = [TENANTS["ada"][1], TENANTS["cyd"][1], TENANTS["bob"][1]]
    together, one_by_one = make(deterministic=True), make(deterministic=True)
    together.forward_backward([Work("dee", TENANTS["dee"][1])] + [Work("ada", one) for one in given])
    for one in given:
        one_by_one.forward_backward([Work("ada", one)])
    assert np.array_equal(together.state("ada").gradient, one_by_one.state("ada").gradient)


def test_in_deterministic_mode_more_or_fewer_threads_change_no_bit() -> None:
    """Three shares of 256 x 352 elements end in the middle of a vector, where torch's silu rounds otherwise."""
    before = torch.get_num_threads()
    given = tiny.batch("ppo", (82, 27, 96), seed=2)
    other = tiny.batch("ppo", (250, 243), seed=3)
    found = []
    try:
        for threads, neighbours in ((4, []), (4, [Work("other", other)]), (1, []), (2, [])):
            torch.set_num_threads(threads)
            base = tiny.base(hidden_size=128, intermediate_size=352)
            engine = TorchEngine(base, EngineSettings(deterministic=True))
            engine.restore("other", tiny.trained(base, LoraSpec(8, 1)))
            engine.restore("run", tiny.trained(base, LoraSpec(32, 2)))
            engine.forward_backward([*neighbours, Work("run", given)])
            assert torch.get_num_threads() == 2
            found.append(engine.state("run").gradient)
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(found[0], again) for again in found[1:])


def test_settings_of_a_loss_are_each_operations_own() -> None:
    engine = make()
    loose = tiny.batch("ppo", (64,), seed=2, clip_low_threshold=0.0, clip_high_threshold=100.0)
    strict = tiny.batch("ppo", (64,), seed=2, clip_low_threshold=1.0, clip_high_threshold=1.0)
    packed = engine.forward_backward([Work("bob", loose), Work("bob", strict)])
    for given, found in zip((loose, strict), packed, strict=True):
        assert np.array_equal(make().forward_backward([Work("bob", given)])[0].losses_T, found.losses_T)
    assert not np.allclose(packed[0].losses_T, packed[1].losses_T)


def test_forward_leaves_no_trace() -> None:
    engine = make()
    engine.forward_backward([Work("ada", TENANTS["ada"][1])])
    before = engine.state("ada")
    look = tiny.batch("cross_entropy", (20, 31), seed=9, forward_only=True)
    output, _ = engine.forward_backward([Work("ada", look), Work("bob", look)])
    after = engine.state("ada")
    assert np.array_equal(before.weights, after.weights)
    assert np.array_equal(before.gradient, after.gradient)
    assert engine.state("bob").gradient is None
    trained = engine.forward_backward([Work("ada", tiny.batch("cross_entropy", (20, 31), seed=9))])[0]
    assert np.array_equal(output.losses_T, trained.losses_T)


def test_forward_of_gspo_gives_the_loss_that_training_gives() -> None:
    given = TENANTS["cyd"][1]
    look = tiny.batch("gspo", (70, 41, 88, 2, 60), seed=3, forward_only=True)
    found, expected = (make().forward_backward([Work("cyd", one)])[0].losses_T for one in (look, given))
    assert tiny.worst(found, expected) <= 1e-6


def test_forward_beside_training_in_one_call_touches_no_gradient(alone: Results) -> None:
    engine = make()
    look = tiny.batch("cross_entropy", (33,), seed=9, forward_only=True)
    given = TENANTS["ada"][1]
    engine.forward_backward([Work("bob", look), Work("ada", given), Work("ada", look), Work("ada", given)])
    assert tiny.worst(engine.state("ada").gradient, alone["ada"][3]) <= 1e-5
    assert engine.state("bob").gradient is None


def test_an_operation_in_many_pieces_equals_the_operation_in_one() -> None:
    given = tiny.batch("gspo", (20, 9, 31, 50, 3, 22, 120, 8), seed=8)
    results = []
    for tokens in (10, 64, 4096):
        engine = TorchEngine(tiny.base(), EngineSettings(max_tokens_per_pass=tokens))
        engine.restore("run", tiny.trained(engine.base, LoraSpec(8, 0)))
        output = engine.forward_backward([Work("run", given)])[0]
        results.append((output.logprobs_TK, output.losses_T, engine.state("run").gradient))
    for found in results[:-1]:
        for a, b in zip(found, results[-1], strict=True):
            assert tiny.worst(a, b) <= 1e-5


def test_infinite_ratios_stay_in_their_own_operation(alone: Results) -> None:
    bad = tiny.batch("importance_sampling", (30,), seed=7)
    bad.columns["logprobs"][:] = -1e6
    engine = make()
    output = engine.forward_backward(
        [Work("ada", TENANTS["ada"][1]), Work("bob", bad), Work("ada", TENANTS["ada"][1])]
    )
    assert not np.isfinite(output[1].losses_T).all()
    assert not np.isfinite(engine.state("bob").gradient).all()
    assert tiny.worst(engine.state("ada").gradient, alone["ada"][3]) <= 1e-5


def test_rows_of_a_pass_are_cut_into_tiles_and_chunks_from_where_each_segment_begins() -> None:
    """So that an adapter's sums are the same wherever its rows are."""
    base = tiny.base()
    one, two = (base.new_adapter(LoraSpec(8, seed)) for seed in (0, 1))
    segments = [Segment(10, 80, one), Segment(80, 90, one), Segment(90, 91 + 2 * packed.CHUNK_ROWS, two)]
    number = {id(one): 0, id(two): 1}
    rows = segments[-1].stop + 5
    tiles = packed.tiles(segments, number, rows)
    assert tiles[:5].tolist() == [[0, 10, -1], [10, 74, 0], [74, 80, 0], [80, 90, 0], [90, 154, 1]]
    assert tiles[-1].tolist() == [rows - 5, rows, -1]
    assert (tiles[1:, 0] == tiles[:-1, 1]).all(), "no row is left out"
    chunks, spans = packed.chunks(segments, number)
    assert chunks[:, 2:].tolist() == [[0, 0], [0, 1], [1, 2], [1, 3], [1, 4]]
    assert spans.tolist() == [[0, 0, 2], [1, 2, 5]]
    alone, none = packed.chunks(segments[1:2], number)
    assert (alone.tolist(), len(none)) == ([[80, 90, 0, -1]], 0), "one chunk is added to the gradient at once"
