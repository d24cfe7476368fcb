"""Keeps `contract.Sampler` by asking vLLM: every request is a call of its own, made and awaited on a thread
beside the engine's."""

import asyncio
import itertools
import json
import queue
import shutil
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import httpx

from tinsmith.errors import InvalidInput
from tinsmith_worker import checkpoints
from tinsmith_worker.contract import (
    AdapterState,
    Failure,
    SampledPiece,
    SampleInput,
    SampleOutput,
)
from tinsmith_worker.vllm import wire
from tinsmith_worker.vllm.server import BASE, MOST_SEQUENCES, Server

Json = dict[str, Any]
_Finished = SampleOutput | tuple[str, Failure]


class VllmSampler:
    """Adapters are given to vLLM as PEFT's files, under a name that none had before and none will have again:
    a name of this loading of them, and not of the checkpoint."""

    def __init__(self, server: Server, end_tokens: Sequence[int]) -> None:
        self._server = server
        self._end_tokens = end_tokens
        self._notify: Callable[[], None] = lambda: None
        self._held: dict[str, Future[str]] = {}  # the name it is called by, once it is loaded
        self._names = map("adapter-{}".format, itertools.count())
        self._under_way: dict[str, Future[None]] = {}
        self._finished: queue.SimpleQueue[_Finished] = queue.SimpleQueue()
        self._pieces: queue.SimpleQueue[SampledPiece] = queue.SimpleQueue()
        self._http = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(
                # Of connections none is used twice: vLLM may be closing one that was idle.
                uds=str(server.socket),
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=0),
            ),
            base_url="http://vllm",
            timeout=None,  # noqa: S113 - a sample takes as long as it takes; vLLM's end is heard of
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="vllm-calls", daemon=True).start()

    def close(self) -> None:
        """End vLLM."""
        self._server.close()

    def notify(self, call: Callable[[], None]) -> None:
        self._notify = call

    # -- weights

    def hold(self, sampler_id: str, weights: Any) -> None:
        if sampler_id not in self._held and isinstance(weights, AdapterState):  # else they come as files
            loading = self._held[sampler_id] = self._begin(self._load(next(self._names), weights))
            loading.add_done_callback(lambda loaded: self._forget_if_failed(sampler_id, loaded))

    def _forget_if_failed(self, sampler_id: str, loaded: "Future[str]") -> None:
        """Whoever asks for it next has it read again, unless it is the adapter that is at fault."""
        may_be_well = loaded.cancelled() or not isinstance(loaded.exception(), InvalidInput | None)
        if may_be_well and self._held.get(sampler_id) is loaded:
            self._held.pop(sampler_id, None)

    def holds(self, sampler_id: str) -> bool:
        return sampler_id in self._held

    def release(self, sampler_id: str) -> None:
        if (loaded := self._held.pop(sampler_id, None)) is not None:
            self._begin(self._unload(loaded))

    async def _load(self, name: str, weights: AdapterState) -> str:
        if weights.spec.method != "lora":
            raise InvalidInput("vLLM samples adapters here, and these are all weights of a model")
        folder = self._server.folder / name
        try:
            await asyncio.to_thread(_write, folder, weights)
            answer = await self._post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})
            _check(answer, "vLLM does not take this adapter")
        except BaseException:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
            raise
        return name

    async def _unload(self, loaded: "Future[str]") -> None:
        name = await asyncio.wrap_future(loaded)
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})
        await asyncio.to_thread(shutil.rmtree, self._server.folder / name, ignore_errors=True)

    # -- samples

    def add(self, given: SampleInput) -> None:
        wire.check(given)
        loaded = self._held.get(given.sampler_id)
        if given.sampler_id and loaded is None:
            raise RuntimeError("its weights could not be loaded just now: ask again")
        self._under_way[given.request_id] = self._begin(self._sample(given, loaded))

    def cancel(self, request_id: str) -> None:
        """vLLM hears that the connection ends, and stops."""
        if (call := self._under_way.pop(request_id, None)) is not None:
            call.cancel()

    def step(self) -> list[_Finished]:
        finished = []
        while not self._finished.empty():
            one = self._finished.get()
            request_id = one.request_id if isinstance(one, SampleOutput) else one[0]
            if self._under_way.pop(request_id, None) is not None:
                finished.append(one)
        return finished

    def pieces(self) -> list[SampledPiece]:
        found = []
        while not self._pieces.empty():
            found.append(self._pieces.get())
        return found

    @property
    def most_sequences(self) -> int:
        return MOST_SEQUENCES

    @property
    def busy(self) -> bool:
        """Whether there is something to take up. What vLLM samples keeps nobody waiting here."""
        return not (self._finished.empty() and self._pieces.empty())

    async def _sample(self, given: SampleInput, loaded: "Future[str] | None") -> None:
        try:
            # Others wait for the same: whoever gives up must not take it along.
            model = BASE if loaded is None else await asyncio.shield(asyncio.wrap_future(loaded))
            body = wire.request(given, model, self._end_tokens)
            answer = await (self._stream(given, body) if given.is_streamed else self._complete(body))
            self._finish(wire.output(given, answer))
        except InvalidInput as error:
            self._finish((given.request_id, Failure(str(error))))
        except Exception as error:
            self._finish((given.request_id, Failure(f"sampling by vLLM failed: {error!r}", "server")))

    async def _complete(self, body: Json) -> Json:
        answer = await self._post("/v1/completions", body)
        _check(answer, "vLLM says")
        return dict(answer.json())

    async def _stream(self, given: SampleInput, body: Json) -> Json:
        gathering = wire.Gathering(given)
        try:
            async with self._http.stream("POST", "/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    await answer.aread()
                    _check(answer, "vLLM says")
                async for line in answer.aiter_lines():
                    event = line.removeprefix("data: ")
                    if not event or event == "[DONE]":
                        continue
                    part = json.loads(event)
                    if "error" in part:
                        raise RuntimeError(part["error"])
                    for piece in gathering.take(part):
                        self._pieces.put(piece)
                    self._notify()
        except httpx.TransportError as error:
            self._server.lost(error)
            raise
        return gathering.answer

    def _finish(self, finished: _Finished) -> None:
        self._finished.put(finished)
        self._notify()

    async def _post(self, path: str, body: Any) -> httpx.Response:
        try:
            return await self._http.post(path, json=body)
        except httpx.TransportError as error:
            self._server.lost(error)
            raise

    def _begin(self, call: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(call, self._loop)


def _write(folder: Path, weights: AdapterState) -> None:
    folder.mkdir()
    for name, body in checkpoints.export(weights, BASE).items():
        (folder / name).write_bytes(body)


def _check(answer: httpx.Response, what: str) -> None:
    if answer.status_code >= 500:
        raise RuntimeError(f"{what}: {_said(answer)}")
    if answer.status_code != 200:
        raise InvalidInput(f"{what}: {_said(answer)}")


def _said(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"]["message"])
    except (json.JSONDecodeError, LookupError, TypeError):
        return f"status {answer.status_code}"
