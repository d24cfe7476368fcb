"""A custom loss as plain data: the graph that clients trace of a function, and what it may use.

Nothing of it is ever executed as code. A worker walks over the nodes and calls operations of its own, which
it knows by these names (`tinsmith_worker.custom_loss`). No torch is needed here: what can be refused without
computing is refused when the loss is created.
"""

import functools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tinsmith.errors import InvalidInput

LOSS = "custom"
"""The loss_fn that computes with one; its setting `loss_id` says which."""

MAX_NODES = 512
MAX_INPUTS = 16
_MAX_PARTS = 8192  # of all arguments together
_MAX_DEPTH = 6
_MAX_TEXT = 200

_INPUT_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")
_METRIC_NAME = re.compile(r"custom/[a-z0-9_./-]{1,64}:(sum|mean)")


def _words(text: str) -> list[str]:
    return text.split()


# By element, or along a dimension: no operation here draws random numbers, changes a tensor in place, looks
# at a file or another tenant's tensor, or returns anything but tensors and numbers.
_BOTH = _words(
    """
    abs absolute acos acosh add addcdiv addcmul all amax amin any arccos arcsin arctan argmax argmin
    argsort asin asinh atan atan2 atanh broadcast_to ceil chunk clamp clamp_max clamp_min clip clone
    copysign cos cosh count_nonzero cummax cummin cumprod cumsum deg2rad detach diagonal diff digamma
    div divide dot eq erf erfc exp exp2 expm1 fix flatten flip floor floor_divide fmax fmin fmod frac
    gather ge gt heaviside hypot index_select isfinite isinf isnan le lerp less lgamma log log10 log1p
    log2 log_softmax logaddexp logaddexp2 logcumsumexp logical_and logical_not logical_or logical_xor
    logit logsumexp lt masked_fill matmul max maximum mean min minimum mm movedim mul multiply mv
    nan_to_num nanmean nansum narrow ne neg negative norm numel outer permute positive pow prod rad2deg
    ravel reciprocal relu remainder reshape roll round rsqrt select sgn sigmoid sign sin sinc sinh
    softmax sort split sqrt square squeeze std sub subtract sum swapaxes t take_along_dim tan tanh topk
    transpose tril triu true_divide trunc unbind unsqueeze var xlogy
    """
)
_FUNCTIONS = _words(
    """
    arange cat concat cosine_similarity full full_like linspace ones ones_like repeat_interleave rsub
    stack tile where zeros zeros_like
    """
)
_METHODS = _words(
    """
    bool contiguous dim double expand expand_as float int long ndimension new_full new_ones new_zeros
    repeat reshape_as size to type_as view view_as where
    """
)
_FUNCTIONAL = _words(
    """
    binary_cross_entropy_with_logits cosine_similarity elu gelu hardtanh huber_loss kl_div l1_loss
    leaky_relu log_softmax logsigmoid mse_loss normalize pad relu sigmoid silu smooth_l1_loss softmax
    softplus tanh
    """
)
_SPECIAL = _words(
    """
    entr erf erfc exp2 expit expm1 log1p log_softmax logit logsumexp softmax xlog1py xlogy
    """
)
_LINALG = ("norm", "vector_norm")
_OPERATORS = _words(
    """
    abs add and_ eq floordiv ge getitem gt invert le lt matmul mod mul ne neg not_ or_ pos pow sub
    truediv xor
    """
)
_MATH = _words(
    """
    ceil exp floor log log10 log1p log2 pow sqrt tanh
    """
)

FUNCTIONS = frozenset(
    [f"torch.{name}" for name in (*_BOTH, *_FUNCTIONS)]
    + [f"torch.nn.functional.{name}" for name in _FUNCTIONAL]
    + [f"torch.special.{name}" for name in _SPECIAL]
    + [f"torch.linalg.{name}" for name in _LINALG]
    + [f"operator.{name}" for name in _OPERATORS]
    + [f"math.{name}" for name in _MATH]
)
METHODS = frozenset((*_BOTH, *_METHODS))
ATTRIBUTES = frozenset({"shape", "ndim", "dtype", "device", "T", "mT", "values", "indices"})

# As torch.fx names what is written in C.
_ALIASES = {
    **{f"torch._C._nn.{name}": f"torch.nn.functional.{name}" for name in _FUNCTIONAL},
    "torch._C._nn.log_sigmoid": "torch.nn.functional.logsigmoid",
    **{f"torch._C._special.special_{name}": f"torch.special.{name}" for name in _SPECIAL},
    **{f"torch._C._linalg.linalg_{name}": f"torch.linalg.{name}" for name in _LINALG},
}

