"""One worker on several ranks computes what one process computes. Real groups of processes, over gloo."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.ops.op_builder import AsyncIOBuilder

from tests.worker import group_script as script
from tests.worker import tiny
from tests.worker.ranks import Ranks
from tinsmith.errors import InvalidInput
from tinsmith_worker.contract import Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.parallel.engine import deal
from tinsmith_worker.parallel.load import read_zero
from tinsmith_worker.parallel.zero import own_place

PARALLEL = ("none", "fsdp2", "deepspeed")
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GROUPS = [(parallel, ranks) for ranks in (2, 3) for parallel in PARALLEL]
# With the parts in host memory; it may well be one process.
GROUPS += [("fsdp2 host", 1), ("deepspeed host", 1), ("deepspeed host", 2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several files, none of whose widths three ranks can share evenly."""
    folder = tmp_path_factory.mktemp("base")
    tiny.model(tied=False).save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    tiny.model("qwen3_moe", **EXPERTS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with parts of a MiB and more, which DeepSpeed keeps on a disk, and with smaller ones, which it does not."""
    folder = tmp_path_factory.mktemp("wide")
    tiny.model(tied=False, hidden_size=128, intermediate_size=4096).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process finds."""
    out = tmp_path_factory.mktemp("alone")
    base = Base.load(folder, device="cpu", dtype=torch.float32)
    script.run_all(TorchEngine(base, EngineSettings(256)), out, None)
    return out


RunGroup = Callable[..., Path]


@pytest.fixture(scope="module")
def group(folder: Path, forked: Ranks, tmp_path_factory: pytest.TempPathFactory) -> RunGroup:
    """Where the files are that a group of ranks left; it is run once. Groups of three also continue the run of
    the group of two. `of`: the base."""
    root = tmp_path_factory.mktemp("groups")

    def run(parallel: str, ranks: int, *, deterministic: bool = False, of: Path = folder) -> Path:
        out = root / f"{parallel}{ranks}{deterministic}{of.name}"
        if out.exists():
            return out
        resume = run(parallel, 2) if ranks == 3 else None
        out.mkdir()
        if deterministic:
            by_torchrun(ranks, of, out, parallel)
        else:
            work = partial(script.work, script.Asked(of, out, parallel, resume=resume))
            # DeepSpeed compiles what it reads disks with, once on a machine.
            forked.run(ranks, out, work, patience_seconds=1500 if parallel == "deepspeed disk" else 280)
        return out

    return run


def by_torchrun(ranks: int, *given: object) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.worker.group_script", *map(str, given)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def worst(found: Path, expected: Path) -> dict[str, float]:
    with np.load(found) as ours, np.load(expected) as theirs:
        assert set(ours) == set(theirs)
        return {name: tiny.worst(ours[name], theirs[name]) for name in theirs}


@pytest.mark.parametrize("scenario", script.SCENARIOS)
@pytest.mark.parametrize("parallel, ranks", GROUPS)
def test_a_group_computes_what_one_process_computes(
    parallel: str, ranks: int, scenario: str, group: RunGroup, alone: Path
) -> None:
    errors = worst(group(parallel, ranks) / f"{scenario}.npz", alone / f"{scenario}.npz")
    for name, error in errors.items():
        assert error <= allowed(scenario, name), (name, error)


def allowed(scenario: str, name: str) -> float:
    """AdamW divides by the root of the second moment: where a gradient is nearly zero its rounding weighs more, and the
    next gradients are those of other weights. Muon's iteration multiplies small singular values, rounding included, and
    the scenario looks behind its second step."""
    return 1e-5 if "weights" in name or scenario in ("muon", "optimizer") else 1e-6


@pytest.mark.parametrize("parallel, ranks", GROUPS)
def test_after_some_steps_all_ranks_have_the_same_bits(parallel: str, ranks: int, group: RunGroup) -> None:
    kept = [np.load(group(parallel, ranks) / f"kept{rank}.npy") for rank in range(ranks)]
    assert np.abs(kept[0]).max() > 0
    assert all(np.array_equal(kept[0], other) for other in kept[1:])


@pytest.mark.parametrize("parallel", PARALLEL)
def test_a_checkpoint_of_two_ranks_continues_on_one_and_on_three(
    parallel: str, folder: Path, group: RunGroup, alone: Path
) -> None:
    engine = TorchEngine(Base.load(folder, device="cpu", dtype=torch.float32), EngineSettings(256))
    uninterrupted = script.continued(engine, script.read_state(alone))
    on_one = script.continued(engine, script.read_state(group(parallel, 2)))
    with np.load(group(parallel, 3) / "continued.npz") as on_three:
        for name, expected in uninterrupted.items():
            # Behind three steps that each rounded by itself.
            assert tiny.worst(on_one[name], expected) <= 1e-5, name
            assert tiny.worst(on_three[name], expected) <= 1e-5, name


def test_in_deterministic_mode_a_groups_tenants_together_equal_each_alone_bit_for_bit(
    group: RunGroup,
) -> None:
    with np.load(group("fsdp2", 2, deterministic=True) / "together_and_alone.npz") as found:
        for run in script.TENANTS:
            for what in ("losses", "gradient"):
                assert np.array_equal(found[f"{run} together {what}"], found[f"{run} alone {what}"]), (
                    run,
                    what,
                )


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_pass_that_fails_on_one_rank_fails_and_the_group_goes_on(ranks: int, group: RunGroup) -> None:
    with np.load(group("none", ranks) / "failing_pass.npz") as found:
        assert "rank 0" in str(found["error at 0"])
        assert f"rank {ranks - 1}" in str(found["error at -1"])
        assert np.isfinite(found["losses"]).all()


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_leader_scores_by_itself_what_a_group_would_say(ranks: int, group: RunGroup) -> None:
    with np.load(group("none", ranks) / "scores.npz") as found:
        for length in (30, 2):
            scored, trained = found[f"scored {length}"], found[f"trained {length}"]
            assert scored.shape == (length,)
            assert tiny.worst(scored, trained) <= 1e-6


@pytest.mark.parametrize("parallel, ranks", [("none", 2), ("fsdp2", 2), ("fsdp2", 4), ("fsdp2 host", 1)])
def test_a_mixture_is_trained_by_a_group(parallel: str, ranks: int, mixture: Path, group: RunGroup) -> None:
    """Of four ranks, two have two experts each of every layer, one has the last two, and one has none."""
    engine = TorchEngine(Base.load(mixture, device="cpu", dtype=torch.float32), EngineSettings(256))
    for scenario in (script.tenants_together, script.computed_anew, script.muon, script.sampling):
        expected = scenario(engine)
        with np.load(group(parallel, ranks, of=mixture) / f"{scenario.__name__}.npz") as found:
            assert set(found) == set(expected)
            for name, theirs in expected.items():
                assert tiny.worst(found[name], theirs) <= allowed(scenario.__name__, name), name


def test_deepspeed_does_not_cut_a_mixture_and_says_so(mixture: Path) -> None:
    nobody: Any = None  # no other rank is asked
    with pytest.raises(InvalidInput, match=r"Qwen3MoeForCausalLM cannot be cut .* parallel fsdp2"):
        read_zero(mixture, nobody, dtype=torch.float32)


needs_libaio = pytest.mark.skipif(
    not AsyncIOBuilder().is_compatible(), reason="needs libaio's headers and a C++ compiler"
)


@pytest.mark.slow
@pytest.mark.timeout(1600)
@needs_libaio
def test_what_a_killed_process_left_does_not_stop_the_compiling(tmp_path: Path) -> None:
    load = "from tinsmith_worker.parallel import zero; print(zero.load_disk_access())"
    subprocess.run([sys.executable, "-c", load], check=True)  # minutes, once on a machine
    cached = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or "~/.cache/torch_extensions").expanduser()
    places = [*cached.glob(f"tinsmith-*{torch.__version__}/*/")]
    assert len(places) >= 2
    for place in places:
        (place / "lock").touch()
    subprocess.run([sys.executable, "-c", load], check=True, timeout=100)


