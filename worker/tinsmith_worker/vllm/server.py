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
_PATIENCE_SECONDS = 120.0
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
    process ends when it does, or says nothing for `patience_seconds`, and it when this process does.
    `command`: the operator's, the program and what options it is to have besides, such as
    "vllm --gpu-memory-utilization 0.8"."""

    def __init__(
        self, command: str, path: str, *, max_context_length: int, patience_seconds: float = _PATIENCE_SECONDS
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="tinsmith-vllm-"))
        self.socket = self.folder / "socket"
        program, *options = shlex.split(command)
        words = [program, "serve", path, *options, *self._arguments(options, max_context_length)]
        logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every sample
        self._is_closing = False
        self._patience_seconds = patience_seconds
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
        while self._process.poll() is None:
            if self._health(5) == 200:
                return
            time.sleep(_PAUSE_SECONDS)
        raise ValueError(
            f"{program} ended with status {self._process.returncode}: its own lines above say why"
        )

    def _health(self, within_seconds: float) -> int | None:
        """What it answers, if it does."""
        transport = httpx.HTTPTransport(uds=str(self.socket))
        with httpx.Client(transport=transport, timeout=within_seconds) as client:
            try:
                return client.get("http://vllm/health").status_code
            except httpx.TransportError:
                return None

    def _watch(self) -> None:
        why = self._wait_for_trouble()
        if self._is_closing:
            return
        # The guardian ended them and took the folder away, unless it was killed itself, or they only hang.
        with contextlib.suppress(OSError):
            os.killpg(int((self.folder / "process").read_text()), signal.SIGKILL)
        self.lost(why)

    def _wait_for_trouble(self) -> str:
        patience, heard = self._patience_seconds, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return f"it ended with status {self._process.wait(patience / 4)}"
            if self._health(patience / 2) == 200:
                heard = time.monotonic()
            elif time.monotonic() > heard + patience:
                return f"for {patience:g} s it does not answer that it is well"


def _environment() -> dict[str, str]:
    """It is another program with packages of its own, and none of this service's secrets are its business."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TINSMITH_", "AWS_"))}
    return {**kept, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1"}
