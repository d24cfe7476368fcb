"""The official cookbook, as it is and offline, against a service that serves a small model under a known name.

Asked for by name (`make test-cookbook`), for it builds the cookbook's environment the first time.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tinsmith_worker.tiny_base
from tests.conftest import RunningService
from tests.e2e.wire import Wire
from tests.versions import environments

MODEL = "Qwen/Qwen3-8B"
TINY = Path(tinsmith_worker.tiny_base.__file__).parent / "model"

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    folder = tmp_path_factory.mktemp("service")
    running = RunningService(folder, "--deterministic", "--model", f"{MODEL}=tiny")
    yield running
    assert running.stop() == 0, running.log_text()
    assert "Traceback" not in running.log_text(), running.log_text()


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the recipes run: what they look for on a hub lies here, under the hub's names."""
    here = tmp_path_factory.mktemp("desk")
    (here / MODEL).mkdir(parents=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        shutil.copy(TINY / file, here / MODEL / file)
    draw = random.Random(1)
    rows = [_row(draw) for _ in range(96)]
    (here / "HuggingFaceH4/no_robots").mkdir(parents=True)
    for split, part in (("train", rows[:80]), ("test", rows[80:])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (here / f"HuggingFaceH4/no_robots/{split}.jsonl").write_text(lines)
    return here


def _row(draw: random.Random) -> dict[str, Any]:
    color, thing = draw.choice(["red", "blue", "green"]), draw.choice(["boat", "house", "tree"])
    asked = f"Say something about a {color} {thing}."
    told = f"No {thing} is as {color} as this one, said the captain."
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]}


def recipe(
    service: RunningService, desk: Path, name: str, log: str, **options: object
) -> "subprocess.Popen[str]":
    given = {
        "model_name": MODEL,
        "base_url": service.url,
        "log_path": str(desk / log),
        "behavior_if_log_dir_exists": "resume",
        "lora_rank": 8,
        **options,
    }
    words = [f"{key}={value}" for key, value in given.items()]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(desk / "hub")}
    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("TINKER_")}
    return subprocess.Popen(
        [str(environments.cookbook()), "-m", f"tinker_cookbook.recipes.{name}.train", *words],
        cwd=desk,
        env={**own, **offline, "TINKER_API_KEY": service.key},
        stdout=(desk / f"{log}.out").open("a"),
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: "subprocess.Popen[str]", desk: Path, log: str) -> list[dict[str, Any]]:
    """The metrics of a recipe that came to its end."""
    assert process.wait(timeout=1200) == 0, (desk / f"{log}.out").read_text()[-6000:]
    return lines_of(desk / log / "metrics.jsonl")


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


SFT = {
    "dataset": "no_robots",
    "batch_size": 8,
    "learning_rate": 2e-3,
    "eval_every": 3,
    "save_every": 4,
    "rolling_save_every": 1,
    "num_epochs": 1,
    "max_length": 256,
}


def test_sft_evaluates_keeps_checkpoints_and_goes_on_where_it_was_killed(
    service: RunningService, desk: Path
) -> None:
    wire = Wire(service.url, service.key)
    # The recipe draws its adapter without a seed; of two that start from one checkpoint every number is the same.
    start = wire.post("/save_weights", model_id=wire.run(MODEL, rank=8), seq_id=1, path="start")
    options = {**SFT, "load_checkpoint_path": wire.result(start)["path"]}
    calm = ended(recipe(service, desk, "chat_sl", "calm", **options), desk, "calm")
    losses = [row["train_mean_nll"] for row in calm]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 2, losses
    held_out = [row["test/nll"] for row in calm if "test/nll" in row]
    assert len(held_out) == 4
    assert held_out[-1] < held_out[0] / 2, held_out

    killed = recipe(service, desk, "chat_sl", "killed", **options)
    while len(lines_of(desk / "killed/checkpoints.jsonl")) < 6:
        assert killed.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    resumed = ended(recipe(service, desk, "chat_sl", "killed", **options), desk, "killed")
    assert [row["step"] for row in resumed] == list(range(10)), "what is done again is noted once"
    again = [row["train_mean_nll"] for row in resumed]
    kept = [
        row for row in lines_of(desk / "killed/checkpoints.jsonl") if row["state_path"] == _resumed_from(desk)
    ]
    # Its checkpoints are taken one batch ahead of the number they carry; up to there every bit is the same.
    (batch,) = {row["batch"] for row in kept}
    assert 0 < batch < 10
    assert again[:batch] == losses[:batch]
    assert again[-1] < again[0] / 2, again

    for log in ("calm", "killed"):
        kept = lines_of(desk / log / "checkpoints.jsonl")
        assert kept[-1]["name"] == "final"
        stored = {c["tinker_path"]: c for c in wire.get("/checkpoints", limit=1000)["checkpoints"]}
        assert kept[-1]["state_path"] in stored
        assert kept[-1]["sampler_path"] in stored
        rolling = [entry["state_path"] for entry in kept if "sampler_path" not in entry]
        left = [path for path in rolling if path in stored]
        assert rolling, "no rolling checkpoint was noted"
        # Each lets its predecessor go. Who is killed cannot: those that it leaves expire.
        assert len(left) <= (0 if log == "calm" else 2), left
        assert all(stored[path]["expires_at"] for path in left)


def _resumed_from(desk: Path) -> str:
    (path,) = re.findall(r"Resumed training from (\S+)", (desk / "killed.out").read_text())
    return str(path)


@pytest.mark.parametrize("form", ["sync", "async"])
def test_rl_with_its_default_loss_samples_what_it_trains(
    service: RunningService, desk: Path, form: str
) -> None:
    options = {
        "env": "arithmetic",
        "groups_per_batch": 8,
        "group_size": 4,
        "learning_rate": 1e-4,
        "max_steps": 4,
        "eval_every": 0,
        "save_every": 2,
        **({"max_steps_off_policy": 1} if form == "async" else {}),
    }
    rows = ended(recipe(service, desk, "math_rl", form, **options), desk, form)
    trained = [row for row in rows if "env/all/reward/total" in row]
    assert len(trained) == 4
    assert all(0 <= row["env/all/correct"] <= 1 for row in trained)
    if form == "sync":  # what is trained was sampled with the same weights
        assert max(abs(row["optim/kl_sample_train_v1"]) for row in trained) < 1e-3
    assert lines_of(desk / form / "checkpoints.jsonl")[-1]["name"] == "final"
