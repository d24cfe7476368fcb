"""The harness: what can be worked out by hand, and the rest against a real service and the real lm-eval."""

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import tinsmith
from tests.conftest import RunningService
from tinsmith_cookbook import evaluation, rewards
from tinsmith_cookbook.evaluation import Choice, ModelJudge, Question, WinRate
from tinsmith_cookbook.renderers import Example, Renderer

MODEL = "tinsmith/tiny"


def judged(ours: list[str], theirs: list[str], judge: Any) -> WinRate:
    return asyncio.run(evaluation.win_rate(judge, ["?"] * len(ours), ours, theirs))


async def by_length(question: str, a: str, b: str) -> float:
    return float(len(a) > len(b))


async def always_first(question: str, a: str, b: str) -> float:
    return 1.0


def test_a_judge_who_likes_the_first_place_changes_nothing() -> None:
    found = judged(["long answer", "x"], ["short", "xyz"], always_first)
    assert (found.rate, found.position_bias, found.consistent) == (0.5, 0.5, 0.0)


def test_a_fair_judge_is_consistent() -> None:
    found = judged(["long answer", "x", "longer still"], ["short", "xyz", "no"], by_length)
    assert (found.rate, found.position_bias, found.consistent) == (pytest.approx(2 / 3), 0.0, 1.0)


def test_equal_answers_tie_without_being_judged() -> None:
    found = judged(["same", "same"], ["same", "same"], always_first)
    assert (found.rate, found.position_bias, found.consistent) == (0.5, 0.0, 1.0)


def test_a_score_says_how_sure_it_is() -> None:
    score = evaluation.Score([1.0, 0.0, 1.0, 1.0])
    assert score.mean == 0.75
    assert score.standard_error == pytest.approx(0.5 / math.sqrt(4))
    assert evaluation.Score([1.0]).standard_error == math.inf


# -- against a service ------------------------------------------------------------------------------------


# What is asked here does not depend on how the service is put together.
embedded = pytest.mark.parametrize("service", ["embedded"], indirect=True)


@pytest.fixture(scope="module")
def asked(service: RunningService) -> Iterator[tuple[tinsmith.SamplingClient, Renderer]]:
    client = tinsmith.ServiceClient(base_url=service.url, api_key=service.key)
    training = client.create_lora_training_client(MODEL, rank=8, seed=1).result()
    yield training.save_weights_and_get_sampling_client().result(), Renderer.of(training)
    client.close().result()


def logprobs_of(sampler: tinsmith.SamplingClient, tokens: list[int]) -> list[float]:
    found = sampler.compute_logprobs(tinsmith.ModelInput.from_ints(tokens)).result()
    return [p for p in found if p is not None]


@embedded
def test_logprobs_of_a_continuation_and_of_candidates(
    asked: tuple[tinsmith.SamplingClient, Renderer],
) -> None:
    sampler, renderer = asked
    prompt, tail = renderer.encode("The sum of 1 and"), renderer.encode(" 2 is 3")
    whole = logprobs_of(sampler, prompt + tail)
    found = asyncio.run(evaluation.logprobs(sampler, prompt, tail))
    np.testing.assert_allclose(found, whole[-len(tail) :], atol=1e-5)
    candidates = [tail[0], 7, 8]
    several = asyncio.run(evaluation.next_token_logprobs(sampler, prompt, candidates))
    expected = [logprobs_of(sampler, [*prompt, one])[-1] for one in candidates]
    np.testing.assert_allclose(several, expected, atol=1e-5)


@embedded
def test_multiple_choice_takes_the_likeliest(asked: tuple[tinsmith.SamplingClient, Renderer]) -> None:
    sampler, renderer = asked
    prompt = renderer.encode("Question")
    choices = [renderer.encode(text) for text in (" one", " quite a long one", " x y")]
    totals = [sum(logprobs_of(sampler, prompt + choice)[-len(choice) :]) for choice in choices]
    means = [total / len(choice) for total, choice in zip(totals, choices, strict=True)]
    items = [Choice(prompt, choices, int(np.argmax(totals))), Choice(prompt, choices, int(np.argmin(totals)))]
    assert asyncio.run(evaluation.multiple_choice(sampler, items)).values == [1.0, 0.0]
    by_mean = [Choice(prompt, choices, int(np.argmax(means)))]
    assert asyncio.run(evaluation.multiple_choice(sampler, by_mean, per_token=True)).mean == 1.0


@embedded
def test_perplexity_counts_weighted_tokens_only(asked: tuple[tinsmith.SamplingClient, Renderer]) -> None:
    sampler, renderer = asked
    one, two = renderer.encode("a lamp in the room"), renderer.encode("the river")
    examples = [Example(one, [0.0, 0.0] + [1.0] * (len(one) - 2)), Example(two, [1.0] * len(two))]
    found = logprobs_of(sampler, one)[1:] + logprobs_of(sampler, two)
    assert asyncio.run(evaluation.perplexity(sampler, examples)) == pytest.approx(
        math.exp(-np.mean(found)), rel=1e-4
    )


