"""The process of vLLM that belongs to a worker."""

import contextlib
import logging
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Protocol

import httpx

log = logging.getLogger("tinsmith.worker")

BASE = "base"
"""What vLLM calls the base model."""
MOST_SEQUENCES = 256
MOST_ALTERNATIVES = 128

_PAUSE_SECONDS = 0.2
# Unless the operator's command says another: for each of so many at once it keeps room of this rank.
_DEFAULTS = {"--max-lora-rank": "64", "--max-loras": "8", "--max-cpu-loras": "64"}


class Server(Protocol):
    """socket: where it listens, a Unix domain socket, which nobody outside of this machine's user reaches.
    folder: of files that it reads."""

    @property
    def socket(self) -> Path: ...
    @property
    def folder(self) -> Path: ...
    def close(self) -> None: ...
    def lost(self, why: object) -> None:
        """It does not answer as it must. Does not return: what it was asked is another worker's."""
        ...


class VllmServer:
    """Starts `vllm serve` and waits until it is ready; ValueError if it ends before. From then on this
    process ends when it does, and it when this process does. `command`: the operator's, the program and what
    options it is to have besides, such as "vllm --gpu-memory-utilization 0.8"."""

    def __init__(self, command: str, path: str, *, max_context_length: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tinsmith-vllm-"))
        self.socket = self.folder / "socket"
        program, *options = shlex.split(command)
        words = [program, "serve", path, *options, *self._arguments(options, max_context_length)]
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every sample
        self._is_closing = False
        log.info("starting %s", shlex.join(words))
        guardian = [sys.executable, "-m", "tinsmith_worker.vllm.guardian", str(self.folder), *words]
        self._process = subprocess.Popen(guardian, stdin=subprocess.PIPE, env=_environment())
        self._wait_until_ready(program)
        threading.Thread(target=self._watch, name="vllm", daemon=True).start()

    def lost(self, why: object) -> None:
        log.error("vLLM is lost, and this worker ends with it: %s", why)
        os._exit(1)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._is_closing = True
        self._process.stdin.close()
        self._process.wait()

    def _arguments(self, given: list[str], max_context_length: int) -> list[str]:
        own = {
            "--served-model-name": BASE,
            "--uds": str(self.socket),
            "--max-model-len": str(max_context_length),
            "--max-num-seqs": str(MOST_SEQUENCES),
            "--max-logprobs": str(MOST_ALTERNATIVES),
            # What is said about a token is what it was drawn from, and that is as was asked for.
            "--logprobs-mode": "processed_logprobs",
            "--generation-config": "vllm",
            "--uvicorn-log-level": "warning",
        }
        said = {word.partition("=")[0] for word in given}
        own |= {name: value for name, value in _DEFAULTS.items() if name not in said}
        flags = ["--enable-lora", "--enable-prompt-tokens-details"]
        return [*flags, *(word for option in own.items() for word in option)]

    def _wait_until_ready(self, program: str) -> None:
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.socket)), timeout=5) as client:
            while self._process.poll() is None:
                try:
                    if client.get("http://vllm/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass  # not listening yet
                time.sleep(_PAUSE_SECONDS)
        raise ValueError(
            f"{program} ended with status {self._process.returncode}: its own lines above say why"
        )

    def _watch(self) -> None:
        status = self._process.wait()
        if self._is_closing:
            return
        # The guardian ended them and took the folder away, unless it was killed itself.
        with contextlib.suppress(OSError):
            os.killpg(int((self.folder / "process").read_text()), signal.SIGKILL)
        self.lost(f"it ended with status {status}")


def _environment() -> dict[str, str]:
    """It is another program with packages of its own, and none of this service's secrets are its business."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TINSMITH_")}
    return {**kept, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
