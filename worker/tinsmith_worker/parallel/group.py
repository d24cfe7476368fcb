"""The ranks of one worker as one: what the leader tells the others, and the tensors they exchange.

Words go over gloo between the hosts, tensors over what their device has (NCCL, or gloo on a CPU). Nothing
is pickled. A rank that fails in between is the end of its process: the others would wait for it for ever.
Whoever started the group then ends it, and the runs are restored elsewhere from their snapshots and
replayed.
"""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from tinsmith.wire import loss_graph
from tinsmith.wire.batch import CustomInput, TrainInput
from tinsmith.wire.loss_graph import LossGraph
from tinsmith_worker.activations import Keeping
from tinsmith_worker.contract import AdamParams, LoraSpec, MuonParams, Work
from tinsmith_worker.parallel.launch import Place

log = logging.getLogger("tinsmith.worker")

# PyTorch 2.13 has new names for them.
_GATHER: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_SUM_AND_DEAL: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
# How long a leader may have nothing to say. Its end is noticed at once: the connection closes.
_FOR_EVER = timedelta(days=3650)
_ALIGNMENT = 8
# What travels as itself; so does a LossGraph.
_TRAVELLERS = (AdamParams, MuonParams, CustomInput, Keeping, LoraSpec, TrainInput, Work)
_KINDS: dict[str, Any] = {kind.__name__: kind for kind in _TRAVELLERS}


class Group:
    """This process as one of its group. All is called on one thread, by all ranks in one order."""

    def __init__(self, place: Place, device: torch.device) -> None:
        """Waits until all ranks are there."""
        self.rank, self.ranks = place.rank, place.ranks
        self.device = device
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            init_method=place.meeting,
            rank=place.rank,
            world_size=place.ranks,
        )
        self._words: Any = dist.new_group(backend="gloo", timeout=_FOR_EVER)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def tell(self, verb: str, *given: Any) -> None:
        """Of the leader: what all do next. `given` is made of plain data, arrays and what is in `_KINDS`.
        Followers may call it, which does nothing: they are doing it already."""
        if not self.leads:
            return
        header, body = _pack([verb, list(given)])
        with all_or_none():
            dist.broadcast(torch.tensor([header, len(body)]), 0, group=self._words)
            dist.broadcast(torch.from_numpy(body), 0, group=self._words)

    def hear(self) -> tuple[str, list[Any]]:
        """Of a follower: what the leader told, waiting for it."""
        lengths = torch.zeros(2, dtype=torch.int64)
        try:
            dist.broadcast(lengths, 0, group=self._words)
        except RuntimeError:
            log.error("the leader of rank %d is gone: it ends as well", self.rank)
            os._exit(1)
        with all_or_none():
            header, total = lengths.tolist()
            body = torch.empty(total, dtype=torch.uint8)
            dist.broadcast(body, 0, group=self._words)
        verb, given = _unpack(header, body.numpy())
        return verb, given

    def sum_up(self, flat: torch.Tensor) -> None:
        """Replace it on every rank by the sum over all: the same bits everywhere."""
        with all_or_none():
            dist.all_reduce(flat)

    def share(self, flat: torch.Tensor) -> None:
        """Replace it on the followers by the leader's."""
        with all_or_none():
            dist.broadcast(flat, 0)

    def gather(self, whole: torch.Tensor, rows: torch.Tensor) -> None:
        """Replace `whole` on every rank by all ranks' `rows`, in their order."""
        with all_or_none():
            _GATHER(whole, rows)

    def sum_and_deal(self, rows: torch.Tensor, whole: torch.Tensor) -> None:
        """Replace `rows` by the rank's own of the sum of all ranks' `whole`."""
        with all_or_none():
            _SUM_AND_DEAL(rows, whole)

    def deal(self, rows: torch.Tensor, whole: torch.Tensor | None) -> None:
        """Replace `rows`, in host memory and of one shape on every rank, by the rank's own of the leader's
        `whole`, behind whose last one there are zeros."""
        parts = None
        if whole is not None:
            filled = whole.new_zeros((self.ranks * len(rows), *rows.shape[1:]))
            filled[: len(whole)] = whole
            parts = list(filled.chunk(self.ranks))
        with all_or_none():
            dist.scatter(rows, parts, 0, group=self._words)

    def least(self, number: int) -> int:
        """The least of all ranks' numbers."""
        found = torch.tensor([number])
        with all_or_none():
            dist.all_reduce(found, dist.ReduceOp.MIN, group=self._words)
        return int(found)

    def collect(self, mine: Any) -> list[Any]:
        """On the leader what every rank gave, by rank; elsewhere nothing. `mine`: as `tell` takes it."""
        with all_or_none():
            if not self.leads:
                header, body = _pack(mine)
                dist.send(torch.tensor([header, len(body)]), 0, group=self._words)
                dist.send(torch.from_numpy(body), 0, group=self._words)
                return []
            found = [mine]
            for rank in range(1, self.ranks):
                lengths = torch.zeros(2, dtype=torch.int64)
                dist.recv(lengths, rank, group=self._words)
                header, total = lengths.tolist()
                received = torch.empty(total, dtype=torch.uint8)
                dist.recv(received, rank, group=self._words)
                found.append(_unpack(header, received.numpy()))
        return found

    def another_channel(self) -> "Channel":
        """For threads of their own. All ranks make it together."""
        return Channel(dist.new_group(backend="gloo", timeout=_FOR_EVER))

    def close(self) -> None:
        dist.destroy_process_group()