@embedded
def test_generation_is_scored_by_the_reward(asked: tuple[tinsmith.SamplingClient, Renderer]) -> None:
    sampler, renderer = asked
    asking = [{"role": "user", "content": "Hello"}]
    first = asyncio.run(
        evaluation.generate(sampler, renderer, [Question(asking, lambda text: len(text))], max_tokens=5)
    )
    said = first.answers[0]
    questions = [Question(asking, rewards.exact(said)), Question(asking, rewards.exact("something else"))]
    again = asyncio.run(evaluation.generate(sampler, renderer, questions, max_tokens=5))
    assert (again.values, again.answers) == ([1.0, 0.0], [said, said])


@embedded
def test_a_model_judges_by_the_likelier_verdict(asked: tuple[tinsmith.SamplingClient, Renderer]) -> None:
    sampler, renderer = asked
    judge = ModelJudge(sampler, renderer, "{question} A: {a} B: {b}. A or B?")
    prompt = renderer.prompt([{"role": "user", "content": "Which? A: x B: y. A or B?"}])
    odds = [logprobs_of(sampler, prompt + renderer.encode(verdict))[-1] for verdict in "AB"]
    expected = 1 / (1 + math.exp(odds[1] - odds[0]))
    assert asyncio.run(judge("Which?", "x", "y")) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="must be one token each"):
        asyncio.run(ModelJudge(sampler, renderer, "{a}{b}", ("maybe not", "B"))("", "x", "y"))


# -- lm-evaluation-harness --------------------------------------------------------------------------------


@embedded
def test_the_harness_of_eleuther_runs_on_a_sampler(
    asked: tuple[tinsmith.SamplingClient, Renderer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from tinsmith_cookbook.lm_harness import SamplerLM

    sampler, renderer = asked
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1), "wrong": "a lamp"} for n in range(6)]

    def load(**_: Any) -> Any:
        return {"test": datasets.Dataset.from_list(rows)}

    common = {"custom_dataset": load, "test_split": "test", "num_fewshot": 0}
    text = "{{question}}"
    tasks = [
        {
            "task": "choose",
            "output_type": "multiple_choice",
            "doc_to_text": text,
            "doc_to_choice": "{{[answer, wrong]}}",
            "doc_to_target": 0,
            **common,
        },
        {
            "task": "write",
            "output_type": "generate_until",
            "doc_to_text": text,
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match"}],
            **common,
        },
        {
            "task": "read",
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": text,
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
            **common,
        },
    ]
    model = SamplerLM(sampler, renderer)
    manager = TaskManager(include_defaults=False)  # reading all tasks it ships takes long
    done = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False)
    found = done["results"]

    stop = renderer.stop[:1]
    choices, read = [], 0.0
    for row in rows:
        prompt = renderer.encode(row["question"])
        scores = []
        for choice in (row["answer"], row["wrong"]):
            # The harness puts a space between the two.
            tokens = renderer.encode(f"{row['question']} {choice}")
            scores.append(sum(logprobs_of(sampler, tokens)[len(prompt) - 1 :]))
        choices.append(scores[0] > scores[1])
        read += sum(logprobs_of(sampler, stop + prompt))
    assert found["choose"]["acc,none"] == np.mean(choices)
    letters = sum(len(row["question"].encode()) for row in rows)
    assert found["read"]["byte_perplexity,none"] == pytest.approx(math.exp(-read / letters), rel=1e-4)
    assert 0 <= found["write"]["exact_match,none"] <= 1


@embedded
def test_long_texts_are_read_in_windows_each_token_once(
    asked: tuple[tinsmith.SamplingClient, Renderer],
) -> None:
    from tinsmith_cookbook.lm_harness import SamplerLM

    sampler, renderer = asked
    text = "the lamp is in the room and the river is wide and the moon is new"
    tokens = renderer.encode(text)
    model = SamplerLM(sampler, renderer, context=8)
    found = model.loglikelihood_rolling([SimpleNamespace(args=(text,))])[0]  # type: ignore[list-item]
    stop, expected = renderer.stop[:1], 0.0
    for start in range(0, len(tokens), 7):
        part = tokens[start : start + 7]
        context = tokens[max(0, start + len(part) - 8) : start] or stop
        expected += sum(logprobs_of(sampler, context + part)[-len(part) :])
    assert found == pytest.approx(expected, rel=1e-4)
    score, greedy = model.loglikelihood([SimpleNamespace(args=("", "lamp"))])[0]  # type: ignore[list-item]
    assert score == pytest.approx(sum(logprobs_of(sampler, stop + renderer.encode("lamp"))), abs=1e-3)
    assert greedy is False
