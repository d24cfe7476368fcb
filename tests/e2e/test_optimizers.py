"""Optimizer families, with the official SDK: chosen when a run is made, kept by its checkpoints, replayed."""

from collections.abc import Iterator

import numpy as np
import pytest
import tinker
from tinker import types
from tinker.types.optimizer import OptimizerConfigBase, OptimParamsBase

from tests.conftest import RunningService

MODEL = "tinsmith/tiny"
TEXT = list(range(20, 40))
MUON = OptimizerConfigBase(type="muon")


@pytest.fixture(scope="module")
def mortal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service whose worker may be killed."""
    running = RunningService(
        tmp_path_factory.mktemp("mortal"), "--deterministic", config="snapshot_seconds = 0.5\n"
    )
    yield running
    assert running.stop() == 0, running.log_text()


@pytest.fixture(scope="module")
def client(mortal: RunningService) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=mortal.url, api_key=mortal.key) as opened:
        yield opened


def supervised() -> types.Datum:
    inputs = {"target_tokens": TEXT[1:], "weights": [1.0] * (len(TEXT) - 1)}
    return types.Datum(model_input=types.ModelInput.from_ints(TEXT[:-1]), loss_fn_inputs=inputs)


def train(run: tinker.TrainingClient, steps: int, **params: float) -> list[float]:
    losses = []
    for _ in range(steps):
        passed = run.forward_backward([supervised()], "cross_entropy")
        stepped = run.optim_step(OptimParamsBase(type="muon", **{"learning_rate": 0.02, **params}))
        losses.append(passed.result().metrics["loss:sum"])
        assert stepped.result().metrics["grad_norm"] > 0
    return losses


def made(client: tinker.ServiceClient, **options: object) -> tinker.TrainingClient:
    return client.create_lora_training_client(MODEL, rank=8, seed=1, optimizer=MUON, **options).result()


def test_muon_trains_and_says_so(client: tinker.ServiceClient) -> None:
    run = made(client)
    losses = train(run, 10, momentum=0.9)
    assert losses[-1] < losses[0] / 2
    assert run.get_info().optimizer_config.type == "muon"


def test_a_killed_worker_replays_muon_to_the_bit(
    client: tinker.ServiceClient, mortal: RunningService
) -> None:
    calm = train(made(client), 9)
    run = made(client)
    losses = train(run, 4)
    mortal.kill_worker()
    losses += train(run, 5)
    np.testing.assert_array_equal(losses, calm)


def test_checkpoints_keep_their_optimizer(client: tinker.ServiceClient) -> None:
    straight = made(client)
    train(straight, 2)
    path = straight.save_state("half").result().path
    rest = client.create_rest_client()
    assert rest.get_weights_info_by_tinker_path(path).result().optimizer_config.type == "muon"
    resumed = client.create_training_client_from_state_with_optimizer(path).result()
    assert resumed.get_info().optimizer_config.type == "muon"
    assert train(straight, 3) == train(resumed, 3)
    weights_only = client.create_training_client_from_state(path).result()
    assert weights_only.get_info().optimizer_config.type == "adamw"
    assert (
        client.create_training_client_from_state(path, optimizer=MUON)
        .result()
        .get_info()
        .optimizer_config.type
        == "muon"
    )


def test_parameters_of_another_optimizer_are_refused_and_harm_nothing(client: tinker.ServiceClient) -> None:
    run = made(client)
    with pytest.raises(tinker.TinkerError, match="trained with muon: send optimizer_params"):
        run.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    with pytest.raises(tinker.TinkerError, match="beta1 is not known here"):
        run.optim_step(OptimParamsBase(type="muon", beta1=0.9)).result()
    with pytest.raises(tinker.TinkerError, match="trained with muon"):
        run.optim_step(types.DimuonParams(learning_rate=1e-3)).result()
    adam = client.create_lora_training_client(MODEL, rank=8, seed=1).result()
    with pytest.raises(tinker.TinkerError, match="trained with adamw"):
        adam.optim_step(OptimParamsBase(type="muon")).result()
    path = run.save_state("mine").result().path
    with pytest.raises(tinker.TinkerError, match=r"trained with muon, this run with adamw"):
        adam.load_state_with_optimizer(path).result()
    adam.load_state(path).result()
    train(run, 1)


def test_what_is_not_published_is_refused_by_name(client: tinker.ServiceClient) -> None:
    with pytest.raises(tinker.BadRequestError, match=r"not published. Use 'adamw'"):
        client.create_lora_training_client(MODEL, rank=8, optimizer=types.DimuonOptimizerConfig()).result()
    with pytest.raises(tinker.BadRequestError, match="use adamw or muon"):
        client.create_lora_training_client(MODEL, rank=8, optimizer=OptimizerConfigBase(type="lion")).result()
