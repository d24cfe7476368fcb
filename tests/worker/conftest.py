from collections.abc import Iterator

import pytest

from tests.worker.ranks import Ranks


@pytest.fixture(scope="session")
def forked() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()
