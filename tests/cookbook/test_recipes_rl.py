"""The recipes for reinforcement learning: their rules by hand, and their loops against a service, small."""

import asyncio
import json
import math
import random
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinsmith
from tests.conftest import RunningService
from tinsmith_cookbook import courtesy, evaluation, rollouts, tictactoe, villagers
from tinsmith_cookbook.recipes import distill, rl, self_play, synthetic, tool_use
from tinsmith_cookbook.renderers import Renderer, chat
from tinsmith_cookbook.subjects import SUBJECTS
from tinsmith_cookbook.tictactoe import Board
from tinsmith_cookbook.tracking import Tracker

# What is asked here does not depend on how the service is put together.
embedded = pytest.mark.parametrize("service", ["embedded"], indirect=True)

MODEL = "tinsmith/tiny"


# -- tic-tac-toe ------------------------------------------------------------------------------------------


def test_a_game_of_tic_tac_toe() -> None:
    board = Board()
    for cell in (0, 3, 1, 4):
        board = board.play(cell)
    assert (board.turn, board.is_over, board.free) == ("X", False, [2, 5, 6, 7, 8])
    assert str(board) == "X X 3\nO O 6\n7 8 9"
    assert board.play(2).winner == "X"
    with pytest.raises(ValueError, match="taken"):
        board.play(0)
    texts = {"3": 2, " 9\n": 8, "1": None, "10": None, "3 ": 2, "x": None, "": None, "²": None, "0": None}
    assert {text: tictactoe.read_move(text, board) for text in texts} == texts


def test_the_perfect_player_never_loses_and_wins_what_can_be_won() -> None:
    for seed in range(40):
        draw, board = random.Random(seed), Board()
        side = "XO"[seed % 2]
        while not board.is_over:
            choose = tictactoe.best_move if board.turn == side else tictactoe.random_move
            board = board.play(choose(board, draw))
        assert board.winner in ("", side)
    assert tictactoe.best_move(Board("XX OO    "), random.Random(0)) == 2


# -- the calculator ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expression, said",
    [
        ("12 * 34", "408"),
        (" (1+2)*3-4 ", "5"),
        ("2 ** 99999999", "error"),
        ("1/0", "error"),
        ("__import__('os')", "error"),
        ("True + 1", "error"),
        ("9" * 70, "error"),
        ("(" * 50, "error"),
        ("1.5 + 1", "error"),
        ("", "error"),
        ("12 apples", "error"),
    ],
)
def test_the_calculator_reads_sums_and_nothing_else(expression: str, said: str) -> None:
    assert tool_use.calculate(expression).startswith(said)


def test_a_call_that_is_wrong_is_told_so() -> None:
    assert tool_use.use({"name": "calculator", "arguments": {"expression": "1 + 1"}}) == "2"
    for call in ({"name": "rm", "arguments": {}}, {"name": "calculator", "arguments": {"expression": 3}}):
        assert tool_use.use(call).startswith("error")


# -- toys -------------------------------------------------------------------------------------------------


def test_the_rater_likes_what_the_rubric_says() -> None:
    warm, curt = "I am glad to hear that! Can I help you?", "ok"
    assert courtesy.warmth(warm) == pytest.approx(1.0)
    assert courtesy.warmth(curt) == pytest.approx(0.1)
    assert courtesy.warmth(f"{warm} {'And so on. ' * 30}") < courtesy.warmth(warm)
    assert len(set(courtesy.questions(1))) == len(courtesy.questions()) == len(courtesy.questions(1))
    assert {q for q, _ in courtesy.facts()} < set(courtesy.questions())


def test_documents_say_what_the_examination_asks_and_checks_keep_only_that() -> None:
    made = villagers.documents(4, 0)
    for document in made:
        for who, facts in document.facts.items():
            assert all(
                villagers.KINDS[kind].told.format(who=who, fact=fact) in document.text
                for kind, fact in facts.items()
            )
    document = made[0]
    who, facts = next(iter(document.facts.items()))
    question = f"How old is {who}?"
    pair = synthetic.Pair("age", question, f"{who} is {facts['age']} years old.", document.text, 1.0)
    bad = [
        replace(pair, agreement=0.3),
        replace(pair, answer="one hundred"),
        replace(pair, answer=document.text.split("Write to")[0].strip()),
        replace(pair, answer=f"{who.lower()}@example.org"),
        pair,
    ]
    kept, fallen = synthetic.checked([pair, *bad])
    assert kept == [pair]
    assert fallen == {
        "samples disagree": 1,
        "not in the document": 1,
        "wrong form": 1,
        "personal data": 1,
        "nearly the same": 1,
        "too many of a kind": 0,
    }
    asked = [other.question for other in synthetic.rephrased([pair])]
    assert asked == [question, f"What is the age of {who}?", f"Tell me how old {who} is."]
    assert villagers.KINDS["age"].examined.format(who=who) not in asked


