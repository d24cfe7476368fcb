"""The service is killed and started again while our client trains: nothing is lost and nothing done twice."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import tinsmith
from tests.conftest import RunningService
from tests.e2e.test_client import BASE, DATA, logprobs
from tinsmith.types import AdamParams

STEPS = 30


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningService]:
    running = RunningService(tmp_path, "--deterministic")
    yield running
    running.stop()


def test_calls_go_on_over_kills_and_are_applied_once(running: RunningService) -> None:
    client = tinsmith.ServiceClient(base_url=running.url, api_key=running.key)
    trained, undisturbed = [
        client.create_lora_training_client(BASE, rank=4, seed=1).result(60) for _ in range(2)
    ]

    def train(training: tinsmith.TrainingClient) -> list[float]:
        futures = []
        for _ in range(STEPS):
            futures.append(training.forward_backward(DATA, "cross_entropy"))
            training.optim_step(AdamParams(learning_rate=1e-3))
            time.sleep(0.02)
        return [future.result(120).metrics["loss:sum"] for future in futures]

    found: list[list[float]] = []
    thread = threading.Thread(target=lambda: found.append(train(trained)))
    thread.start()
    for kill in (running.kill_worker, running.kill):
        time.sleep(0.4)
        assert thread.is_alive(), "the kill came too late to disturb anything"
        kill()
    running.restart()
    thread.join(120)
    assert found == [train(undisturbed)]
    assert logprobs(trained) == logprobs(undisturbed)
    assert trained.optim_step(AdamParams(learning_rate=0.0)).result(60).metrics["optimizer_step"] == STEPS + 1
    client.close().result(20)
