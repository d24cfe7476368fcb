"""Custom losses: what torch says of the same function, and nothing that was not allowed."""

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tinker.lib.public_interfaces.custom_loss import encode_graph, trace_loss

from tests.worker import tiny
from tinsmith.errors import InvalidInput
from tinsmith.wire import datums, loss_graph
from tinsmith.wire.batch import CustomInput, TrainInput
from tinsmith.wire.loss_graph import FUNCTIONS, METHODS
from tinsmith_worker import custom_loss
from tinsmith_worker.contract import LoraSpec, Work
from tinsmith_worker.engine import EngineSettings, TorchEngine
from tinsmith_worker.tuning.base import TunedBase
from tinsmith_worker.tuning.engine import FULL, TunedEngine

Loss = Callable[..., tuple[torch.Tensor, Mapping[str, torch.Tensor]]]


def traced(fn: Loss, **ranks: int) -> loss_graph.LossGraph:
    """As the official SDK sends it."""
    handle = trace_loss(fn, {"logprobs": 1, **ranks}, "session")  # type: ignore[dict-item]
    graph = encode_graph(handle).model_dump(mode="json")
    inputs = [one.model_dump() for one in handle.inputs]
    return loss_graph.read(loss_graph.write(handle.name, inputs, json.loads(json.dumps(graph))))


def reinforce(logprobs: Any, q: Any, advantages: Any) -> Any:
    ratio = torch.exp(logprobs - q)
    gain = torch.minimum(ratio * advantages, torch.clamp(ratio, 0.8, 1.2) * advantages)
    return -gain.sum(), {"custom/ratio:mean": ratio.mean(), "custom/clipped:sum": (ratio > 1.2).float().sum()}


def sequence_ratio(logprobs: Any, q: Any, advantages: Any) -> Any:
    mask = advantages != 0
    mean = ((logprobs - q) * mask).sum() / mask.sum().clamp(min=1)
    return -(torch.exp(mean) * advantages).sum(), {}


def with_a_scalar(logprobs: Any, temperature: Any) -> Any:
    return F.softplus(-logprobs / temperature).mean() * math.sqrt(logprobs.shape[0]), {}


def of_pairs(logprobs: Any, q: Any) -> Any:
    differences = logprobs.unsqueeze(0) - logprobs.unsqueeze(1)
    return -F.logsigmoid(differences[q.unsqueeze(0) > q.unsqueeze(1)]).sum(), {"custom/n:sum": q.sum()}


def of_many_operations(logprobs: Any, q: Any) -> Any:
    x = torch.where(q > -1.0, logprobs, torch.zeros_like(logprobs)).to(torch.float64)
    y = torch.cat([x[1:], x[:1]]).cumsum(0).float() - 2**logprobs
    z = torch.stack([y, logprobs.flip(0)]).amax(0) + torch.logsumexp(logprobs, 0) + abs(q).sqrt().detach()
    best = torch.max(z, dim=0)
    return (z.softmax(0) * y).sum() + best.values + z.std() + logprobs[..., None].squeeze(-1)[-1], {
        "custom/where:mean": best.indices
    }


def of_indices(logprobs: Any, at: Any) -> Any:
    return -logprobs[at].sum() - torch.gather(logprobs, 0, at).mean() * 0.5, {}