_KEYWORDS = frozenset(
    _words(
        """
    alpha beta correction delta descending device diagonal dim dim0 dim1 dims dtype end eps exponent
    fill_value index indices input k keepdim largest layout length log_target max max_val memory_format
    min min_val mode negative_slope neginf offset ord other output_size p pad posinf pos_weight
    reduction rounding_mode self shape shifts size sizes sorted split_size stable start step steps
    tensor tensors threshold unbiased value weight x1 x2 approximate dims_ nan base repeats
    """
    )
)
# What clients send although it was left out, and what is not meant for whoever computes.
_NO_MEANING = {"inplace": (False, None), "out": (None,), "_stacklevel": (3, 5), "size_average": (None,)}
_NO_MEANING |= {
    "reduce": (None,),
    "requires_grad": (False,),
    "pin_memory": (False, None),
    "generator": (None,),
}
_WORDS = frozenset(
    _words(
        """
    none mean sum batchmean floor trunc constant tanh fro
    """
    )
)
DTYPES = frozenset(
    _words(
        """
    float32 float64 int64 int32 bool float double long int
    """
    )
)

# Their indices say what is read, so they may not be made of logprobs: whether a loss can be computed must not
# depend on them, or one tenant's call would fail in the middle of a pass that it shares with others.
_INDEXING = frozenset({"getitem", "gather", "index_select", "take_along_dim", "repeat_interleave"})
# Whole numbers are not divided by zero, likewise.
_DIVIDING = frozenset({"floor_divide", "fmod", "remainder", "mod", "floordiv"})
# These tell of a tensor's form, not of what it holds.
_OF_FORM = frozenset(
    {"shape", "ndim", "dtype", "device", "size", "dim", "ndimension", "numel"}
    | {"zeros_like", "ones_like", "new_zeros", "new_ones"}
)


@dataclass(frozen=True)
class Ref:
    """The result of the node of this name."""

    name: str


@dataclass(frozen=True)
class Constant:
    """kind: dtype, device, layout or memory_format."""

    kind: str
    value: str


@dataclass(frozen=True)
class Node:
    """One operation. op: "function", "method" or "attribute"; args and kwargs hold numbers, words, None, Ref,
    Constant, Ellipsis, slices, and lists and tuples of those."""

    name: str
    op: str
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class LossGraph:
    """`inputs`: (name, rank) of what it is called with, `logprobs` first, known to the nodes by
    `placeholders`. `nodes` are in the order of execution. `reads_values`: whether it can be computed depends
    on more than the inputs' shapes."""

    raw: bytes
    name: str = field(compare=False)
    inputs: tuple[tuple[str, int], ...] = field(compare=False)
    placeholders: tuple[str, ...] = field(compare=False)
    nodes: tuple[Node, ...] = field(compare=False)
    loss: str = field(compare=False)
    metrics: dict[str, str] = field(compare=False)
    reads_values: bool = field(compare=False)


