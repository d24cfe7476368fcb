"""Does the engine compute on this machine's GPU what transformers + PEFT compute? (How fast: bench-train.)

    PYTHONPATH=client:api:worker python tests/worker/gpu_check.py           # a CUDA GPU, three minutes
    PYTHONPATH=client:api:worker python tests/worker/gpu_check.py --tiny    # any machine, small shapes

Needs torch, transformers, peft, numpy and safetensors; downloads nothing, all weights are random. Each part
runs in a process of its own, so that one may fail, or change torch's settings, without the others.
Prints a table last; with OUT set in the environment writes gpu_check.json there. Exit status 1: a check failed.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import torch

from tinsmith.wire import loss_graph
from tinsmith.wire.batch import CustomInput, TrainInput
from tinsmith_worker import experts
from tinsmith_worker.activations import Keeping
from tinsmith_worker.contract import (
    AdamParams,
    AdapterState,
    Failure,
    LoraSpec,
    MuonParams,
    SampleInput,
    SampleOutput,
    Work,
)
from tinsmith_worker.copies import HostCopier
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.model import Base
from tinsmith_worker.sampler import SamplerSettings, TorchSampler
from tinsmith_worker.sampler.drawing import draw_by_kernels, draw_in_torch

DTYPES = [torch.float32, torch.bfloat16]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SOME = Keeping(recomputed_layers=2, lean_layers=1)
Finding = dict[str, Any]
Shape = dict[str, Any]

SMALL: Shape = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
}
TINY = SMALL | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "head_dim": 16}

# Ranks, targets, losses and shapes of six tenants; together more than one pass of 1024 tokens.
TENANTS: dict[str, tuple[LoraSpec, TrainInput]] = {
    "all": (LoraSpec(32, 1), tiny.batch("cross_entropy", (200, 313, 64), seed=1)),
    "attention": (LoraSpec(8, 2, train_mlp=False), tiny.batch("ppo", (100, 29), seed=2)),
    "mlp": (LoraSpec(16, 3, train_attn=False), tiny.batch("gspo", (70, 141, 88), seed=3)),
    "no unembed": (LoraSpec(12, 4, train_unembed=False), tiny.batch("dro", (120,), seed=4)),
    "unembed": (LoraSpec(8, 5, train_attn=False, train_mlp=False), tiny.batch("cispo", (90,), seed=5)),
    "one token": (LoraSpec(32, 6), tiny.batch("importance_sampling", (1,), seed=6)),
}


def say(*words: object) -> None:
    print(f"[{time.perf_counter() - STARTED:5.0f} s]", *words, flush=True)


STARTED = time.perf_counter()


def error(found: Any, expected: Any) -> float:
    """Norm of the difference over the norm of what is expected."""
    a, b = (torch.as_tensor(x).double().cpu().flatten() for x in (found, expected))
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@functools.cache
def engine_with(
    small: bool,
    dtype: torch.dtype,
    *,
    kernels: bool = True,
    compiled: bool = False,
    keeping: Keeping | None = None,
    deterministic: bool = False,
) -> TorchEngine:
    base = Base(tiny.model(dtype=dtype, **(TINY if small else SMALL)).to(DEVICE))
    engine = TorchEngine(base, EngineSettings(max_tokens_per_pass=1024, deterministic=deterministic))
    base.kernels &= kernels
    if compiled:
        engine.warm_up()
    base.keeping = keeping
    return engine


def reset(engine: TorchEngine) -> TorchEngine:
    for run, state in states(engine.base).items():
        engine.restore(run, state)
    return engine


_states: dict[int, dict[str, AdapterState]] = {}


def states(base: Base) -> dict[str, AdapterState]:
    """Every tenant's adapter, as if trained a while."""
    if id(base) not in _states:
        _states[id(base)] = {
            run: tiny.trained(base, spec, seed=spec.seed, spread=0.02) for run, (spec, _) in TENANTS.items()
        }
    return _states[id(base)]


