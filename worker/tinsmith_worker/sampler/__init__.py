"""Sampling from the base and from frozen adapters, many requests at once."""

from tinsmith_worker.sampler.torch_sampler import SamplerSettings, TorchSampler

__all__ = ["SamplerSettings", "TorchSampler"]