def test_games_that_end_all_alike_teach_nothing_and_end_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A player who never loses to itself only draws: there is no advantage to train on."""

    class Training:
        async def save_weights_and_get_sampling_client(self) -> None:
            pass

    class Client:
        async def create_lora_training_client(self, *args: Any, **kwargs: Any) -> Training:
            return Training()

    async def drawn(*args: Any, **kwargs: Any) -> self_play.Game:
        return self_play.Game(Board("XOXXOOOXX"))

    async def standing(*args: Any) -> dict[str, dict[str, float]]:
        return {who: {"won": 0.0, "lost": 0.0} for who in ("random", "perfect")}

    for name, stand_in in (("play", drawn), ("standing", standing)):
        monkeypatch.setattr(self_play, name, stand_in)
    monkeypatch.setattr(self_play.Renderer, "of", lambda _: None)
    client: Any = Client()
    with Tracker(tmp_path) as tracker:
        asyncio.run(self_play.train(client, Namespace(base="m", seed=0, steps=2), tracker))
        assert tracker.column("draws") == [1.0, 1.0]


@pytest.mark.parametrize(
    "wrong", [["--group", "1"], ["--behind", "-1"], ["--problems", "0"], ["--updates", "0"]]
)
def test_settings_that_would_train_on_nothing_are_refused(
    wrong: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        rl.main([*wrong, "--out", str(tmp_path)])
    assert "must be at least" in capsys.readouterr().err


# -- against a service ------------------------------------------------------------------------------------


@pytest.fixture
def small(service: RunningService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINSMITH_BASE_URL", service.url)
    monkeypatch.setenv("TINSMITH_API_KEY", service.key)
    monkeypatch.setattr(rl, "GROUP", 4)
    monkeypatch.setattr(rl, "HELD_OUT", 4)
    # Whatever the base knows: different answers earn different rewards.
    monkeypatch.setattr(rl.rewards, "number", lambda _: lambda text: float(sum(map(ord, text)) % 10))


def rows(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@embedded
@pytest.mark.parametrize("loss", rl.LOSSES)
def test_every_loss_trains_on_what_was_sampled(small: None, tmp_path: Path, loss: str) -> None:
    rl.main(["--steps", "2", "--problems", "3", "--out", str(tmp_path), "--loss", loss])
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [0, 1]
    # On-policy: the trainer's distribution is the sampler's.
    assert all(abs(row["kl"]) < 1e-4 and row["kl_k2"] < 1e-6 for row in found if "kl" in row)
    assert any("kl" in row for row in found)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "result.json").read_text())["loss"] == loss


@embedded
@pytest.mark.parametrize("method, teacher", [("off", "shown"), ("on", "two"), ("topk", "shown")])
def test_every_way_to_distill_draws_the_student_to_the_teacher(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, teacher: str
) -> None:
    for name, value in {"PROMPTS": 4, "SAMPLES": 2, "TEACHER_STEPS": 2, "HELD_OUT": 2}.items():
        monkeypatch.setattr(distill, name, value)
    distill.main(["--steps", "2", "--out", str(tmp_path), "--method", method, "--teacher", teacher])
    found = rows(tmp_path)
    assert [row["step"] for row in found] == [0, 1]
    assert all(math.isfinite(row["loss"]) for row in found)
    assert all(("reverse_kl" in row) == (method != "off") for row in found)
    ended = json.loads((tmp_path / "result.json").read_text())
    assert {"teacher_0", "teacher_1"} <= set(ended) if teacher == "two" else "teacher" in ended


@embedded
def test_soft_targets_are_what_the_teacher_would_have_written(run: tinsmith.TrainingClient) -> None:
    """At each place that the student wrote, the teacher's likeliest tokens with their probabilities; it reads
    more than the student does."""
    renderer, subject = Renderer.of(run), SUBJECTS["shown"][0]
    sampler = run.save_weights_and_get_sampling_client().result()
    question, _ = subject.draw(random.Random(0))
    params = tinsmith.SamplingParams(max_tokens=6, seed=0, stop=renderer.stop)
    prompts = renderer.prompt(chat(question)), renderer.prompt(subject.teachers(question))
    assert len(prompts[1]) > len(prompts[0]) + 20
    lesson = distill.Lesson(*prompts, sampler, sampler, params)
    for datum, reverse_kl in asyncio.run(distill.top_k(lesson)):
        targets = datum.loss_fn_inputs["target_tokens"].to_numpy()
        weights = datum.loss_fn_inputs["weights"].to_numpy()
        read = len(prompts[0]) - 1
        written = len(targets) - read
        assert not weights[:read].any()
        assert weights[read:].sum(1) == pytest.approx(1 / written, rel=1e-5)
        scored = asyncio.run(
            evaluation.next_token_logprobs(sampler, prompts[1], [int(t) for t in targets[read]])
        )
        odds = np.exp(scored)
        assert weights[read] * written == pytest.approx(odds / odds.sum(), abs=1e-3)
        assert math.isfinite(reverse_kl)


@embedded
def test_behind_trains_on_older_samples_and_says_so(small: None, tmp_path: Path) -> None:
    rl.main(
        [
            "--steps",
            "3",
            "--problems",
            "3",
            "--out",
            str(tmp_path),
            "--behind",
            "1",
            "--learning-rate",
            "0.01",
        ]
    )
    found = rows(tmp_path)
    assert len(found) == 3
    assert found[0]["kl_k2"] < 1e-6
    assert found[1]["kl_k2"] > 1e-5  # one step of weights between sampler and trainer


@pytest.fixture
def run(service: RunningService) -> Iterator[tinsmith.TrainingClient]:
    client = tinsmith.ServiceClient(base_url=service.url, api_key=service.key)
    yield client.create_lora_training_client(MODEL, rank=8, seed=1).result()
    client.close().result()


@embedded
def test_a_seed_repeats_a_group_whose_samples_differ(run: tinsmith.TrainingClient) -> None:
    renderer = Renderer.of(run)
    sampler = run.save_weights_and_get_sampling_client().result()
    prompt = renderer.prompt([{"role": "user", "content": "Tell me a story."}])

    def sampled(seed: int) -> list[list[int]]:
        params = tinsmith.SamplingParams(max_tokens=12, seed=seed, stop=renderer.stop)
        return [r.written for r in asyncio.run(rollouts.group(sampler, prompt, 6, params))]

    first = sampled(1)
    assert sampled(1) == first
    assert sampled(2) != first
    assert len({tuple(tokens) for tokens in first}) > 1


@embedded
def test_tool_output_is_read_and_only_the_models_turns_are_trained_on(
    run: tinsmith.TrainingClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base may or may not call the tool: its first turn is written for it, the second it writes itself."""
    renderer = Renderer.of(run)
    sampler = run.save_weights_and_get_sampling_client().result()
    called = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "12 * 34"}}\n</tool_call>'
    call = renderer.encode(called + renderer.end_of_turn)
    asked = [{"role": "user", "content": "What is 12 * 34?"}]

    class Scripted:
        turns = 0

        async def sample(self, prompt: Any, num_samples: int, sampling_params: Any) -> Any:
            Scripted.turns += 1
            if Scripted.turns > 1:
                return await sampler.sample(prompt, num_samples, sampling_params)
            scored = await sampler.compute_logprobs(tinsmith.ModelInput.from_ints(prompt.to_ints() + call))
            sequence = tinsmith.types.SampledSequence(
                stop_reason="stop",
                sequence_id="scripted",
                tokens_np=np.asarray(call, np.int32),
                logprobs_np=np.asarray(scored[-len(call) :], np.float32),
            )
            return tinsmith.types.SampleResponse([sequence])

    rollout, messages = asyncio.run(tool_use.episode(Scripted(), renderer, "What is 12 * 34?", 408, seed=1))
    assert Scripted.turns >= 2
    assert messages[2] == {"role": "tool", "content": "408"}
    # The sequence is what the template makes of the conversation, up to the last turn's own words.
    shown = renderer.text(
        [*asked, {"role": "assistant", "content": called}, messages[2]], [tool_use.CALCULATOR]
    )
    text = renderer.decode(rollout.tokens)
    assert text.startswith(shown.rstrip("\n"))
    own = renderer.decode(rollout.written)
    assert own.startswith(called)
    assert "tool_response" not in own.replace(called, "")
    datum = rollout.datum(1.0)
    trained = np.asarray(datum.loss_fn_inputs["advantages"].to_numpy()) != 0
    assert trained.sum() == len(rollout.written)
    passed = run.forward([datum], "importance_sampling").result()
    assert rollouts.kl([rollout], passed)["kl_k2"] < 1e-6
