"""A pool that vLLM samples, with a stand-in for vLLM: what it is asked, what is made of its answers, and what ends
with what. vLLM itself is asked in tests/versions/vllm.py."""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from tests.servers import wait_until
from tinsmith.errors import InvalidInput
from tinsmith_worker.contract import AdapterState, Failure, LoraSpec, SampleInput, SampleOutput
from tinsmith_worker.vllm import VllmSampler, VllmServer, wire

TENSOR = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTER = AdapterState(LoraSpec(2, 1), ((TENSOR, 0, (2, 3)),), np.ones(6, np.float32))


class StandIn:
    """Answers as vLLM does: 7 and 8, likely after each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.socket = folder / "socket"
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, set[str]] = {}
        self.status = 200
        self.gives_up = threading.Event()
        self.was_left = threading.Event()
        self.reasons: list[str] = []
        self.holds_back = False
        self.ends_early = False
        app = FastAPI()

        @app.post("/v1/{call}")
        async def post(call: str, request: Request) -> Response:
            body = await request.json()
            self.asked.append((call, body))
            if call == "load_lora_adapter":
                self.files[body["lora_name"]] = set(os.listdir(body["lora_path"]))
            if self.status != 200:
                return Response(json.dumps({"error": {"message": "no such luck"}}), self.status)
            while self.holds_back:
                if await request.is_disconnected():
                    self.was_left.set()
                    return Response()
                await asyncio.sleep(0.01)
            if body.get("stream"):
                told = list(map(event, parts(answer(body))))
                return StreamingResponse(
                    iter(told[:1] if self.ends_early else told), media_type="text/event-stream"
                )
            return Response(json.dumps(answer(body)) if call == "completions" else "done")

        self.server = uvicorn.Server(uvicorn.Config(app, uds=str(self.socket), log_level="warning"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        wait_until(lambda: self.server.started)

    def lost(self, why: object) -> None:
        self.reasons.append(str(why))
        self.gives_up.set()

    def close(self) -> None:
        self.holds_back = False
        self.server.should_exit = True
        self.thread.join()


def answer(body: dict[str, Any]) -> dict[str, Any]:
    tokens = [7, 8, 7][: body["max_tokens"]]
    top = {"token_id:7": -0.5, "token_id:9": -9999.0, "token_id:8": -0.1}
    choice = {
        "token_ids": tokens,
        "logprobs": {"token_logprobs": [-0.25] * len(tokens), "top_logprobs": [top] * len(tokens)},
        "finish_reason": "abort" if body["stop"] == ["abort"] else "stop" if body["stop"] else "length",
        "prompt_logprobs": [
            None,
            *({str(t): {"logprob": -float(t)}, "3": {"logprob": -3.0}} for t in body["prompt"][1:]),
        ],
    }
    choices = [{"index": index, **choice} for index in reversed(range(body["n"]))]
    return {"choices": choices, "usage": {"prompt_tokens_details": {"cached_tokens": 2}}}


def parts(whole: dict[str, Any]) -> Iterator[Any]:
    """A token at a time, the end by itself, and the usage."""
    for choice in whole["choices"]:
        for place, token in enumerate(choice["token_ids"]):
            logprobs = {name: [values[place]] for name, values in choice["logprobs"].items()}
            part = {"index": choice["index"], "token_ids": [token], "logprobs": logprobs}
            yield {"choices": [{**part, "finish_reason": None}]}
        end = {"index": choice["index"], "token_ids": [], "logprobs": None}
        yield {"choices": [{**end, "finish_reason": choice["finish_reason"]}]}
    yield {"choices": [], "usage": whole["usage"]}
    yield "[DONE]"


def event(part: Any) -> str:
    return f"data: {part if isinstance(part, str) else json.dumps(part)}\n\n"


@pytest.fixture
def vllm(tmp_path: Path) -> Iterator[StandIn]:
    made = StandIn(tmp_path)
    yield made
    made.close()


def request(**given: Any) -> SampleInput:
    settled: dict[str, Any] = {"sampler_id": "", "num_samples": 1, "max_tokens": 3, "seed": 1}
    return SampleInput("r", prompt=np.array([5, 6, 4], np.int32), **{**settled, **given})


def sample(vllm: StandIn, **given: Any) -> SampleOutput | Failure:
    sampler, (finished,) = finish(VllmSampler(vllm, [1]), request(**given))
    assert not sampler.busy
    return finished if isinstance(finished, SampleOutput) else finished[1]


def finish(sampler: VllmSampler, given: SampleInput) -> tuple[VllmSampler, list[Any]]:
    """Waits as a worker does: until it is told that there is something to take up."""
    is_busy = threading.Event()
    sampler.notify(is_busy.set)
    sampler.add(given)
    finished: list[Any] = []
    while not finished:
        assert is_busy.wait(10)
        is_busy.clear()
        finished = sampler.step()
        if not given.is_streamed:
            assert finished
        sampler.pieces()
    return sampler, finished


def test_every_option_is_said_in_vllm_s_words(vllm: StandIn) -> None:
    sample(
        vllm,
        num_samples=3,
        seed=2**64 - 1,
        temperature=0.5,
        top_k=4,
        top_p=0.25,
        stop_strings=("x",),
        stop_tokens=(8, 9),
        topk_sample_logprobs=2,
        topk_prompt_logprobs=1,
        tenant_id="lab",
    )
    ((call, body),) = vllm.asked
    assert call == "completions"
    wanted = {
        "model": "base", "prompt": [5, 6, 4], "n": 3, "max_tokens": 3, "seed": (2**64 - 1) % (2**63 - 3), "temperature": 0.5, "top_k": 4,
        "top_p": 0.25, "stop": ["x"], "stop_token_ids": [8, 9], "ignore_eos": True, "logprobs": 2,
        "prompt_logprobs": 1, "cache_salt": "lab", "include_stop_str_in_output": True, "skip_special_tokens": False,
    }  # fmt: skip
    assert {name: body[name] for name in wanted} == wanted
    sample(vllm)
    body = vllm.asked[-1][1]
    assert (body["stop_token_ids"], body["stop"], body["top_k"]) == ([1], [], 0), "the model's own end"
    assert "prompt_logprobs" not in body


def test_answers_are_samples(vllm: StandIn) -> None:
    found = sample(
        vllm,
        num_samples=2,
        topk_sample_logprobs=3,
        prompt_logprobs=True,
        topk_prompt_logprobs=1,
        stop_strings=("x",),
    )
    assert isinstance(found, SampleOutput)
    assert len(found.sequences) == 2
    assert found.cache_hit_tokens == 2
    for sequence in found.sequences:
        assert sequence.tokens.tolist() == [7, 8, 7]
        assert sequence.logprobs.tolist() == [-0.25] * 3
        assert sequence.stopped
        assert sequence.topk is not None
        assert sequence.topk.token_ids.tolist() == [[8, 7, 0]] * 3
        np.testing.assert_allclose(sequence.topk.logprobs[0], [-0.1, -0.5, -99999], rtol=1e-6)
    assert found.prompt_logprobs is not None
    np.testing.assert_array_equal(found.prompt_logprobs, [np.nan, -6, -4])
    assert found.topk_prompt is not None
    assert found.topk_prompt.token_ids.tolist() == [[0], [3], [3]]
    nothing = sample(vllm, max_tokens=0, prompt_logprobs=True, prompt_logprobs_last_n=1)
    assert isinstance(nothing, SampleOutput)
    assert (len(nothing.sequences[0].tokens), nothing.sequences[0].stopped) == (0, False)
    assert vllm.asked[-1][1]["max_tokens"] == 1, "it samples one at least"
    assert nothing.prompt_logprobs is not None
    np.testing.assert_array_equal(nothing.prompt_logprobs, [np.nan, np.nan, -4])


def test_tokens_that_are_streamed_are_those_of_the_result(vllm: StandIn) -> None:
    sampler = VllmSampler(vllm, [1])
    is_busy = threading.Event()
    sampler.notify(is_busy.set)
    given = request(num_samples=2, topk_sample_logprobs=2, is_streamed=True, stop_strings=("x",))
    sampler.add(given)
    pieces, finished = [], []
    while not finished:
        assert is_busy.wait(10)
        is_busy.clear()
        finished = sampler.step()
        pieces += sampler.pieces()
    assert not sampler.busy
    (whole,) = finished
    assert isinstance(whole, SampleOutput)
    assert whole.cache_hit_tokens == 2
    assert vllm.asked[-1][1]["stream"]
    plain = sample(vllm, num_samples=2, topk_sample_logprobs=2, stop_strings=("x",))
    assert isinstance(plain, SampleOutput)
    for index in range(2):
        own = [piece for piece in pieces if piece.index == index]
        assert [(p.start, p.ends, p.sequence.stopped) for p in own] == [
            (0, False, False), (1, False, False), (2, False, False), (3, True, True)
        ]  # fmt: skip
        of_pieces = np.concatenate([piece.sequence.tokens for piece in own])
        for one in (whole, plain):
            sequence = one.sequences[index]
            assert (sequence.tokens.tolist(), sequence.stopped) == (of_pieces.tolist(), True)
            assert sequence.topk is not None
            assert len(sequence.topk.logprobs) == 3


def test_what_vllm_has_no_word_for_is_refused() -> None:
    for wrong in (
        {"target_prompt_logprobs": np.zeros((2, 1), np.int64)},
        {"prompt_alt_tokens_k": 1},
        {"temperature": 2.5},
    ):
        with pytest.raises(InvalidInput, match=next(iter(wrong))):
            wire.check(request(**wrong))


def test_weights_are_peft_s_files_under_a_name_of_their_own(vllm: StandIn) -> None:
    sampler = VllmSampler(vllm, [1])
    for prefix in ("t/run/first", "t/run/second"):
        sampler.hold(prefix, ADAPTER)
        sampler.hold(prefix, ADAPTER)  # once is enough
        assert sampler.holds(prefix)
        finish(sampler, request(sampler_id=prefix))
    loads = [body for call, body in vllm.asked if call == "load_lora_adapter"]
    models = [body["model"] for call, body in vllm.asked if call == "completions"]
    assert [body["lora_name"] for body in loads] == models
    assert len(set(models)) == 2
    assert list(vllm.files.values()) == [{"adapter_config.json", "adapter_model.safetensors"}] * 2
    sampler.release("t/run/first")
    assert not sampler.holds("t/run/first")
    wait_until(lambda: not Path(loads[0]["lora_path"]).exists(), 10)
    assert vllm.asked[-1] == ("unload_lora_adapter", {"lora_name": models[0]})
    assert Path(loads[1]["lora_path"]).exists()
    # What the trainer has on its device is read back from its files.
    sampler.hold("t/run/third", object())
    assert not sampler.holds("t/run/third")


@pytest.mark.parametrize(("status", "category"), [(400, "user"), (500, "server")])
def test_what_vllm_refuses_fails_that_request_with_its_sentence(
    vllm: StandIn, status: int, category: str
) -> None:
    vllm.status = status
    failure = sample(vllm)
    assert isinstance(failure, Failure)
    assert (failure.category, "no such luck" in failure.message) == (category, True)
    sampler = VllmSampler(vllm, [1])
    if category == "user":  # else it is tried again
        sampler.hold("t/a", ADAPTER)
        _, (failed,) = finish(sampler, request(sampler_id="t/a"))
        assert failed[1] == Failure("vLLM does not take this adapter: no such luck")
    full = AdapterState(LoraSpec(0, 1, method="full"), (), np.zeros(0, np.float32))
    sampler.hold("t/full", full)
    _, (failed,) = finish(sampler, request(sampler_id="t/full"))
    assert "all weights" in failed[1].message


def test_who_gives_up_while_weights_are_loaded_leaves_them_to_the_others(vllm: StandIn) -> None:
    vllm.holds_back = True
    sampler = VllmSampler(vllm, [1])
    sampler.hold("t/a", ADAPTER)
    sampler.add(replace(request(sampler_id="t/a"), request_id="gives up"))
    wait_until(lambda: bool(vllm.asked), 10)
    sampler.cancel("gives up")
    time.sleep(0.1)
    vllm.holds_back = False
    _, (found,) = finish(sampler, request(sampler_id="t/a"))
    assert isinstance(found, SampleOutput), found


def test_weights_that_are_let_go_and_wanted_again_at_once_are_there(vllm: StandIn) -> None:
    sampler = VllmSampler(vllm, [1])
    sampler.hold("t/a", ADAPTER)
    finish(sampler, request(sampler_id="t/a"))
    vllm.holds_back = True
    sampler.release("t/a")
    wait_until(lambda: vllm.asked[-1][0] == "unload_lora_adapter", 10)
    sampler.hold("t/a", ADAPTER)
    sampler.add(request(sampler_id="t/a"))
    time.sleep(0.1)
    vllm.holds_back = False
    wait_until(lambda: sampler.busy, 10)
    (found,) = sampler.step()
    assert isinstance(found, SampleOutput), found
    first, second = [body for call, body in vllm.asked if call == "load_lora_adapter"]
    wait_until(lambda: not Path(first["lora_path"]).exists(), 10)
    assert Path(second["lora_path"]).exists()
    assert first["lora_name"] != second["lora_name"]


def test_weights_that_could_not_be_loaded_are_tried_again(vllm: StandIn) -> None:
    sampler = VllmSampler(vllm, [1])
    vllm.status = 500
    sampler.hold("t/a", ADAPTER)
    wait_until(lambda: not sampler.holds("t/a"), 10)
    with pytest.raises(RuntimeError, match="could not be loaded just now"):
        sampler.add(request(sampler_id="t/a"))
    vllm.status = 200
    sampler.hold("t/a", ADAPTER)
    _, (found,) = finish(sampler, request(sampler_id="t/a"))
    assert isinstance(found, SampleOutput), found


@pytest.mark.parametrize("how", ["streamed", "as a whole"])
def test_what_vllm_breaks_off_is_no_sample(vllm: StandIn, how: str) -> None:
    vllm.ends_early = True
    is_streamed = how == "streamed"
    failure = sample(vllm, is_streamed=is_streamed, stop_strings=() if is_streamed else ("abort",))
    assert isinstance(failure, Failure), failure
    assert (failure.category, "broke off" in failure.message) == ("server", True)


def test_no_connection_is_used_twice(vllm: StandIn) -> None:
    """vLLM ends those that were idle for some seconds; one that is used in that moment is a lost sample, and
    that the end of the worker."""
    sample(vllm)
    connections = vllm.server.server_state.connections
    wait_until(lambda: not connections, 2)


def test_who_gives_up_is_not_waited_for(vllm: StandIn) -> None:
    vllm.holds_back = True
    sampler = VllmSampler(vllm, [1])
    sampler.add(request())
    wait_until(lambda: bool(vllm.asked), 10)
    assert not sampler.busy, "nobody waits here for what vLLM samples"
    sampler.cancel("r")
    assert vllm.was_left.wait(10)
    assert sampler.step() == []


def test_what_a_vllm_that_is_gone_was_asked_is_not_answered(vllm: StandIn, tmp_path: Path) -> None:
    """The worker ends, and another one is asked: the journal has the request."""
    sampler = VllmSampler(vllm, [1])
    vllm.close()
    sampler.add(request())
    assert vllm.gives_up.wait(10)


# -- the process


SLEEPS = "import time; time.sleep(600)"
TWO_SLEEP = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{SLEEPS}', sys.argv[1]])"


def marked(mark: str) -> list[int]:
    """The processes that were given this word at the end of their command, in the order of their start."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().split(b"\0")
            if mark.encode() in words and b"tinsmith_worker.vllm.guardian" not in words:
                found.append(int(file.parent.name))
    return sorted(found)