class Channel:
    """Tensors of the hosts' memory from one rank to another, on one thread of each."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        with all_or_none():
            dist.send(tensor, rank, group=self._group)

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        """Into `tensor`."""
        with all_or_none():
            dist.recv(tensor, rank, group=self._group)


@contextlib.contextmanager
def all_or_none() -> Iterator[None]:
    """What fails in here would leave the other ranks waiting: it is the end of this process."""
    try:
        yield
    except Exception:
        log.exception("this rank fails in what all ranks do together: it ends, and the group with it")
        logging.shutdown()
        os._exit(1)


def _pack(value: Any) -> tuple[int, npt.NDArray[np.uint8]]:
    """`value` as bytes: so many of JSON, and then the arrays that are in it."""
    arrays: list[npt.NDArray[Any]] = []
    header = np.frombuffer(json.dumps(_without_arrays(value, arrays)).encode(), np.uint8)
    parts = [header, *(array.reshape(-1).view(np.uint8) for array in arrays)]
    return len(header), np.concatenate([np.pad(part, (0, _up(len(part)) - len(part))) for part in parts])


def _unpack(header: int, body: npt.NDArray[np.uint8]) -> Any:
    return _with_arrays(json.loads(body[:header].tobytes()), body, [_up(header)])


def _without_arrays(value: Any, arrays: list[npt.NDArray[Any]]) -> Any:
    """`value` as JSON has it, every array in it replaced by its dtype and shape, and laid aside."""
    if isinstance(value, np.ndarray):
        arrays.append(np.ascontiguousarray(value))
        return {"dtype": value.dtype.str, "shape": value.shape}
    if isinstance(value, dict):
        return {"items": {key: _without_arrays(one, arrays) for key, one in value.items()}}
    if isinstance(value, LossGraph):
        return {"graph": value.raw.decode()}
    if dataclasses.is_dataclass(value):
        kind = type(value).__name__
        assert kind in _KINDS, kind
        given = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"kind": kind, **_without_arrays(given, arrays)}
    if isinstance(value, list | tuple):
        return [_without_arrays(one, arrays) for one in value]
    return value


def _with_arrays(value: Any, body: npt.NDArray[np.uint8], at: list[int]) -> Any:
    """`at`: where in `body` the next array lies."""
    if isinstance(value, list):
        return [_with_arrays(one, body, at) for one in value]
    if not isinstance(value, dict):
        return value
    if "items" in value:
        items = {key: _with_arrays(one, body, at) for key, one in value["items"].items()}
        return _KINDS[value["kind"]](**items) if "kind" in value else items
    if "graph" in value:
        return loss_graph.read(value["graph"].encode())
    dtype, shape = np.dtype(value["dtype"]), tuple(value["shape"])
    start = at[0]
    stop = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    at[0] = _up(stop)
    return body[start:stop].view(dtype).reshape(shape)


def _up(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT
