from collections.abc import Iterator

import pytest

import tinsmith
from tests.client.stub import Stub


@pytest.fixture
def stub() -> Iterator[Stub]:
    stub = Stub()
    yield stub
    stub.close()


@pytest.fixture
def client(stub: Stub) -> Iterator[tinsmith.ServiceClient]:
    with tinsmith.ServiceClient(base_url=stub.url, api_key="tml-test", give_up_seconds=20) as client:
        yield client


@pytest.fixture
def training(client: tinsmith.ServiceClient) -> tinsmith.TrainingClient:
    return client.create_lora_training_client("m", rank=8).result(10)
