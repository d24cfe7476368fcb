"""Recipes run end to end on a real service, a few steps each."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tinsmith
from tests.conftest import RunningService
from tinsmith_cookbook import answers, data
from tinsmith_cookbook.recipes import dpo, export, hello, sft, sweep, tenants
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.tracking import read
from tinsmith_worker import tiny_base

LN_2 = float(np.float32(math.log(2)))


def result(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text()))


def weights(running: RunningService, path: str) -> dict[str, bytes]:
    """The files of a checkpoint, as they lie in the store."""
    ((prefix,),) = running.sql("select object_prefix from checkpoints where path = ?", path)
    return {
        file.name: file.read_bytes() for file in (running.folder / "objects" / prefix).rglob("*.safetensors")
    }


def test_hello_teaches_its_sentence(in_environment: RunningService, tmp_path: Path) -> None:
    hello.main(["--out", str(tmp_path)])
    assert result(tmp_path)["right"] == 1
    assert len(read(tmp_path / "metrics.jsonl")) == 20
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


SFT = ["--steps", "6", "--save-every", "2", "--eval-every", "3", "--batch", "4", "--val-set-size", "0.01"]


def test_a_run_that_was_killed_and_resumed_is_the_run_that_was_not(
    in_environment: RunningService, tmp_path: Path
) -> None:
    """Killed in the middle of a step: the same batches, rates and losses, and in the end the same weights and
    optimizer, bit for bit."""
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    sft.main([*SFT, "--out", str(whole)])

    command = [sys.executable, "-m", "tinsmith_cookbook.recipes.sft", *SFT, "--out", str(torn)]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while (
            not (standing := torn / "standing.json").exists() or json.loads(standing.read_text())["step"] < 2
        ):
            assert child.poll() is None
            time.sleep(0.01)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert not (torn / "result.json").exists()
    sft.main([*SFT, "--out", str(torn), "--resume"])

    assert read(torn / "metrics.jsonl") == read(whole / "metrics.jsonl")
    ended, expected = (result(out) for out in (torn, whole))
    assert ended.pop("path") != expected.pop("path")
    assert ended == expected
    last = [json.loads((out / "standing.json").read_text())["path"] for out in (torn, whole)]
    found, wanted = (weights(in_environment, path) for path in last)
    assert set(wanted) == {"adapter_model.safetensors", "optimizer.safetensors"}
    assert found == wanted


@pytest.mark.parametrize("seed", range(3))
def test_what_is_held_out_is_asked_nowhere_in_training(tmp_path: Path, seed: int) -> None:
    settings = sft.parser().parse_args(["--out", str(tmp_path), "--seed", str(seed)])
    split = data.split(sft.read(settings), settings.val_set_size, seed)
    trained, held_out = (
        {m["content"] for c in some for m in c.messages if m["role"] == "user"} for some in split
    )
    assert len(trained) + len(held_out) == 600
    assert not trained & held_out


def test_a_conversation_with_tools_is_asked_with_them() -> None:
    """And its call is right if it is the one in the data."""
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: (tiny_base.FOLDER / name).read_text() for name in names}
    renderer = Renderer(tinsmith.Tokenizer(files))
    call = {"name": "add", "arguments": {"a": 1, "b": 2}}
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {}}}]
    asked = {"role": "user", "content": "What is 1 + 2?"}
    with_tools = data.Conversation([asked, {"role": "assistant", "content": "", "tool_calls": [call]}], tools)
    without = data.Conversation([asked, {"role": "assistant", "content": "3"}])
    # Answers what each was trained on, if it is asked as in training, and nothing else.
    answers_of = {
        tuple(renderer.prompt([asked], tools)): f"<tool_call>{json.dumps(call)}</tool_call><|im_end|>",
        tuple(renderer.prompt([asked])): "3<|im_end|>",
    }
    assert len(answers_of) == 2

    class Sampler:
        def sample(self, prompt: Any, **_: Any) -> Any:
            tokens = renderer.encode(answers_of[tuple(prompt.to_ints())])
            response = SimpleNamespace(sequences=[SimpleNamespace(tokens=tokens)])
            return SimpleNamespace(result=lambda: response)

    saved = SimpleNamespace(result=Sampler)
    training = SimpleNamespace(save_weights_and_get_sampling_client=lambda: saved)
    assert sft.exact(training, renderer, [with_tools, without]) == 1.0


def test_a_run_stops_when_the_held_out_loss_has_not_fallen_for_as_long_as_one_has_patience() -> None:
    at = sft.Standing()
    for loss in (3.0, 2.0, 2.5):
        at.judge(loss)
    assert (at.best, at.worse) == (2.0, 1)
    at.judge(2.0)
    assert at.worse == 2  # as good is not better
    at.judge(1.9)
    assert (at.best, at.worse) == (1.9, 0)


def test_early_stopping_gives_the_best_checkpoint_back(
    in_environment: RunningService, tmp_path: Path
) -> None:
    """A rate far too high: the loss only rises, so that the first evaluation stays the best; not the
    checkpoint that is saved between it and the next one."""
    hot = ["--learning-rate", "0.5", "--schedule", "constant", "--warmup-ratio", "0"]
    hot += ["--eval-every", "2", "--save-every", "3"]
    sft.main(
        [
            "--out",
            str(tmp_path),
            "--steps",
            "9",
            "--batch",
            "4",
            "--val-set-size",
            "0.01",
            "--patience",
            "2",
            *hot,
        ]
    )
    ended = result(tmp_path)
    assert ended["steps"] < 9
    losses = {
        row["step"] + 1: row["val_loss"] for row in read(tmp_path / "metrics.jsonl") if "val_loss" in row
    }
    best = min(losses, key=lambda step: losses[step])
    assert (ended["val_loss"], best) == (losses[best], 2)
    assert ended["path"].endswith("step-2")


@pytest.mark.parametrize("loss, first", [("dpo", LN_2), ("kto", 0.5)])
def test_a_preference_loss_begins_where_policy_and_reference_are_the_same(
    loss: str, first: float, in_environment: RunningService, tmp_path: Path
) -> None:
    few = ["--steps", "3", "--batch", "4", "--val-set-size", "0.03", "--learning-rate", "1e-3"]
    dpo.main(["--loss", loss, "--out", str(tmp_path), *few])
    rows = read(tmp_path / "metrics.jsonl")
    assert rows[0]["loss"] == first
    assert rows[-1]["loss"] < first
    assert result(tmp_path)["held_out_accuracy"] > 0.5


def test_orpo_needs_no_reference_and_falls(in_environment: RunningService, tmp_path: Path) -> None:
    few = ["--steps", "3", "--batch", "4", "--val-set-size", "0.03"]
    dpo.main(["--loss", "orpo", "--out", str(tmp_path), *few])
    losses = [row["loss"] for row in read(tmp_path / "metrics.jsonl")]
    assert losses[-1] < losses[0]


def test_a_sweep_trains_all_its_runs_at_once(in_environment: RunningService, tmp_path: Path) -> None:
    grid = ["--ranks", "4", "8", "--rates", "1e-5", "2e-3"]
    sweep.main(["--out", str(tmp_path), "--steps", "4", *grid])
    ended = result(tmp_path)
    assert len(ended["table"]) == 2
    assert ended["best_rate"] == 2e-3
    assert ended["grid_steps_between_ranks"] == 0
    assert ended["worst_loss"] > ended["best_loss"]
    assert len(read(tmp_path / "metrics.jsonl")[0]) == 1 + 4


def test_the_summary_of_a_sweep_survives_a_run_that_diverged() -> None:
    losses = {(4, 1e-3): 1.0, (4, 1e-2): math.nan, (8, 1e-3): 0.9, (8, 1e-2): 0.8}
    found = sweep.summary(losses)
    assert (found["best_loss"], found["best_rank"], found["best_rate"]) == (0.8, 8, 1e-2)
    assert found["grid_steps_between_ranks"] == 1
    assert found["worst_loss"] == math.inf


def test_tenants_get_the_bits_they_get_alone(in_environment: RunningService, tmp_path: Path) -> None:
    tenants.main(["--out", str(tmp_path), "--tenants", "3", "--steps", "3"])
    ended = result(tmp_path)
    assert ended["tenants_with_the_same_bits"] == 3
    assert [row["same bits"] for row in ended["table"]] == [True] * 3


def test_a_difference_of_one_bit_is_seen() -> None:
    one = tenants.Trained([1.0, 0.5], [np.float32([0.25, 0.5])])
    assert one.has_the_bits_of(tenants.Trained([1.0, 0.5], [np.float32([0.25, 0.5])]))
    assert not one.has_the_bits_of(
        tenants.Trained([1.0, 0.5], [np.nextafter(one.logprobs[0], np.float32(1))])
    )
    assert not one.has_the_bits_of(tenants.Trained([1.0, 0.5000001], one.logprobs))


def test_what_is_exported_is_what_was_trained(in_environment: RunningService, tmp_path: Path) -> None:
    """In PEFT's form and merged; the unembedding is trained too, and in this base tied to the embedding."""
    export.main(["--out", str(tmp_path), "--steps", "3"])
    ended = result(tmp_path)
    assert ended["peft_difference"] < 1e-4
    assert ended["merged_difference"] < 1e-4
    assert ended["untrained_difference"] > 0.1


