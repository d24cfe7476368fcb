"""An adapter as files: PEFT's, readable by anyone, and beside them what exact continuation needs. No torch.

adapter_config.json, adapter_model.safetensors   as PEFT saves them; stacked, what experts have (`export`)
config.json, model.safetensors                   instead, of a run that trains all weights: transformers' own,
                                                 in numbered files with an index where they are large
optimizer.safetensors                            moment1, moment2, gradient [P], step [1]; where there are any
tinsmith.json                                    the spec, and where every tensor lies in the flat buffers
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from tinsmith.errors import InvalidInput
from tinsmith.wire.batch import Float32
from tinsmith_worker.contract import LORA_ALPHA, AdapterState, LoraSpec

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MODEL_CONFIG = "config.json"
MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"
OPTIMIZER = "optimizer.safetensors"
SPEC = "tinsmith.json"

Body = bytes | memoryview  # as an object store takes it, of which an engine must not know
_FORMAT = 1
_FOR_TORCH = {"format": "pt"}  # transformers and PEFT want to be told
# Of a whole model's weights, what goes into one file: some stores take no larger ones at once.
FILE_BYTES = 4 << 30
_SPOILED = (ValueError, TypeError, OverflowError, RecursionError, MemoryError, safetensors.SafetensorError)
_MAX_GAP = 1024  # elements between two tensors, where an engine aligns them
Layout = tuple[tuple[str, int, tuple[int, ...]], ...]
Values = TypeVar("Values", bound="_Values")
File = TypeVar("File")


class _Values(Protocol):
    @property
    def nbytes(self) -> int: ...


def write(state: AdapterState, base_model: str, *, file_bytes: int = FILE_BYTES) -> dict[str, Body]:
    """The files of `state`, by name. `read` gives the same bits back."""
    weights = {name: _at(state.weights, offset, shape) for name, offset, shape in state.tensors}
    files = {
        **_readable(state, weights, base_model, file_bytes),
        SPEC: spec_file(state, state.weights.size),
    }
    optimizer = {
        name: np.ascontiguousarray(flat)
        for name in ("moment1", "moment2", "gradient")
        if (flat := getattr(state, name)) is not None
    }
    if optimizer or state.step:
        files[OPTIMIZER] = _safetensors({"step": np.array([state.step], np.int64)} | optimizer)
    return files


def spec_file(state: AdapterState, size: int) -> bytes:
    """`size`: of its flat arrays."""
    return _json({"format": _FORMAT, "spec": vars(state.spec), "size": size, "tensors": state.tensors})


def export(state: AdapterState, base_model: str) -> dict[str, Body]:
    """As `write`, without what only this service has a use for. Of a mixture's experts, each has matrices
    under its own number, those that all share too, as others expect them."""
    weights: dict[str, Float32] = {}
    for name, offset, shape in state.tensors:
        values = _at(state.weights, offset, shape)
        if len(shape) < 3:
            weights[name] = values
            continue
        for number in range(_experts(state)):
            of_one = name.replace(".experts.", f".experts.{number}.")
            weights[of_one] = np.ascontiguousarray(values[min(number, shape[0] - 1)])
    return _readable(state, weights, base_model, FILE_BYTES)


def _readable(
    state: AdapterState, weights: dict[str, Float32], base_model: str, file_bytes: int
) -> dict[str, Body]:
    """The files that others load."""
    if state.spec.method == "full":
        return {MODEL_CONFIG: state.config.encode(), **in_files(weights, file_bytes, _safetensors, bytes)}
    config = _peft_config(state, base_model)
    if state.config:
        config = json.loads(state.config) | {"base_model_name_or_path": base_model}
    return {CONFIG: _json(config), WEIGHTS: _safetensors(weights, _FOR_TORCH)}


def in_files(
    weights: Mapping[str, Values],
    file_bytes: int,
    save: Callable[[Mapping[str, Values], Mapping[str, str]], File],
    as_file: Callable[[bytes], File],
) -> dict[str, File]:
    """A whole model's weights as transformers looks for them: one file, or several and their index. `save`:
    what makes a file of tensors, `as_file` one of bytes."""
    parts: list[dict[str, Values]] = [{}]
    room = file_bytes
    for name, values in weights.items():
        if values.nbytes > room and parts[-1]:
            parts.append({})
            room = file_bytes
        parts[-1][name] = values
        room -= values.nbytes
    if len(parts) == 1:
        return {MODEL: save(weights, _FOR_TORCH)}
    files: dict[str, File] = {}
    place: dict[str, str] = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        files[file] = save(part, _FOR_TORCH)
        place |= dict.fromkeys(part, file)
    total = sum(values.nbytes for values in weights.values())
    return {INDEX: as_file(_json({"metadata": {"total_size": total}, "weight_map": place})), **files}


def _safetensors(
    tensors: Mapping[str, "np.ndarray[Any, Any]"], metadata: Mapping[str, str] | None = None
) -> memoryview:
    """A file as the library's `save` makes it, but without Python's lock: that one holds it while it copies
    gigabytes, and nobody launches a kernel meanwhile. Wider types have to come first: all are aligned."""
    first = header(tensors, metadata)
    body = np.empty(len(first) + sum(values.nbytes for values in tensors.values()), np.uint8)
    parts = [np.frombuffer(first, np.uint8), *tensors.values()]
    start = 0
    for part in parts:
        body[start : start + part.nbytes] = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        start += part.nbytes
    return body.data


def header(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None) -> bytes:
    """What such a file begins with; `tensors` are arrays, or what says of itself what they would."""
    about: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + values.nbytes
        dtype = {"float32": "F32", "int64": "I64"}[values.dtype.name]
        about[name] = {"dtype": dtype, "shape": values.shape, "data_offsets": (start, end)}
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return np.array([len(text)], "<u8").tobytes() + text


def _load(file: Body) -> dict[str, Any]:
    return safetensors_numpy.load(bytes(file))


def _experts(state: AdapterState) -> int:
    return max(shape[0] for _, _, shape in state.tensors if len(shape) == 3)


def read(files: Mapping[str, Body]) -> AdapterState:
    """The adapter in `files`; InvalidInput if one is missing or is not what `write` makes."""
    with _spoiled_told():
        return _read(files)


@contextlib.contextmanager
def _spoiled_told() -> Iterator[None]:
    try:
        yield
    except InvalidInput:
        raise
    except KeyError as missing:
        raise InvalidInput(f"this is no adapter checkpoint: {missing} is missing") from None
    except _SPOILED as error:
        raise InvalidInput(f"this is no adapter checkpoint: {error}") from None


def read_spec(body: Body) -> tuple[LoraSpec, Layout, int]:
    """What the file SPEC says: the spec, and where every tensor lies in flat arrays of which size.
    InvalidInput if it is none."""
    with _spoiled_told():
        about = json.loads(bytes(body))
        expect(about["format"] == _FORMAT, f"{SPEC} is of format {about['format']}, not {_FORMAT}")
        spec = LoraSpec(**about["spec"])
        _check_spec(spec)
        tensors = tuple(
            (str(name), _integer(offset), tuple(map(_integer, shape)))
            for name, offset, shape in about["tensors"]
        )
        size = _integer(about["size"])
        _check_layout(tensors, size)
        return spec, tensors, size


def _read(files: Mapping[str, Body]) -> AdapterState:
    spec, tensors, size = read_spec(files[SPEC])
    given = _weights_in(files, spec)
    # All of it before the buffer is made: what the file really holds bounds what is allocated.
    for name, _, shape in tensors:
        expect(
            given[name].shape == shape and given[name].dtype == np.float32, f"{name} is not float32 {shape}"
        )
    expect(len(given) == len(tensors), f"its files hold tensors that {SPEC} does not name")
    weights = np.zeros(size, np.float32)
    for name, offset, shape in tensors:
        _at(weights, offset, shape)[...] = given[name]
    optimizer = _load(files[OPTIMIZER]) if OPTIMIZER in files else {}
    for name, values in optimizer.items():
        expected = ((1,), "int64") if name == "step" else ((size,), "float32")
        expect(
            (values.shape, values.dtype.name) == expected,
            f"{name} is not {expected[1]} {expected[0]}",
        )
    step = int(optimizer["step"][0]) if optimizer else 0
    expect(step >= 0, f"its step is {step}")
    return AdapterState(
        spec=spec,
        tensors=tensors,
        weights=weights,
        moment1=optimizer.get("moment1"),
        moment2=optimizer.get("moment2"),
        gradient=optimizer.get("gradient"),
        step=step,
    )


def _weights_in(files: Mapping[str, Body], spec: LoraSpec) -> dict[str, Float32]:
    if spec.method != "full":
        return _load(files[WEIGHTS])
    names = {MODEL}
    if INDEX in files:
        names = set(json.loads(bytes(files[INDEX]))["weight_map"].values())
    return {name: values for file in names for name, values in _load(files[file]).items()}


def _check_spec(spec: LoraSpec) -> None:
    expect(isinstance(spec.method, str) and isinstance(spec.settings, dict), "it names no method")
    expect((_integer(spec.rank) > 0) == (spec.method == "lora"), f"its rank is {spec.rank}")
    _integer(spec.seed)
    for name in ("train_attn", "train_mlp", "train_unembed"):
        expect(isinstance(getattr(spec, name), bool), f"{name} is neither true nor false")


def _check_layout(tensors: Layout, size: int) -> None:
    """One after another within `size`, which is what gets allocated: hardly more than they need."""
    end = 0
    for name, offset, shape in tensors:
        expect(
            end <= offset <= end + _MAX_GAP and all(n > 0 for n in shape),
            f"{name} lies at {offset}, the tensor before it ends at {end}",
        )
        end = offset + math.prod(shape)
    expect(end <= size <= end + _MAX_GAP, f"its tensors end at {end}, its size is {size}")
    expect(len({name for name, _, _ in tensors}) == len(tensors), "it names a tensor twice")


def _integer(value: object) -> int:
    """A JSON integer; not true, not 1.0, not "1"."""
    if type(value) is not int:
        raise InvalidInput(f"this is no adapter checkpoint: {str(value)[:40]!r} is no integer")
    return value


def expect(condition: bool, otherwise: str) -> None:
    """InvalidInput with what is wrong with a checkpoint."""
    if not condition:
        raise InvalidInput(f"this is no adapter checkpoint: {otherwise}")


def _at(flat: Float32, offset: int, shape: tuple[int, ...]) -> Float32:
    return flat[offset : offset + math.prod(shape)].reshape(shape)


def _peft_config(state: AdapterState, base_model: str) -> dict[str, Any]:
    modules = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name, _, _ in state.tensors}
    of_experts = {
        rf"experts\.\d+\.{name.split('.')[-3]}": shape[1]
        for name, _, shape in state.tensors
        if len(shape) == 3 and ".lora_A." in name
    }
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": state.spec.rank,
        "lora_alpha": LORA_ALPHA,
        "rank_pattern": of_experts,
        "lora_dropout": 0.0,
        "target_modules": sorted({module.rsplit(".", 1)[-1] for module in modules}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2).encode()