VLLM = f"""#!{sys.executable}
import http.server, json, os, socketserver, subprocess, sys
if "--fail" in sys.argv:
    sys.exit(3)
with open({{told!r}}, "w") as file:
    json.dump([sys.argv[1:], sorted(os.environ)], file)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", {{mark!r}}])
class Healthy(http.server.BaseHTTPRequestHandler):
    def address_string(self): return ""
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
socketserver.UnixStreamServer(sys.argv[sys.argv.index("--uds") + 1], Healthy).serve_forever()
"""


class Watched(VllmServer):
    """Of a worker that does not end."""

    def lost(self, why: object) -> None:
        self.reason = str(why)


def program(folder: Path, mark: str) -> Path:
    file = folder / "vllm"
    file.write_text(VLLM.format(told=str(folder / "told"), mark=mark))
    file.chmod(0o755)
    return file


def test_vllm_is_started_with_what_it_needs_and_none_of_our_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = f"mark-{os.getpid()}-started"
    for secret in ("TINSMITH_DATABASE", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(secret, "secret")
    vllm = program(tmp_path, mark)
    server = Watched(f"{vllm} --max-loras=2 --dtype float32", "/models/x", max_context_length=77)
    words, environment = json.loads((tmp_path / "told").read_text())
    assert words[:5] == ["serve", "/models/x", "--max-loras=2", "--dtype", "float32"]
    given = dict(itertools.pairwise(words[5:]))
    assert given["--max-model-len"] == "77"
    assert given["--logprobs-mode"] == "processed_logprobs"
    assert "--max-lora-rank" in given
    assert "--max-loras" not in given, "the operator said it"
    assert "--enable-lora" in words
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in environment
    assert not {"TINSMITH_DATABASE", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH"} & set(environment)
    server.close()
    assert not hasattr(server, "reason")
    wait_until(lambda: not marked(mark), 20)
    assert not server.folder.exists()
    with pytest.raises(ValueError, match="ended with status 3"):
        Watched(f"{vllm} --fail", "/models/x", max_context_length=77)


@pytest.mark.parametrize("killed", ["vLLM", "its guardian"])
def test_a_worker_hears_of_vllm_s_end_and_nothing_of_it_is_left(tmp_path: Path, killed: str) -> None:
    mark = f"mark-{os.getpid()}-{killed.replace(' ', '-')}"
    server = Watched(str(program(tmp_path, mark)), "/models/x", max_context_length=77)
    assert len(marked(mark)) == 1
    process = int((server.folder / "process").read_text())
    os.kill(process if killed == "vLLM" else server._process.pid, signal.SIGKILL)
    wait_until(lambda: hasattr(server, "reason"), 20)
    assert "ended with status" in server.reason
    wait_until(lambda: not marked(mark) and not is_alive(process), 20)


def test_a_vllm_that_does_not_answer_any_more_is_lost(tmp_path: Path) -> None:
    mark = f"mark-{os.getpid()}-hangs"
    server = Watched(str(program(tmp_path, mark)), "/models/x", max_context_length=77, patience_seconds=0.5)
    time.sleep(1.5)
    assert not hasattr(server, "reason"), "it answers"
    os.kill(int((server.folder / "process").read_text()), signal.SIGSTOP)
    wait_until(lambda: hasattr(server, "reason"), 20)
    assert "does not answer" in server.reason
    server.close()
    wait_until(lambda: not marked(mark), 20)


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().split()[2] != "Z"


@pytest.mark.parametrize("how", ["the pipe ends", "the command is killed"])
def test_no_process_outlives_the_pipe_or_the_command(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "adapters"
    folder.mkdir()
    mark = f"mark-{os.getpid()}-{how.replace(' ', '-')}"
    guardian = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tinsmith_worker.vllm.guardian",
            str(folder),
            sys.executable,
            "-c",
            TWO_SLEEP,
            mark,
        ],
        stdin=subprocess.PIPE,
    )
    assert guardian.stdin is not None
    wait_until(lambda: len(marked(mark)) == 2, 20)
    if how == "the pipe ends":
        guardian.stdin.close()
    else:
        os.kill(marked(mark)[0], signal.SIGKILL)
    assert guardian.wait(20) != 0
    wait_until(lambda: not marked(mark), 20)
    assert not folder.exists()