FEW = {
    "hello": [],
    "sft": SFT[2:],
    "dpo": ["--batch", "2", "--val-set-size", "0.01"],
    "rl": ["--problems", "2", "--group", "4"],
}


@pytest.mark.parametrize("recipe", FEW)
def test_recipes_run_unchanged_with_the_official_sdk(
    recipe: str, in_environment: RunningService, tmp_path: Path
) -> None:
    """And take the same steps: where nothing is sampled the losses of both clients are the same numbers."""
    for sdk in ("tinsmith", "tinker"):
        command = [sys.executable, "-m", f"tinsmith_cookbook.recipes.{recipe}", "--steps", "2", *FEW[recipe]]
        done = subprocess.run(
            [*command, "--out", str(tmp_path / sdk)],
            env={**os.environ, "TINSMITH_SDK": sdk, "TINKER_TELEMETRY": "0"},
            capture_output=True,
            text=True,
            timeout=250,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = (read(tmp_path / sdk / "metrics.jsonl") for sdk in ("tinsmith", "tinker"))
    if recipe == "rl":  # what is sampled together is a matter of timing, and so are its last bits
        assert len(ours) == len(theirs) == 2
        assert ours[0]["reward"] == theirs[0]["reward"]
        assert max(abs(row["kl"]) for row in (*ours, *theirs)) < 1e-4
    else:
        assert ours == theirs


def test_sampled_answers_follow_their_seed_and_differ_within_a_request(running: RunningService) -> None:
    with tinsmith.ServiceClient(base_url=running.url, api_key=running.key) as client:
        training = client.create_lora_training_client("tinsmith/tiny", rank=4, seed=0).result()
        sampler = training.save_weights_and_get_sampling_client().result()
        renderer = Renderer.of(training)
        asked = [[{"role": "user", "content": "Tell me a story."}]] * 2
        first, again, other = (
            [r.message["content"] for r in answers.sampled(sampler, renderer, asked, seed=s, max_tokens=12)]
            for s in (0, 0, 1)
        )
        assert first == again
        assert first != other
        assert first[0] != first[1]
        prompt = tinsmith.ModelInput.from_ints(renderer.prompt(asked[0]))
        params = tinsmith.SamplingParams(max_tokens=12, seed=5)
        together = sampler.sample(prompt=prompt, num_samples=4, sampling_params=params).result()
        assert len({tuple(s.tokens) for s in together.sequences}) > 1


def test_sampler_and_trainer_give_the_same_logprobs_and_forward_gives_the_loss(
    running: RunningService,
) -> None:
    with tinsmith.ServiceClient(base_url=running.url, api_key=running.key) as client:
        training = client.create_lora_training_client("tinsmith/tiny", rank=4, seed=0).result()
        renderer = Renderer.of(training)
        (example,) = renderer.examples([hello.QUESTION, hello.ANSWER])
        datum = data.datum(example)
        for _ in range(2):
            training.forward_backward([datum], "cross_entropy")
            training.optim_step(tinsmith.AdamParams(learning_rate=1e-3)).result()
        seen = training.forward([datum], "cross_entropy").result()
        trained = seen.loss_fn_outputs[0]["logprobs"].to_numpy()
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        assert seen.metrics["loss:sum"] == pytest.approx(-float((trained * weights).sum()), rel=1e-5)
        assert seen.metrics["loss:sum"] > 0

        sampler = training.save_weights_and_get_sampling_client().result()
        scored = sampler.compute_logprobs(tinsmith.ModelInput.from_ints(example.tokens)).result()
        assert scored[0] is None
        np.testing.assert_allclose(np.array(scored[1:], np.float64), trained, atol=1e-4)
        prompt = tinsmith.ModelInput.from_ints(renderer.prompt([hello.QUESTION]))
        params = tinsmith.SamplingParams(max_tokens=8, seed=1)
        drawn = sampler.sample(prompt=prompt, num_samples=1, sampling_params=params).result().sequences[0]
        whole = tinsmith.ModelInput.from_ints([*prompt.to_ints(), *drawn.tokens])
        again = sampler.compute_logprobs(whole).result()[-len(drawn.tokens) :]
        np.testing.assert_allclose(np.array(again, np.float64), drawn.logprobs, atol=1e-4)
