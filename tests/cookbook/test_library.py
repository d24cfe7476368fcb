"""Schedules, rules of thumb, tracking."""

import json
import sys
from pathlib import Path

import pytest

from tinsmith_cookbook import hyperparams, options, schedules, tracking
from tinsmith_cookbook.tracking import Tracker

CONFIG = {"seed": 3, "out": Path("run"), "rates": [0.5]}
LOSSES = [2.0, 1.5, 0.25]


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_the_rate_rises_then_falls_and_never_is_zero(kind: schedules.Kind) -> None:
    rates = [schedules.learning_rate(s, 100, 1e-3, kind=kind, warmup_ratio=0.1) for s in range(100)]
    assert rates[:10] == pytest.approx([1e-4 * n for n in range(1, 11)])
    assert max(rates) == 1e-3
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates) > 0
    assert (rates[-1] < 1e-4) == (kind != "constant")
    floored = schedules.learning_rate(99, 100, 1e-3, kind=kind, floor=5e-4)
    assert floored >= 5e-4
    assert schedules.learning_rate(0, 1, 1e-3, kind=kind) == 1e-3  # one step is all warm-up


def test_the_learning_rate_rules_give_the_numbers_they_were_published_with() -> None:
    assert hyperparams.lora_learning_rate(2000) == pytest.approx(5e-4)
    assert hyperparams.lora_learning_rate(4096, "llama") == pytest.approx(5e-4 * (2000 / 4096) ** 0.781)
    assert hyperparams.lora_learning_rate(4096, "qwen") == pytest.approx(5e-4 * (2000 / 4096) ** 0.0775)
    assert hyperparams.learning_rate_by_size(7e9) == pytest.approx(2e-4)
    assert hyperparams.learning_rate_by_size(70e9) == pytest.approx(2e-5)
    assert hyperparams.learning_rate_by_size(1e6) == pytest.approx(2e-4)
    assert hyperparams.scaled_to_batch(1e-4, 64, tuned_at=16) == pytest.approx(2e-4)
    with pytest.raises(ValueError, match="no rule for the family"):
        hyperparams.lora_learning_rate(2000, "gpt")  # type: ignore[arg-type]


def test_the_rank_grows_with_what_is_to_be_learnt_and_stays_small_for_reinforcement() -> None:
    shapes = [(1024, 1024)] * 100
    ranks = [hyperparams.rank(tokens, shapes).rank for tokens in (1000, 2_000_000, 5_000_000, 10**8)]
    assert ranks == [8, 16, 32, 64]
    assert hyperparams.rank(10**8, shapes, reinforcement=True).rank == 8
    assert hyperparams.expert_rank(32, 8) == 4
    assert hyperparams.batch(1600, epochs=1) == 16
    assert hyperparams.batch(50) == 1
    assert hyperparams.batch(10**6) == 128


def test_metrics_are_on_disk_at_once_and_a_resumed_run_takes_back_what_it_repeats(tmp_path: Path) -> None:
    with Tracker(tmp_path) as tracker:
        for step in range(4):
            tracker.log(step, {"loss": 4.0 - step})
            assert len(tracking.read(tmp_path / "metrics.jsonl")) == step + 1
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while it wrote
    with Tracker(tmp_path, first_step=3) as tracker:
        tracker.log(3, {"loss": 0.5})
        assert tracker.column("loss") == [4, 3, 2, 0.5]
    assert [row["step"] for row in tracking.read(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    with Tracker(tmp_path) as tracker:
        assert tracker.rows == []


def test_a_run_is_told_to_tensorboard_by_its_own_library(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Tracker(tmp_path, also=["tensorboard"], config=CONFIG) as tracker:
        for step, loss in enumerate(LOSSES):
            tracker.log(step, {"loss": loss})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == list(enumerate(LOSSES))


def test_a_run_is_told_to_mlflow_by_its_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with Tracker(tmp_path, also=["mlflow"], config=CONFIG) as tracker:
        for step, loss in enumerate(LOSSES):
            tracker.log(step, {"loss": loss})
    kept = mlflow.MlflowClient(uri)
    (run,) = kept.search_runs([kept.get_experiment_by_name("tinsmith").experiment_id])
    assert (run.info.run_name, run.info.status) == (tmp_path.name, "FINISHED")
    assert run.data.params == {"seed": "3", "out": "run", "rates": "[0.5]"}
    found = kept.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in found] == list(enumerate(LOSSES))


def test_a_run_is_told_to_wandb_by_its_own_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: what would be sent lies in a file, in its library's own messages."""
    import wandb
    from wandb.proto.wandb_internal_pb2 import ConfigItem, HistoryItem

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with Tracker(tmp_path, also=["wandb"], config=CONFIG) as tracker:
        for step, loss in enumerate(LOSSES):
            tracker.log(step, {"loss": loss})
    wandb.teardown()  # its process writes on until it ends
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    kept = file.read_bytes()
    for step, loss in enumerate(LOSSES):
        for name, value in (("_step", step), ("loss", loss)):
            said = json.dumps(int(value) if value == int(value) else value)
            assert HistoryItem(nested_key=[name], value_json=said).SerializeToString() in kept, (name, value)
    assert ConfigItem(key="seed", value_json="3").SerializeToString() in kept


def test_a_tracker_whose_library_is_missing_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit, match="pip install wandb"):
        Tracker(tmp_path, also=["wandb"])


def test_a_run_leaves_a_picture_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracking.draw(tmp_path / "curve.png", "loss", {"a": ([0, 1], [2.0, 1.0])}, xlabel="step")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    tracking.write_result(tmp_path, {"accuracy": 0.51234}, [{"rank": 8, "loss": 1.0}, {"rank": 16}])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["accuracy"] == 0.51234
    assert result["table"][1] == {"rank": 16}
    assert (tmp_path / "table.md").read_text().splitlines()[2] == "| 8 | 1 |"
    assert "accuracy 0.5123" in capsys.readouterr().out


def test_every_recipe_understands_the_same_words(tmp_path: Path) -> None:
    made = options.parser("x", "What it does.", options.Steps(full=60, short=20))
    read = [options.read(made, ["--out", str(tmp_path / "o"), *more]).steps for more in ([], ["--short"])]
    assert read == [60, 20]
    assert options.read(made, ["--out", str(tmp_path), "--short", "--steps", "3"]).steps == 3
    assert (tmp_path / "o").is_dir()
    with pytest.raises(SystemExit):
        options.read(made, ["--steps", "0"])
