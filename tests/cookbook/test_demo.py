"""The demo, as `make demo` runs it but shorter."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

from tinsmith.tokenizer import Tokenizer
from tinsmith_cookbook import demo
from tinsmith_worker import tiny_base


def test_only_the_answers_tokens_are_learnt() -> None:
    tokenizer = Tokenizer({"tokenizer.json": (tiny_base.FOLDER / "tokenizer.json").read_text()})
    question, answer = demo.FACTS[0]
    datum = demo.datum(tokenizer, question, answer)
    targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
    weights = datum.loss_fn_inputs["weights"].to_numpy()
    assert datum.model_input.length == len(targets) == len(weights)
    assert datum.model_input.to_ints()[1:] == targets[:-1].tolist()
    assert (
        tokenizer.decode(targets[weights == 1].tolist(), skip_special_tokens=False) == f"{answer}<|im_end|>"
    )


def test_every_fact_is_asked_once_and_the_batches_come_out_even() -> None:
    assert len({question for question, _ in demo.FACTS}) == len(demo.FACTS) == 40
    assert demo.EPOCHS * len(demo.FACTS) == demo.STEPS * demo.BATCH


def test_the_demo_teaches_its_facts_and_stops_its_service(tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("TINSMITH_", "TINKER_"))
    }
    for _ in range(2):  # it can be run again in the same place
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from tinsmith_cookbook import demo; demo.STEPS = 8; demo.EPOCHS = 2; demo.main()",
            ],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        rows = [json.loads(row) for row in (tmp_path / "demo/metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 8
        assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
        assert (tmp_path / "demo/loss.png").read_bytes().startswith(b"\x89PNG")
        assert "Right answers: 0 of 40 before" in done.stdout
        assert "weights/demo" in done.stdout
    with (tmp_path / "demo/data/lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises while a service holds it
    assert not subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True).stdout
