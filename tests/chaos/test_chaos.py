"""The short form of `make chaos`."""

from pathlib import Path

import pytest

from tests.chaos import faults, harness


@pytest.mark.slow
def test_whatever_is_broken_while_three_tenants_train_no_bit_is_different(tmp_path: Path) -> None:
    report = harness.run(tmp_path, points=8, seed=3, lease_seconds=2, kinds=faults.KINDS)
    assert report.points >= 8
    assert report.checkpoints > 0
