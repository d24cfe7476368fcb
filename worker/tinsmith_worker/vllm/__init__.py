"""A pool whose samples come from vLLM: its process, what it is asked, and what it answers. No torch."""

from tinsmith_worker.vllm.open import open_vllm
from tinsmith_worker.vllm.sampler import VllmSampler
from tinsmith_worker.vllm.server import Server, VllmServer

__all__ = ["Server", "VllmSampler", "VllmServer", "open_vllm"]
