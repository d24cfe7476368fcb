"""A fleet with a worker that trains and one that lets vLLM sample, as it is."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from tests.conftest import RunningFleet, RunningService
from tests.e2e.wire import Json, Wire, datum, logprobs
from tests.servers import wait_until
from tests.versions.vllm import ROUNDING, command
from tinsmith.wire import tinsmith_pb2 as pb

MODEL = "tinsmith/tiny"
TEXT = [5, 6, 7, 8, 9, 10]
LONG = {"max_tokens": 600, "seed": 3, "temperature": 1.0, "stop": []}

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningFleet]:
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
    folder = tmp_path_factory.mktemp("vllm")
    running = RunningFleet(
        folder, workers=2, apis=1, roles=("train", "sample"), sampler="vllm", vllm=command()
    )
    wait_until(lambda: len(running.ready_workers()) == 2, 600, "vLLM's start")
    time.sleep(1.5)  # pools are looked up once a second
    yield running
    assert running.stop() == 0, running.log_text()
    wait_until(lambda: not vllms(), 30, "vLLM's end")


def vllms() -> list[int]:
    """The processes of vLLM, the one that answers calls first; not the one that looks after them."""
    words = ["pgrep", "-af", "vllm serve .*tinsmith-vllm-|^VLLM::"]
    found = subprocess.run(words, capture_output=True, text=True).stdout.splitlines()
    return [int(line.split()[0]) for line in found if "vllm.guardian" not in line]


@pytest.fixture
def wire(fleet: RunningFleet) -> Wire:
    return Wire(fleet.url, fleet.key)


def trained(wire: Wire) -> str:
    run = wire.run(MODEL, train_unembed=False)
    train(wire, run, 1)
    return run


def train(wire: Wire, run: str, seq: int) -> None:
    wire.output(wire.submit(run, seq, datum(TEXT)))
    wire.result(wire.optim(run, seq + 1, learning_rate=0.01))


def sampler_of(wire: Wire, run: str, seq: int, **fields: object) -> str:
    saved = wire.result(wire.post("/save_weights_for_sampler", model_id=run, seq_id=seq, path="s", **fields))
    opened = wire.post(
        "/create_sampling_session",
        session_id=wire.session(),
        sampling_session_seq_id=0,
        model_path=saved["path"],
    )
    return str(opened["sampling_session_id"])


def greedy(wire: Wire, sampler: str, seq: int) -> pb.SampledSequence:
    params = {"max_tokens": 12, "temperature": 0, "stop": []}
    return wire.sampled(wire.sample(sampler, seq, TEXT, params=params)).sequences[0]


def test_vllm_samples_what_was_trained_and_agrees_with_the_trainer(wire: Wire, fleet: RunningFleet) -> None:
    run = trained(wire)
    sampler = sampler_of(wire, run, 3)
    sampled = greedy(wire, sampler, 0)
    tokens = np.frombuffer(sampled.tokens, "<i4").tolist()
    text = [*TEXT, *tokens]
    forward = logprobs(wire.output(wire.submit(run, 4, datum(text), forward_only=True)))
    np.testing.assert_allclose(
        np.frombuffer(sampled.logprobs, "<f4"), forward[len(TEXT) - 1 :], atol=ROUNDING
    )
    # What is trained on and saved over the name has weights of its own; the sampler keeps those it had.
    for seq in (5, 7, 9):
        train(wire, run, seq)
    newer = sampler_of(wire, run, 11, overwrite=True)
    assert greedy(wire, newer, 0).logprobs != sampled.logprobs
    assert greedy(wire, sampler, 1).tokens == sampled.tokens


def test_it_samples_while_the_run_trains_on(wire: Wire, fleet: RunningFleet) -> None:
    run = trained(wire)
    sampler = sampler_of(wire, run, 3)
    long = wire.sample(sampler, 0, TEXT, params=LONG)
    for seq in (4, 6, 8):
        train(wire, run, seq)
    state = "select state from operations where request_id = ?"
    assert fleet.sql(state, long["request_id"]) == [("queued",)], "trained three steps meanwhile"
    assert len(wire.sampled(long).sequences[0].tokens) == 4 * LONG["max_tokens"]
    trained_by = fleet.sql("select worker_id from runs where id = ?", run)
    sampled_by = fleet.sql("select worker_id from operations where request_id = ?", long["request_id"])
    assert trained_by != sampled_by


def test_options_that_vllm_has_not_are_refused_with_a_sentence(wire: Wire) -> None:
    sampler = sampler_of(wire, trained(wire), 3)
    targets: Json = {"data": [1] * (len(TEXT) - 1), "shape": [len(TEXT) - 1, 1]}
    failed = wire.result(wire.sample(sampler, 0, TEXT, target_prompt_logprobs=targets))
    assert failed["category"] == "user"
    assert "target_prompt_logprobs is not known to vLLM" in failed["error"]


def test_its_tokens_are_streamed(fleet: RunningFleet) -> None:
    client = openai.OpenAI(base_url=f"{fleet.url}/v1", api_key=fleet.key, max_retries=0, timeout=120)
    asked: Json = {
        "model": MODEL,
        "prompt": "The cat",
        "max_tokens": 200,
        "temperature": 2,
        "seed": 3,
        "n": 4,
    }
    texts = ["", "", "", ""]
    state = "select state from operations where request_id = ?"
    for number, event in enumerate(client.completions.create(**asked, stream=True)):
        if number == 0:
            assert fleet.sql(state, event.id) == [("queued",)]
        (choice,) = event.choices
        texts[choice.index] += choice.text
    assert sum(map(len, texts)) > 50
    assert texts == [choice.text for choice in client.completions.create(**asked).choices]


def test_one_worker_trains_and_lets_vllm_sample(tmp_path: Path) -> None:
    """As `tinsmith serve` has it."""
    running = RunningService(tmp_path, config=f'sampler = "vllm"\nvllm = "{command()}"\n')
    wire = Wire(running.url, running.key)
    run = trained(wire)
    sampler = sampler_of(wire, run, 3)
    long = wire.sample(sampler, 0, TEXT, params=LONG)
    train(wire, run, 4)
    assert running.sql("select state from operations where request_id = ?", long["request_id"]) == [
        ("queued",)
    ]
    assert len(wire.sampled(long).sequences[0].tokens) == 4 * LONG["max_tokens"]
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


@pytest.mark.parametrize("option", ["--exact-logprobs", "--single-tenant"])
def test_what_does_not_go_with_vllm_is_said_at_the_start(tmp_path: Path, option: str) -> None:
    words = ["serve", "--port", "0", "--data-dir", str(tmp_path), "--sampler", "vllm", option]
    ended = subprocess.run(
        [sys.executable, "-m", "tinsmith_api.cli", *words], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    assert "sampler tinsmith" in ended.stderr + ended.stdout


def test_a_vllm_that_is_killed_takes_its_worker_with_it_and_the_sample_is_answered_by_the_next(
    wire: Wire, fleet: RunningFleet
) -> None:
    sampler = sampler_of(wire, trained(wire), 3)
    calm = wire.sampled(wire.sample(sampler, 0, TEXT, params=LONG))
    future = wire.sample(sampler, 1, TEXT, params=LONG)
    starts = fleet.starts["worker1"]
    old = vllms()
    os.kill(old[0], signal.SIGKILL)
    answer = wire.sampled(future)
    assert fleet.starts["worker1"] > starts
    assert [s.tokens for s in answer.sequences] == [s.tokens for s in calm.sequences]
    assert not set(old) & set(vllms())
    # And the other way round.
    old = vllms()
    fleet.processes["worker1"].kill()
    wait_until(lambda: not set(old) & set(vllms()), 30, "vLLM's end")
    assert wire.sampled(wire.sample(sampler, 2, TEXT, params=LONG)).sequences