def write(name: str, inputs: Any, graph: Any) -> bytes:
    """What is kept of a loss, as a client sent it. InvalidInput if it would not be read."""
    try:
        raw = json.dumps({"name": name, "inputs": inputs, "graph": graph}, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise InvalidInput("the loss is no JSON: NaN and infinity are sent as texts") from None
    read(raw)
    return raw


@functools.lru_cache(maxsize=256)
def read(raw: bytes) -> LossGraph:
    """The loss of what `write` made; InvalidInput names the node that is not as it must be."""
    given = json.loads(raw)
    name, inputs = str(given["name"])[:_MAX_TEXT], _inputs(given["inputs"])
    nodes = _nodes(given["graph"])
    *body, output = nodes
    reader = _Reader(inputs)
    operations = reader.read(body)
    if output["op"] != "output":
        raise InvalidInput("the graph does not end with its output")
    loss, metrics = _output(output)
    for what, ref in (("the loss", loss), *metrics.items()):
        if ref not in reader.known:
            raise InvalidInput(f"{what} is {ref!r}, which is no node of the graph")
    made_of_logprobs, reads_values = _dependencies(reader.placeholders[0], operations)
    if loss not in made_of_logprobs:
        raise InvalidInput("the loss does not depend on logprobs: there is nothing to train")
    placeholders = tuple(reader.placeholders)
    return LossGraph(raw, name, inputs, placeholders, tuple(operations), loss, metrics, reads_values)


def _inputs(given: Any) -> tuple[tuple[str, int], ...]:
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_INPUTS:
        raise InvalidInput(f"inputs: a custom loss takes 1 to {MAX_INPUTS}, `logprobs` first")
    found = []
    for number, one in enumerate(given):
        name, rank = (one.get("name"), one.get("rank")) if isinstance(one, dict) else (None, None)
        if not isinstance(name, str) or not _INPUT_NAME.fullmatch(name):
            raise InvalidInput(f"inputs.{number}.name must be a lower-case name of letters, digits and _")
        if type(rank) is not int or not (number == 0) <= rank <= 2:
            raise InvalidInput(f"inputs.{number}.rank must be 0, 1 or 2, of logprobs 1 or 2")
        found.append((name, rank))
    if found[0][0] != "logprobs" or len({name for name, _ in found}) < len(found):
        raise InvalidInput("inputs must be `logprobs` and then names that differ")
    return tuple(found)


def _nodes(graph: Any) -> list[dict[str, Any]]:
    if not isinstance(graph, dict) or graph.get("format") != 1:
        raise InvalidInput("graph.format must be 1")
    nodes = graph.get("nodes")
    if not isinstance(nodes, list) or not 2 <= len(nodes) <= MAX_NODES:
        raise InvalidInput(f"graph.nodes must be 2 to {MAX_NODES} nodes")
    for number, node in enumerate(nodes):
        texts = [node.get(key) for key in ("op", "name", "target")] if isinstance(node, dict) else [None]
        if not all(isinstance(text, str) and len(text) <= _MAX_TEXT for text in texts):
            raise InvalidInput(f"graph.nodes.{number} must have an op, a name and a target")
        if not isinstance(node.get("args", []), list) or not isinstance(node.get("kwargs", {}), dict):
            raise InvalidInput(f"graph.nodes.{number}: args must be a list, kwargs an object")
    return nodes


class _Reader:
    """Reads nodes in their order; what comes later may name what came before."""

    def __init__(self, inputs: tuple[tuple[str, int], ...]) -> None:
        self._awaited = [name for name, _ in inputs]
        self.known: set[str] = set()
        self.placeholders: list[str] = []
        self._parts = 0

    def read(self, nodes: list[dict[str, Any]]) -> list[Node]:
        found = []
        for given in nodes:
            name, op, target = given["name"], given["op"], given["target"]
            if name in self.known:
                raise InvalidInput(f"two nodes are named {name!r}")
            if op == "placeholder":
                if not self._awaited or self._awaited.pop(0) != target:
                    raise InvalidInput(f"placeholder {target!r} is not the next of the inputs")
                self.placeholders.append(name)
            else:
                found.append(self._node(name, op, target, given.get("args", []), given.get("kwargs", {})))
            self.known.add(name)
        if self._awaited:
            raise InvalidInput(f"the graph has no placeholder {self._awaited[0]!r}")
        return found

    def _node(self, name: str, op: str, target: str, args: list[Any], kwargs: dict[str, Any]) -> Node:
        where = f"node {name!r}"
        if (op, target) == ("call_function", "getattr"):
            if len(args) != 2 or kwargs or not _is_in(args[1], ATTRIBUTES) or not _is_ref(args[0]):
                raise InvalidInput(f"{where}: of a tensor only {', '.join(sorted(ATTRIBUTES))} may be asked")
            return Node(name, "attribute", args[1], (self._arg(where, args[0]),), {})
        target = _ALIASES.get(target, target)
        if op not in ("call_function", "call_method") or target not in (
            FUNCTIONS if op == "call_function" else METHODS
        ):
            raise InvalidInput(
                f"{where}: {op} {target!r} is not among what a custom loss may use here; "
                "docs/losses.md lists it. A loss that is computed by the client may use anything"
            )
        kept = {key: value for key, value in kwargs.items() if value not in _NO_MEANING.get(key, ())}
        for key in kept:
            if key not in _KEYWORDS:
                raise InvalidInput(f"{where}: {target} may not be given {key!r}")
        return Node(
            name,
            op.removeprefix("call_"),
            target,
            tuple(self._arg(where, arg) for arg in args),
            {key: self._arg(where, value) for key, value in kept.items()},
        )

    def _arg(self, where: str, given: Any, depth: int = 0) -> Any:
        self._parts += 1
        if depth > _MAX_DEPTH or self._parts > _MAX_PARTS:
            raise InvalidInput(f"{where}: its arguments are nested too deeply, or too many")
        if given is None or isinstance(given, bool | float):
            return given
        if isinstance(given, int):
            if abs(given) >= 2**63:
                raise InvalidInput(f"{where}: a number is too large")
            return given
        if isinstance(given, str):
            if given not in _WORDS:
                raise InvalidInput(f"{where}: {given[:40]!r} is no word that is known here")
            return given
        if isinstance(given, list):
            return [self._arg(where, one, depth + 1) for one in given]
        if isinstance(given, dict) and len(given) == 1:
            return self._tagged(where, *given.items(), depth=depth)
        raise InvalidInput(f"{where}: an argument is none of the forms that are known here")

    def _tagged(self, where: str, item: tuple[str, Any], *, depth: int) -> Any:
        tag, value = item
        match tag:
            case "ref" if isinstance(value, str):
                if value not in self.known:
                    raise InvalidInput(f"{where} uses {value[:40]!r}, which is no node before it")
                return Ref(value)
            case "tuple" if isinstance(value, list):
                return tuple(self._arg(where, one, depth + 1) for one in value)
            case "slice" if isinstance(value, list) and len(value) == 3:
                return slice(*(self._arg(where, one, depth + 1) for one in value))
            case "ellipsis":
                return Ellipsis
            case "float" if value in ("inf", "-inf", "nan"):
                return float(value)
            case "dtype" if _is_in(value, DTYPES):
                return Constant("dtype", value)
            case "device":
                return Constant("device", "")  # wherever it is computed
            case "layout" if value == "strided":
                return Constant("layout", value)
            case "memory_format" if value in ("contiguous_format", "preserve_format"):
                return Constant("memory_format", value)
        raise InvalidInput(f"{where}: an argument {tag[:40]!r} is not known here, or not with this value")


def _is_ref(given: Any) -> bool:
    return isinstance(given, dict) and list(given) == ["ref"]


def _is_in(given: Any, words: frozenset[str]) -> bool:
    """Whatever `given` is, lists too."""
    return isinstance(given, str) and given in words


def _output(node: dict[str, Any]) -> tuple[str, dict[str, str]]:
    returned = node["args"][0] if len(node.get("args", [])) == 1 else None
    pair = returned.get("tuple") if isinstance(returned, dict) else returned
    if not isinstance(pair, list) or len(pair) != 2 or not _is_ref(pair[0]):
        raise InvalidInput("the output must be a tuple of the loss and its metrics")
    metrics = pair[1].get("dict") if isinstance(pair[1], dict) else None
    if not isinstance(metrics, dict) or len(metrics) > 64:
        raise InvalidInput("the output's metrics must be a dict of at most 64")
    for name, value in metrics.items():
        if not _METRIC_NAME.fullmatch(name) or not _is_ref(value):
            raise InvalidInput(f"the metric {name[:100]!r} must be named custom/…:sum or :mean and be a node")
    return str(pair[0]["ref"]), {name: str(value["ref"]) for name, value in metrics.items()}


def _dependencies(logprobs: str, nodes: list[Node]) -> tuple[set[str], bool]:
    """(which nodes are made of logprobs, whether the inputs' values decide if it can be computed)."""
    made, reads_values = {logprobs}, False
    for node in nodes:
        short = node.target.rsplit(".", 1)[-1]
        refs = list(refs_of((node.args, tuple(node.kwargs.values()))))
        if short in _INDEXING | _DIVIDING:
            others = list(refs_of((node.args[1:], tuple(node.kwargs.values()))))
            reads_values = reads_values or bool(others)
            if any(name in made for name in others):
                what = "an index or a mask" if short in _INDEXING else "a divisor of a rest"
                raise InvalidInput(
                    f"node {node.name!r}: {short} uses as {what} what is made of logprobs, which is not "
                    "possible here: use torch.where instead"
                )
        if short not in _OF_FORM and any(name in made for name in refs):
            made.add(node.name)
    return made, reads_values


def refs_of(value: Any) -> Iterator[str]:
    """The names of all nodes that an argument mentions."""
    if isinstance(value, Ref):
        yield value.name
    elif isinstance(value, list | tuple):
        for one in value:
            yield from refs_of(one)
    elif isinstance(value, slice):
        yield from refs_of((value.start, value.stop, value.step))
