"""A base of which every rank holds a part of every layer, gathered when the layer runs (PyTorch's FSDP2).

The embeddings, the norm after the last layer and the output embedding are whole on every rank.
"""

from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

from tinsmith_worker.adapters import Kind
from tinsmith_worker.attention import CausalSequences
from tinsmith_worker.lora import Deltas
from tinsmith_worker.model import Base, decoder_layers
from tinsmith_worker.parallel.group import Group, all_or_none
from tinsmith_worker.stream import Stream

IDLE_ROWS = 64


def shard(model: Any, group: Group, *, offload: bool = False) -> Any:
    """Cut every decoder layer of a transformers model among the ranks; all call this with the same model.
    `offload`: the parts are kept in the hosts' memory, and copied to the GPUs when they are gathered."""
    policy = CPUOffloadPolicy(pin_memory=group.device.type == "cuda") if offload else OffloadPolicy()
    mesh = init_device_mesh(group.device.type, (group.ranks,))
    decoder = model.base_model
    whole = set(model.parameters())
    for _, layer in decoder_layers(decoder, model.config.get_text_config()):
        whole -= set(layer.parameters())
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    # With nothing of its own: it lets the layers know of each other, and be gathered ahead.
    fully_shard(decoder, mesh=mesh, ignored_params=whole, offload_policy=policy)
    return model


class ShardedBase(Base):
    """A Base whose layers are gathered when they run. All ranks make it together. Training passes all ranks
    make at once; when a sampler of the leader makes one, the others are told to accompany it."""

    def __init__(self, model: Any, group: Group, *, tokenizer: str = "") -> None:
        self._group = group
        super().__init__(model, tokenizer=tokenizer)
        self.weights_stay = False

    def forward(
        self, stream: Stream, acting: dict[Kind, Deltas] | None = None, *, only_forward: bool = False
    ) -> torch.Tensor:
        if isinstance(stream.attention, CausalSequences):
            return super().forward(stream, acting, only_forward=only_forward)
        self._group.tell("accompany")
        with all_or_none():
            return super().forward(stream, acting, only_forward=only_forward)

    def accompany(self, *, train: bool) -> None:
        """A pass over nothing that counts, so that others can gather the layers for theirs."""
        rows_T = torch.arange(IDLE_ROWS, device=self.device)
        attention = CausalSequences(np.array([IDLE_ROWS]), is_deterministic=self.is_deterministic)
        with torch.set_grad_enabled(train):
            hidden_TD = self.forward(Stream(torch.zeros_like(rows_T), rows_T, (), attention))
        if train:
            self.backward(hidden_TD, torch.zeros_like(hidden_TD))