@pytest.mark.slow
@pytest.mark.timeout(1600)
@needs_libaio
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_base_on_a_disk_is_trained_and_sampled(ranks: int, wide: Path, group: RunGroup) -> None:
    out = group("deepspeed disk", ranks, of=wide)
    weights = [file for file in out.with_name(f"{out.name} disk").rglob("*.swp") if file.stat().st_size]
    gate_up_down = 2 * 3 * 128 * 4096 * 4
    assert sum(file.stat().st_size for file in weights) == gate_up_down
    engine = TorchEngine(Base.load(wide, device="cpu", dtype=torch.float32), EngineSettings(256))
    for scenario in (script.every_loss, script.uneven_batches, script.tenants_together, script.sampling):
        expected = scenario(engine)
        with np.load(out / f"{scenario.__name__}.npz") as found:
            assert set(found) == set(expected)
            for name, theirs in expected.items():
                # One product is a sum over 4096 of another order.
                assert tiny.worst(found[name], theirs) <= 3e-6, (scenario.__name__, name)


def test_an_offload_folder_belongs_to_one_worker(tmp_path: Path) -> None:
    first = own_place(tmp_path, 0)
    with pytest.raises(ValueError, match=f"{first} is another worker's"):
        own_place(tmp_path, 0)
    assert own_place(tmp_path, 1) != first


@pytest.mark.parametrize(
    "lengths, ranks, expected",
    [
        ((100,), 2, [0, 1]),
        ((100, 100), 3, [1, 0, 1]),
        ((10, 10, 10, 10), 2, [2, 2]),
        ((90, 10, 10, 10), 2, [1, 3]),
        ((), 2, [0, 0]),
    ],
)
def test_sequences_are_dealt_out_by_tokens(lengths: tuple[int, ...], ranks: int, expected: list[int]) -> None:
    engine = TorchEngine(tiny.base(), EngineSettings(64))
    engine.create("run", script.SPEC)
    pieces = [
        piece
        for number, length in enumerate(lengths)
        for piece in engine._pieces(number, Work("run", tiny.batch(lengths=(length,))))
    ]
    assert [len(part) for part in deal(pieces, ranks)] == expected
