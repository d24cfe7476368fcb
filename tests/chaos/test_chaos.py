"""The short form of `make chaos`."""

from pathlib import Path

import pytest

from tests.chaos import harness


@pytest.mark.slow
def test_whatever_is_killed_while_three_tenants_train_no_bit_is_different(tmp_path: Path) -> None:
    report = harness.run(tmp_path, points=8, seed=3)
    assert report.points >= 8
