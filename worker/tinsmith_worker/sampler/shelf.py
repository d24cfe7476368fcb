"""The weights that can be sampled: all of them in host memory, those that are used on the device.

On a CPU both are one.
"""

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch

from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import AdapterState, LoraSpec
from tinsmith_worker.model import Base


@dataclass
class _Held:
    spec: LoraSpec
    on_host: torch.Tensor | None  # [P] in the base's dtype; None until it had to leave the device
    adapter: Adapter | None = None


class Shelf:
    """At most `device_bytes` of adapters on the device, except that one always may be; those that were used
    least recently leave first. `enter` and `leave` hear who comes and goes."""

    def __init__(
        self,
        base: Base,
        device_bytes: int,
        *,
        enter: Callable[[Adapter], None],
        leave: Callable[[Adapter], None],
        most: int,
    ) -> None:
        """`most`: adapters on the device at once."""
        self._base = base
        self._device_bytes = device_bytes
        self._enter, self._leave, self._most = enter, leave, most
        self._held: dict[str, _Held] = {}  # the least recently used first

    def holds(self, sampler_id: str) -> bool:
        return sampler_id in self._held

    def hold(self, sampler_id: str, weights: AdapterState | Adapter, in_use: Collection[str] = ()) -> None:
        """Keep a frozen copy; of an Adapter nothing is copied, it is a copy already, if there is room for it
        beside those that are `in_use`."""
        if sampler_id in self._held:
            return
        if not isinstance(weights, Adapter):
            read = self._base.adapter_of(weights, device=torch.device("cpu"))
            on_host = read.compute.pin_memory() if self._base.device.type == "cuda" else read.compute
            self._held[sampler_id] = _Held(weights.spec, on_host)
        elif self._make_room(weights.compute.nbytes, keep=in_use) or not in_use:
            self._held[sampler_id] = _Held(weights.spec, None, weights)
            self._enter(weights)
        else:
            self._held[sampler_id] = _Held(weights.spec, _on_host(weights))

    def release(self, sampler_id: str) -> None:
        held = self._held.pop(sampler_id, None)
        if held and held.adapter:
            self._leave(held.adapter)

    def bring(self, sampler_id: str, in_use: Collection[str]) -> Adapter | None:
        """The adapter on the device; None if there is no room beside those that are `in_use`."""
        held = self._held[sampler_id] = self._held.pop(sampler_id)  # the most recently used, now
        if held.adapter is None:
            assert held.on_host is not None
            if not self._make_room(held.on_host.nbytes, keep={*in_use, sampler_id}) and in_use:
                return None
            compute = held.on_host.to(self._base.device, non_blocking=True)
            held.adapter = self._base.blank_adapter(held.spec, frozen=compute)
            self._enter(held.adapter)
        return held.adapter

    @functools.cached_property
    def nothing(self) -> Adapter:
        """What adds nothing to the base, as a fresh run's adapter."""
        made = Adapter(LoraSpec(1, 0), self._base.sites, device=self._base.device, dtype=self._base.dtype)
        made.initialise()
        return made

    def _make_room(self, size: int, keep: Collection[str]) -> bool:
        """For one more of so many bytes. Those to `keep` stay, whatever that means for it."""
        there = {name: h.adapter.compute.nbytes for name, h in self._held.items() if h.adapter}
        total, count = sum(there.values()) + size, len(there) + 1
        for name, its_size in there.items():
            if total <= self._device_bytes and count <= self._most:
                break
            if name in keep:
                continue
            self._put_away(self._held[name])
            total, count = total - its_size, count - 1
        return total <= self._device_bytes and count <= self._most

    def _put_away(self, held: _Held) -> None:
        assert held.adapter is not None
        if held.on_host is None:
            held.on_host = _on_host(held.adapter)
        self._leave(held.adapter)
        held.adapter = None


def _on_host(adapter: Adapter) -> torch.Tensor:
    compute = adapter.compute
    return torch.empty(compute.shape, dtype=compute.dtype, pin_memory=compute.is_cuda).copy_(compute)