def trained(engine: TorchEngine, runs: list[str]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(logprobs, gradient) of each run after two operations each, all in one call, from the beginning."""
    reset(engine)
    work = [Work(run, TENANTS[run][1]) for run in runs]
    outputs = engine.forward_backward(work + work)
    found = {}
    for run, output in zip(runs, outputs, strict=False):
        gradient = engine.state(run).gradient
        assert gradient is not None
        found[run] = (output.logprobs_TK, gradient)
    return found


def check_numbers(small: bool) -> list[Finding]:
    """The engine against transformers + PEFT in float32; in bfloat16 it may err as much as PEFT does there."""
    findings = []
    exact: dict[str, tiny.Reference] = {}
    for dtype in DTYPES:
        engine = reset(engine_with(small, dtype))
        worst = {"logprobs": 0.0, "gradient": 0.0, "PEFT's logprobs": 0.0, "PEFT's gradient": 0.0}
        for run, (_, given) in TENANTS.items():
            output = engine.forward_backward([Work(run, given)])[0]
            state = engine.state(run)
            model = tiny.peft(tiny.model(dtype=dtype, **(TINY if small else SMALL)).to(DEVICE), state)
            theirs = tiny.reference(model, given)
            if run not in exact:
                whole = tiny.model(dtype=torch.float32, **(TINY if small else SMALL)).to(DEVICE)
                exact[run] = tiny.reference(tiny.peft(whole, state), given)
            truth = exact[run]
            order = [tiny.peft_name(name) for name, _, _ in state.tensors]
            expected, by_peft = (
                torch.cat([r.gradients[n].float().flatten() for n in order]) for r in (truth, theirs)
            )
            gradients = tiny.tensors(state, state.gradient).values()
            found = torch.cat([torch.from_numpy(g).flatten() for g in gradients])
            for name, value in {
                "logprobs": error(output.logprobs_TK, truth.logprobs),
                "gradient": error(found, expected),
                "PEFT's logprobs": error(theirs.logprobs, truth.logprobs),
                "PEFT's gradient": error(by_peft, expected),
            }.items():
                worst[name] = max(worst[name], value)
        for name in ("logprobs", "gradient"):
            limit = 5e-5 if dtype == torch.float32 else 2 * worst[f"PEFT's {name}"]
            findings.append(
                {
                    "check": f"{name} against PEFT in float32, engine in {dtype}".replace("torch.", ""),
                    "error": worst[name],
                    "limit": limit,
                    "passed": worst[name] <= limit,
                    "PEFT's own error": worst[f"PEFT's {name}"],
                }
            )
        say(dtype, worst)
    return findings


def check_packing(small: bool) -> list[Finding]:
    """Tenants packed together against each alone, and every way to compute against the plainest."""
    findings = []
    for dtype in DTYPES:
        limit = 5e-5 if dtype == torch.float32 else 0.05
        packed = trained(engine_with(small, dtype), list(TENANTS))
        others = {
            "each alone": {run: trained(engine_with(small, dtype), [run])[run] for run in TENANTS},
            "the loop over adapters": trained(engine_with(small, dtype, kernels=False), list(TENANTS)),
            "activations computed anew": trained(engine_with(small, dtype, keeping=SOME), list(TENANTS)),
        }
        if dtype == torch.bfloat16:
            others["layers compiled"] = trained(engine_with(small, dtype, compiled=True), list(TENANTS))
            lean = engine_with(small, dtype, compiled=True, keeping=Keeping(lean_layers=99))
            others["compiled, lean"] = trained(lean, list(TENANTS))
            both = engine_with(small, dtype, compiled=True, keeping=SOME)
            others["compiled and computed anew"] = trained(both, list(TENANTS))
        for what, other in others.items():
            worst = max(error(a, b) for run in TENANTS for a, b in zip(packed[run], other[run], strict=True))
            findings.append(
                {
                    "check": f"packed against {what}, {dtype}".replace("torch.", ""),
                    "error": worst,
                    "limit": limit,
                    "passed": worst <= limit,
                }
            )
            say(findings[-1])
    return findings


def check_attention(small: bool) -> list[Finding]:
    """Sequences of one length, which another kernel takes, against each by itself; and the bits of AdamW's kernel
    against torch's own, as near as fused operations are."""
    given = tiny.batch("cross_entropy", (256, 256, 256, 256), seed=7)
    found = []
    for one_by_one in (False, True):
        engine = reset(engine_with(small, torch.bfloat16))
        engine.forward_backward([Work("all", given)])
        if one_by_one:
            engine = reset(engine_with(small, torch.bfloat16))
            for n in range(4):
                rows = slice(256 * n, 256 * (n + 1))
                part = replace(
                    given,
                    lengths_S=given.lengths_S[:1],
                    tokens_T=given.tokens_T[rows],
                    targets_TK=given.targets_TK[rows],
                    target_widths_S=given.target_widths_S[:1],
                    columns={name: column[rows] for name, column in given.columns.items()},
                )
                engine.forward_backward([Work("all", part)])
        found.append(engine.state("all").gradient)
    worst = error(*found)
    findings = [
        {
            "check": "equal lengths together against one by one, bfloat16",
            "error": worst,
            "limit": 0.05,
            "passed": worst <= 0.05,
        }
    ]
    params = AdamParams(1e-2, weight_decay=0.1, grad_clip_norm=0.5)
    before, wanted = engine.state("all"), engine.state("all")
    weights = torch.tensor(before.weights).requires_grad_()
    weights.grad = torch.tensor(before.gradient)
    torch.nn.utils.clip_grad_norm_([weights], 0.5)
    torch.optim.AdamW([weights], lr=1e-2, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.1).step()
    answer = tiny.step(engine, "all", params)
    assert isinstance(answer, dict), answer
    moved = error(engine.state("all").weights - wanted.weights, weights.detach().numpy() - wanted.weights)
    findings.append(
        {"check": "one step of AdamW against torch's", "error": moved, "limit": 1e-4, "passed": moved <= 1e-4}
    )
    engine._adapters["all"].open_gradient()
    engine._adapters["all"].gradient[3] = float("nan")  # type: ignore[index]
    kept = engine.state("all")
    failed = tiny.step(engine, "all", params)
    after = engine.state("all")
    unharmed = (
        isinstance(failed, Failure) and np.array_equal(kept.weights, after.weights) and after.gradient is None
    )
    findings.append(
        {
            "check": "a gradient that is not finite changes nothing",
            "error": float(not unharmed),
            "limit": 0.0,
            "passed": unharmed,
        }
    )
    for finding in findings:
        say(finding)
    return findings


def check_custom(small: bool) -> list[Finding]:
    """A loss that a client described, and a step of Muon, against the same on the CPU in float32."""
    reference = Base(tiny.model(dtype=torch.float32, **(TINY if small else SMALL)))
    own = TorchEngine(reference, EngineSettings(max_tokens_per_pass=1024))
    given = described(tiny.batch("importance_sampling", (200, 313, 64), seed=8))
    own.restore("all", states(reference)["all"])
    expected = own.forward_backward([Work("all", given)])[0]
    gradient = own.state("all").gradient
    findings = []
    for dtype in DTYPES:
        engine = reset(engine_with(small, dtype))
        output = engine.forward_backward([Work("all", given)])[0]
        before = engine.state("all")
        own.restore("all", before)  # the same gradient for both
        moved = []
        for of in (engine, own):
            answer = tiny.step(of, "all", MuonParams(1e-2, weight_decay=0.1, grad_clip_norm=0.5))
            assert isinstance(answer, dict), answer
            moved.append(of.state("all").weights - before.weights)
        limit = 5e-5 if dtype == torch.float32 else 0.05
        for what, found, wanted, most in (
            ("loss", output.losses_T.sum(), expected.losses_T.sum(), limit),
            (
                "metric",
                output.metric_sums["custom/ratio:sum"],
                expected.metric_sums["custom/ratio:sum"],
                limit,
            ),
            ("gradient", before.gradient, gradient, limit),
            # Small singular values are stretched 500-fold, and so is what rounding left of them.
            ("step of Muon", *moved, 1e-3),
        ):
            check = f"custom loss and Muon against the CPU: {what}, {dtype}".replace("torch.", "")
            off = error(found, wanted)
            findings.append({"check": check, "error": off, "limit": most, "passed": off <= most})
            say(findings[-1])
    return findings


def described(given: TrainInput) -> TrainInput:
    """The same datums with importance sampling as a client's own function: -(exp(logprobs - q) A).sum()."""

    def node(op: str, name: str, target: str, *args: Any) -> dict[str, Any]:
        return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": {}}

    names = ("logprobs", "q", "advantages")
    answer = {"tuple": [{"ref": "neg"}, {"dict": {"custom/ratio:sum": {"ref": "sum_2"}}}]}
    nodes = [
        *(node("placeholder", name, name) for name in names),
        node("call_function", "sub", "operator.sub", {"ref": "logprobs"}, {"ref": "q"}),
        node("call_function", "exp", "torch.exp", {"ref": "sub"}),
        node("call_function", "mul", "operator.mul", {"ref": "exp"}, {"ref": "advantages"}),
        node("call_method", "sum_1", "sum", {"ref": "mul"}),
        node("call_method", "sum_2", "sum", {"ref": "exp"}),
        node("call_function", "neg", "operator.neg", {"ref": "sum_1"}),
        node("output", "output", "output", answer),
    ]
    inputs = [{"name": name, "rank": 1} for name in names]
    graph = loss_graph.read(loss_graph.write("of a client", inputs, {"format": 1, "nodes": nodes}))
    starts = np.cumsum(given.lengths_S)[:-1]
    of_datums = zip(
        *(np.split(given.columns[name], starts) for name in ("logprobs", "advantages")), strict=True
    )
    return replace(given, loss=loss_graph.LOSS, columns={}, custom=CustomInput(graph, tuple(of_datums)))


def check_experts(small: bool) -> list[Finding]:
    """A mixture's experts in one product against one after the other. Of one layer, whose router is given the same
    bits by both."""
    shape = (TINY if small else SMALL) | {"num_hidden_layers": 1, "num_experts": 16, "num_experts_per_tok": 4,
                                          "moe_intermediate_size": 64}  # fmt: skip
    findings, in_one = [], experts.grouped
    for dtype in DTYPES:
        found = []
        for what, grouped in (
            ("in one product", in_one),
            ("compiled", in_one),
            ("one by one", experts.one_by_one),
        ):
            experts.grouped = grouped
            base = Base(tiny.model("qwen3_moe", dtype=dtype, **shape).to(DEVICE))
            engine = TorchEngine(base, EngineSettings(1024))
            if what == "compiled":
                engine.warm_up()
                if base.can_compile and not base.is_compiled:
                    findings.append(_limited("mixtures whose layers did not compile", 1, 0))
            found.append(trained(engine, list(TENANTS)))
        experts.grouped = in_one
        limit = 5e-5 if dtype == torch.float32 else 0.05
        for what, ours in (("in one product", found[0]), ("compiled", found[1])):
            off = max(error(a, b) for run in TENANTS for a, b in zip(ours[run], found[2][run], strict=True))
            check = f"experts {what} against one by one, {dtype}".replace("torch.", "")
            findings.append(_limited(check, off, limit))
    return findings


def check_deterministic(small: bool) -> list[Finding]:
    """In deterministic mode a tenant's bits are its own: packed with anyone in any order, and run again."""
    findings = []
    orders = [list(TENANTS), list(TENANTS)[::-1], ["one token", "all", "mlp"], ["all", "no unembed"]]
    for dtype, compiled in [(dtype, False) for dtype in DTYPES] + [(torch.bfloat16, True)]:
        make = functools.partial(engine_with, small, dtype, deterministic=True, compiled=compiled)
        alone = {run: trained(make(), [run])[run] for run in TENANTS}
        differing = [
            f"{run} of {len(order)}"
            for order in [*orders, orders[0]]
            for run, found in trained(make(), order).items()
            if not all(np.array_equal(a, b) for a, b in zip(found, alone[run], strict=True))
        ]
        findings.append(
            {
                "check": f"deterministic mode: packed bits equal alone, {dtype}{', compiled' * compiled}".replace(
                    "torch.", ""
                ),
                "error": float(len(differing)),
                "limit": 0.0,
                "passed": not differing,
                "differing": differing,
            }
        )
        say(findings[-1])
    return findings


def check_copies(small: bool) -> list[Finding]:
    """A state that was asked for in the middle of training, and fetched beside it, against one that was waited for:
    cloned on the device, without room for a clone, and of a run that leaves."""
    findings = []
    for what, room_bytes in (("cloned", 1 << 30), ("without room", 1)):
        engine = reset(engine_with(small, torch.bfloat16, deterministic=True))
        engine._copier.close()
        engine._copier = HostCopier(DEVICE, room_bytes=room_bytes)
        given = tiny.batch(lengths=(200, 313, 64), seed=3)
        differing = 0
        for turn in range(8):
            # The device is behind: nothing of this has been waited for.
            engine.begin_forward_backward([Work("all", given)] * 4)
            expected = engine._adapters["all"]
            held = {name: flat.clone() for name, flat in expected.flats().items()}
            asked = engine.begin_state("all", leaves=turn == 7)
            if turn == 7:
                engine.drop("all")
            else:
                engine.begin_optim_steps([("all", AdamParams(1e-2))])
            found = asked.arrival.result()
            differing += sum(
                not np.array_equal(getattr(found, name), flat.cpu().numpy()) for name, flat in held.items()
            )
        findings.append(
            _limited(f"states fetched beside training that are of another moment, {what}", differing, 0)
        )
    return findings


def check_sampler(small: bool) -> list[Finding]:
    """What the sampler says of the tokens it drew against what a forward of the same weights says."""
    findings = []
    for dtype in DTYPES:
        limit = 1e-4 if dtype == torch.float32 else 0.05
        engine = reset(engine_with(small, dtype))
        worst = max(float(np.abs(ours - theirs).mean()) for ours, theirs in _sampled(engine, exact=False))
        findings.append(
            {
                "check": f"sampler's logprobs against forward's, mean, {dtype}".replace("torch.", ""),
                "error": worst,
                "limit": limit,
                "passed": worst <= limit,
            }
        )
        say(findings[-1])
        for compiled in (False, True)[: 2 if dtype == torch.bfloat16 else 1]:
            engine = reset(engine_with(small, dtype, deterministic=True, compiled=compiled))
            differ = sum(int((ours != theirs).sum()) for ours, theirs in _sampled(engine, exact=True))
            findings.append(
                {
                    "check": f"exact logprobs that are not a forward_backward's, {dtype}{', compiled' * compiled}".replace(
                        "torch.", ""
                    ),
                    "error": differ,
                    "limit": 0,
                    "passed": differ == 0,
                }
            )
            say(findings[-1])
    return findings


def check_drawing(small: bool) -> list[Finding]:
    """Tokens that the kernels draw, and what they say of them, against a sort in plain torch on the CPU. Every third
    row's logits are steps of a half, so that many are equal."""
    if DEVICE.type != "cuda":
        say("the kernels that draw are for GPUs: nothing to check")
        return []
    random, rows, vocabulary = np.random.default_rng(0), 256, 151_936
    logits_NV = torch.from_numpy(random.normal(0, 3, (rows, vocabulary)).astype(np.float32))
    logits_NV[::3] = (logits_NV[::3] * 2).round() / 2
    settings = [
        (float(random.choice([0, 0.5, 1, 2])), int(random.choice([-1, 1, 50, 5000])), float(top_p))
        for top_p in random.choice([0, 0.1, 0.9, 0.999, 1], rows)
    ]
    uniforms = random.random(rows)
    found = draw_by_kernels(logits_NV.to(DEVICE), settings, uniforms, 20)
    expected = draw_in_torch(logits_NV, settings, uniforms, 20)
    same = found[0].cpu() == expected[0]
    likeliest, wanted = found[2][0].cpu(), expected[2][0]
    # Sums round otherwise: a number that falls between two tokens may fall on either side.
    return [
        _limited("rows whose drawn token is not the sort's", float((~same).double().mean()), 0.02),
        _limited("logprobs of drawn tokens, largest difference", float((found[1].cpu() - expected[1])[same].abs().max()), 1e-3),
        _limited("rows with other tokens among the likeliest 20",
                 float((likeliest.isfinite() != wanted.isfinite()).any(1).double().mean()), 0.02),
    ]  # fmt: skip


def _limited(check: str, value: float, limit: float) -> Finding:
    finding = {"check": check, "error": value, "limit": limit, "passed": value <= limit}
    say(finding)
    return finding


def _sampled(engine: TorchEngine, *, exact: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The logprobs of what was sampled, and the engine's of the same tokens (exact: of a forward_backward)."""
    settings = SamplerSettings(cache_bytes=1 << 28)
    sampler = TorchSampler(engine.base, settings=settings, score=engine.score if exact else None)
    prompt = np.arange(5, 45, dtype=np.int32)
    for run in ("all", "attention"):
        sampler.hold(run, engine.state(run))
        sampler.add(SampleInput(run, run, prompt, 8, 64, seed=1, stop_tokens=()))
    while sampler.busy:
        for output in sampler.step():
            assert isinstance(output, SampleOutput), output
            for sequence in output.sequences:
                given = _next_tokens(np.concatenate([prompt, sequence.tokens]))
                work = Work(output.request_id, replace(given, forward_only=not exact))
                found = engine.forward_backward([work])[0].logprobs_TK[len(prompt) - 1 :, 0]
                yield sequence.logprobs, found


def _next_tokens(tokens: np.ndarray) -> TrainInput:
    rows = len(tokens) - 1
    return TrainInput(
        loss="cross_entropy",
        forward_only=True,
        lengths_S=np.array([rows]),
        tokens_T=tokens[:-1],
        targets_TK=tokens[1:, None].astype(np.int64),
        target_widths_S=np.zeros(1, np.int64),
        columns={"weights": np.ones((rows, 1), np.float32)},
    )


PARTS = [
    "numbers",
    "packing",
    "attention",
    "custom",
    "experts",
    "copies",
    "deterministic",
    "sampler",
    "drawing",
]


def run_part(part: str, *, tiny_shapes: bool) -> list[Finding]:
    checks = {
        "numbers": check_numbers,
        "packing": check_packing,
        "attention": check_attention,
        "custom": check_custom,
        "experts": check_experts,
        "copies": check_copies,
        "deterministic": check_deterministic,
        "sampler": check_sampler,
        "drawing": check_drawing,
    }
    return checks[part](tiny_shapes)


def run_all(*, tiny_shapes: bool, parts: list[str]) -> dict[str, Any]:
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU",
    }
    for part in parts:
        say("part", part)
        with tempfile.NamedTemporaryFile() as written:
            command = [sys.executable, __file__, "--part", part, "--to", written.name]
            done = subprocess.run(
                command + ["--tiny"] * tiny_shapes + ["--half"] * (len(DTYPES) == 1), check=False
            )
            text = Path(written.name).read_text()
        report[part] = json.loads(text) if done.returncode == 0 else f"failed with status {done.returncode}"
    return report


def table(report: dict[str, Any]) -> str:
    lines = [f"\ntorch {report['torch']} on {report['device']}"]
    for part in PARTS:
        findings = report.get(part, [])
        if isinstance(findings, str):
            lines.append(f"{'FAILED':7} {part}: {findings}, see above")
            continue
        for found in findings:
            verdict = "ok" if found["passed"] else "FAILED"
            lines.append(f"{verdict:7} {found['check']:62} {found['error']:.2e} (limit {found['limit']:.0e})")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU")
    parser.add_argument("--part", choices=PARTS, help="this part only")
    parser.add_argument("--half", action="store_true", help="bfloat16 only: float32 takes kernels of its own")
    parser.add_argument("--to", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.half:
        DTYPES.remove(torch.float32)
    if given.to:
        given.to.write_text(json.dumps(run_part(given.part, tiny_shapes=given.tiny)))
        return
    report = run_all(tiny_shapes=given.tiny, parts=[given.part] if given.part else PARTS)
    if folder := os.environ.get("OUT"):
        Path(folder, "gpu_check.json").write_text(json.dumps(report, indent=1))
    text = table(report)
    print(text)
    sys.exit("FAILED" in text)


if __name__ == "__main__":
    main()