@pytest.mark.parametrize(
    ("fn", "ranks"),
    [
        (reinforce, {"q": 1, "advantages": 1}),
        (sequence_ratio, {"q": 1, "advantages": 1}),
        (with_a_scalar, {"temperature": 0}),
        (of_pairs, {"q": 1}),
        (of_many_operations, {"q": 1}),
        (of_indices, {"at": 1}),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_loss_slope_and_metrics_are_those_of_torch(fn: Loss, ranks: dict[str, int]) -> None:
    generator = np.random.default_rng(1)
    graph = traced(fn, **ranks)
    drawn = []
    for _ in range(3):
        logprobs = -generator.random(7, np.float32) * 3
        inputs: list[np.ndarray] = [
            np.float32(1.7) if rank == 0 else -generator.random(7, np.float32) * 2 for rank in ranks.values()
        ]
        if "at" in ranks:
            inputs = [generator.integers(0, 7, 4)]
        drawn.append((logprobs, tuple(map(np.asarray, inputs))))
    given = CustomInput(graph, tuple(inputs for _, inputs in drawn))
    custom_loss.check(given, np.full(3, 7), np.zeros(3, np.int64))
    for datum, (logprobs, inputs) in enumerate(drawn):
        leaf = torch.from_numpy(logprobs.copy()).requires_grad_()
        loss, metrics = fn(leaf, *(torch.from_numpy(np.array(i)) for i in inputs))
        loss.backward()
        ours = custom_loss.evaluate(given, datum, logprobs)
        assert ours[0] == loss.item()
        np.testing.assert_array_equal(ours[1], leaf.grad)
        assert ours[2] == {name: float(value.detach()) for name, value in metrics.items()}


def custom_batch(fn: Loss, lengths: tuple[int, ...], *, seed: int = 0, **ranks: int) -> TrainInput:
    """The datums of `tiny.batch` with a loss that takes `q` and `advantages`."""
    given = tiny.batch("ppo", lengths, seed=seed)
    starts = np.cumsum(lengths)[:-1]
    columns = [given.columns["logprobs"], given.columns["advantages"]]
    inputs = tuple(zip(*(np.split(column, starts) for column in columns), strict=True))
    custom = CustomInput(traced(fn, q=1, advantages=1), inputs)
    return replace(given, loss="custom", columns={}, custom=custom)


def gradient_of(engine: TorchEngine, run_id: str) -> np.ndarray:
    gradient = engine.state(run_id).gradient
    assert gradient is not None
    return gradient


@pytest.mark.parametrize("single_tenant", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("fn", [reinforce, sequence_ratio], ids=lambda f: f.__name__)
def test_the_engine_s_gradient_is_that_of_the_same_loss_computed_by_torch(
    fn: Loss, single_tenant: bool
) -> None:
    """By cross entropy with the weights -dL/dlogprob, which is tested against autograd through the model."""
    settings = EngineSettings(max_tokens_per_pass=64)  # in several passes
    engine = (
        TunedEngine(TunedBase(tiny.model()), settings)
        if single_tenant
        else TorchEngine(tiny.base(), settings)
    )
    given = custom_batch(fn, (7, 30, 12, 25))
    for run_id in ("custom", "surrogate"):
        if single_tenant:
            engine.create(run_id, FULL)
        else:
            engine.restore(run_id, tiny.trained(engine.base, LoraSpec(4, 1)))
    engine.check(given)
    (output,) = engine.forward_backward([Work("custom", given)])
    weights, losses, sums = [], [], dict[str, float]()
    assert given.custom is not None
    for (q, advantages), logprobs in zip(
        given.custom.inputs, np.split(output.logprobs_TK[:, 0], given.offsets_S[1:-1]), strict=True
    ):
        leaf = torch.from_numpy(logprobs.copy()).requires_grad_()
        loss, metrics = fn(leaf, torch.from_numpy(q.copy()), torch.from_numpy(advantages.copy()))
        (slope,) = torch.autograd.grad(loss, leaf)
        weights.append(-slope.numpy())
        losses.append(loss.item())
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value.detach())
    weights_T1 = np.concatenate(weights)[:, None]
    surrogate = replace(given, loss="cross_entropy", custom=None, columns={"weights": weights_T1})
    engine.forward_backward([Work("surrogate", surrogate)])
    np.testing.assert_array_equal(gradient_of(engine, "custom"), gradient_of(engine, "surrogate"))
    assert np.abs(gradient_of(engine, "custom")).max() > 0
    np.testing.assert_allclose(output.losses_T.sum(), sum(losses), rtol=1e-6)
    assert output.metric_sums == pytest.approx(sums)
    told = datums.metrics(given, output)
    for name, value in sums.items():
        assert told[name] == pytest.approx(value / (4 if name.endswith(":mean") else 1))


def test_custom_losses_packed_with_others_have_the_bits_they_have_alone() -> None:
    base = tiny.base()
    engine = TorchEngine(base, EngineSettings(deterministic=True))
    work = [
        Work("a", custom_batch(reinforce, (9, 14), seed=1)),
        Work("b", custom_batch(sequence_ratio, (5, 20), seed=2)),
        Work("c", tiny.batch("ppo", (11, 3), seed=3)),
    ]
    for run_id in "abc":
        engine.restore(run_id, tiny.trained(base, LoraSpec(4, 1), seed=ord(run_id)))
    together = engine.forward_backward(work)
    packed = {run_id: gradient_of(engine, run_id) for run_id in "abc"}
    for one, output in zip(work, together, strict=True):
        engine.restore(one.run_id, tiny.trained(base, LoraSpec(4, 1), seed=ord(one.run_id)))
        (alone,) = engine.forward_backward([one])
        np.testing.assert_array_equal(output.logprobs_TK, alone.logprobs_TK)
        np.testing.assert_array_equal(packed[one.run_id], gradient_of(engine, one.run_id))
        assert output.metric_sums == alone.metric_sums


def test_everything_on_the_list_is_something_torch_has() -> None:
    assert set(custom_loss._functions()) == FUNCTIONS
    assert set(custom_loss._methods()) == METHODS
    forbidden = ("rand", "drop", "bernoulli", "multinomial", "load", "save", "item", "numpy", "data")
    short = {name.rpartition(".")[2] for name in FUNCTIONS | METHODS}
    assert [name for name in short if any(word in name.replace("getitem", "") for word in forbidden)] == []
    in_place = {name for name in short if name.endswith("_")}
    assert in_place == {"and_", "not_", "or_"}, "but for Python's operators"


LOGPROBS = {"op": "placeholder", "name": "logprobs", "target": "logprobs", "args": [], "kwargs": {}}


def graph_of(*nodes: dict[str, Any], loss: str = "loss") -> loss_graph.LossGraph:
    output = {"tuple": [{"ref": loss}, {"dict": {}}]}
    every = [LOGPROBS, *nodes, {"op": "output", "name": "output", "target": "output", "args": [output]}]
    inputs = [{"name": "logprobs", "rank": 1}]
    return loss_graph.read(loss_graph.write("mine", inputs, {"format": 1, "nodes": every}))


def node(op: str, target: str, *args: Any, name: str = "loss", **kwargs: Any) -> dict[str, Any]:
    return {"op": op, "name": name, "target": target, "args": list(args), "kwargs": kwargs}


OF = {"ref": "logprobs"}
X = {"ref": "x"}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (node("call_function", "os.system", "true"), "not among"),
        (node("call_function", "torch.load", "true"), "not among"),
        (node("call_function", "torch.rand_like", OF), "not among"),
        (node("call_function", "builtins.eval", "1"), "not among"),
        (node("call_function", "operator.attrgetter", "x"), "not among"),
        (node("call_method", "__class__", OF), "not among"),
        (node("call_method", "add_", OF, 1), "not among"),
        (node("call_method", "item", OF), "not among"),
        (node("call_module", "linear", OF), "not among"),
        (node("get_attr", "weight"), "not among"),
        (node("call_function", "getattr", OF, "__class__"), "may be asked"),
        (node("call_function", "getattr", OF, "data"), "may be asked"),
        (node("call_function", "getattr", OF, []), "may be asked"),
        (node("call_method", "to", OF, {"dtype": []}), "not with this value"),
        (node("call_method", "to", OF, {"dtype": {}}), "not with this value"),
        (node("call_function", "torch.sum", OF, out=OF), "may not be given 'out'"),
        (node("call_function", "torch.nn.functional.relu", OF, inplace=True), "'inplace'"),
        (node("call_method", "to", OF, "cuda:0"), "no word"),
        (node("call_function", "torch.exp", {"ref": "later"}), "no node before it"),
        (node("call_function", "torch.exp", {"import": "os"}), "not known here"),
        (node("call_function", "operator.getitem", OF, OF), "torch.where"),
        (node("call_function", "torch.zeros", {"tuple": [2]}), "does not depend on logprobs"),
        (node("call_function", "torch.sum", 2**63), "too large"),
        (node("call_method", "sum", [[[[[[[[OF]]]]]]]]), "nested too deeply"),
    ],
)
def test_what_is_not_allowed_is_refused_when_the_loss_is_created(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        graph_of(bad)


@pytest.mark.parametrize(
    "nodes",
    [
        [node("call_method", "expand", {"ref": "one"}, 10**12)],
        [node("call_method", "repeat", {"ref": "one"}, 10**10)],
        [
            node(
                "call_function",
                "torch.zeros",
                {"tuple": [10**6, 10**6]},
                device={"device": "cpu"},
                name="big",
            )
        ],
        [node("call_function", "torch.arange", 10**15, name="big")],
        [node("call_function", "operator.pow", 9, 9**9, name="big")],
        [node("call_function", "operator.mul", 2**62, 4, name="big")],
        [node("call_function", "torch.nn.functional.pad", {"ref": "one"}, {"tuple": [0, 10**12]})],
        [
            node("call_function", "torch.outer", {"ref": "one"}, {"ref": "one"}, name="a"),
            node("call_function", "torch.outer", {"ref": "b"}, {"ref": "b"}, name="c"),
        ],
    ],
    ids=lambda nodes: nodes[0]["target"],
)
def test_what_would_fill_memory_is_refused_before_it_does(nodes: list[dict[str, Any]]) -> None:
    one = node("call_method", "unsqueeze", OF, 0, name="one")
    if len(nodes) == 2:
        one = node("call_method", "flatten", OF, name="one")
        nodes.insert(1, node("call_method", "flatten", {"ref": "a"}, name="b"))
    graph = graph_of(one, *nodes, node("call_method", "sum", OF, name="the_sum"), loss="the_sum")
    with pytest.raises(InvalidInput, match=r"takes more|too large|node"):
        custom_loss.check(CustomInput(graph, ((),)), np.array([100]), np.array([0]))


@pytest.mark.parametrize(
    "bad",
    [
        node("call_method", "reshape", OF, 5),
        node("call_method", "exp", OF),  # no scalar
        node("call_function", "torch.argmax", OF),  # no gradient
        node("call_function", "operator.matmul", OF, 3),
        node("call_function", "math.exp", OF),
        node("call_method", "sum", OF, dim=7),
    ],
    ids=lambda n: n["target"],
)
def test_a_loss_that_cannot_be_computed_is_told_so_before_its_pass(bad: dict[str, Any]) -> None:
    graph = graph_of(bad)
    with pytest.raises(InvalidInput, match="custom loss mine"):
        custom_loss.check(CustomInput(graph, ((),)), np.array([4]), np.array([0]))


def test_a_slope_of_zeros_is_one_too() -> None:
    graph = graph_of(
        node("call_method", "floor", OF, name="steps"), node("call_method", "sum", {"ref": "steps"})
    )
    given = CustomInput(graph, ((),))
    custom_loss.check(given, np.array([4]), np.array([0]))
    loss, slope, _ = custom_loss.evaluate(given, 0, np.full(4, -1.5, np.float32))
    assert loss == -8.0
    np.testing.assert_array_equal(slope, np.zeros(4, np.float32))


def test_many_operations_on_many_datums_are_refused() -> None:
    nodes = [node("call_method", "exp", OF, name=f"n{i}") for i in range(200)]
    graph = graph_of(*nodes, node("call_method", "sum", {"ref": "n1"}))
    with pytest.raises(InvalidInput, match="at most 326 datums"):
        custom_loss.check(CustomInput(graph, ((),) * 400), np.full(400, 4), np.zeros(400, np.int64))


@pytest.mark.parametrize("many", ["products", "reductions", "datums", "datums whose values are read"])
def test_what_would_keep_the_engine_for_long_is_refused(many: str) -> None:
    """However small what each operation leaves."""
    square = node("call_function", "torch.full", {"tuple": [1024, 1024]}, 0.5, name="x")
    read = node("call_function", "torch.gather", OF, 0, {"ref": "index"}, name="read")
    index = node("call_function", "torch.full", {"tuple": [1]}, 0, dtype={"dtype": "int64"}, name="index")
    nodes, datums = {
        "products": ([node("call_method", "mm", X, X, name=f"n{i}") for i in range(30)], 1),
        "reductions": ([node("call_method", "amax", X, name=f"n{i}") for i in range(300)], 1),
        "datums": ([node("call_method", "mm", X, X, name="n")], 20),
        "datums whose values are read": ([index, read, node("call_method", "mm", X, X, name="n")], 20),
    }[many]
    graph = graph_of(square, *nodes, node("call_method", "sum", OF, name="the_sum"), loss="the_sum")
    assert graph.reads_values == many.endswith("read")
    given = CustomInput(graph, ((),) * datums)
    with pytest.raises(InvalidInput, match="send fewer datums"):
        custom_loss.check(given, np.full(datums, 4), np.zeros(datums, np.int64))
    fewer = graph_of(square, *nodes[:3], node("call_method", "sum", OF, name="the_sum"), loss="the_sum")
    custom_loss.check(CustomInput(fewer, ((),) * 2), np.full(2, 4), np.zeros(2, np.int64))


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's about forms that nobody writes
def test_no_graph_does_more_than_be_refused() -> None:
    """Graphs of the list's operations with arguments that fit or do not, and JSON of any form."""
    draw = random.Random(5)
    names = sorted(FUNCTIONS | {f"method {m}" for m in METHODS})
    computed = 0
    for _ in range(3000):
        nodes = []
        for number in range(draw.randint(1, 4)):
            known = ["logprobs", *(n["name"] for n in nodes)]
            name = draw.choice(names)
            op = "call_method" if name.startswith("method ") else "call_function"
            args = [_argument(draw, known) for _ in range(draw.choice([0, 0, 0, 1, 1, 2, 3]))]
            if draw.random() < 0.9:
                args.insert(0, {"ref": draw.choice(known)})
            nodes.append(node(op, name.removeprefix("method "), *args, name=f"n{number}"))
        nodes.append(node("call_method", "sum", {"ref": nodes[-1]["name"]}))
        try:
            graph = graph_of(*nodes)
            given = CustomInput(graph, ((),))
            custom_loss.check(given, np.array([5]), np.array([0]))
        except InvalidInput:
            continue
        custom_loss.evaluate(given, 0, -np.linspace(0.1, 3, 5, dtype=np.float32))
        computed += 1
    assert computed > 100, "hardly any graph could be computed: this shows nothing"


def _argument(draw: random.Random, known: list[str]) -> Any:
    return draw.choice(
        [
            {"ref": draw.choice(known)},
            draw.choice([0, 1, -1, 2, 0.5, True, None, 10**9, {"float": "nan"}]),
            {"tuple": [draw.randint(-1, 5)]},
            [{"ref": draw.choice(known)}, 1],
            {"slice": [None, draw.randint(-2, 9), None]},
            {"dtype": draw.choice(["int64", "float64", "bool"])},
        ]
    )


@pytest.mark.parametrize(
    "graph",
    [
        *(None, [], {}, {"format": 2}, {"format": 1, "nodes": [1, 2]}, {"format": 1, "nodes": [{}, {}]}),
        {"format": 1, "nodes": [LOGPROBS, {**LOGPROBS, "op": "output", "name": "o", "args": [1, 2]}]},
    ],
)
def test_what_is_no_graph_is_refused(graph: Any) -> None:
    with pytest.raises(InvalidInput):
        loss_graph.write("x", [{"name": "logprobs", "rank": 1}], graph)
