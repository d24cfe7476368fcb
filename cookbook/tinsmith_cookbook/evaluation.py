"""A small evaluation harness over samplers: generation with a reward, multiple choice, perplexity, win rates.

Everything is asked at once and awaited together. A score is a mean over questions with its standard error.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tinsmith_cookbook.renderers import Example, Message, Renderer
from tinsmith_cookbook.rewards import Reward
from tinsmith_cookbook.sdk import tinker


@dataclass(frozen=True)
class Question:
    """What is asked, and how an answer is judged (rewards.number("4"), rewards.exact("yes"), …)."""

    messages: list[Message]
    reward: Reward
    tools: Sequence[Any] | None = None


@dataclass(frozen=True)
class Score:
    """values[i] belongs to question i; answers, where there are texts, too."""

    values: list[float]
    answers: list[str] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def standard_error(self) -> float:
        """Of the mean, over questions. Two scores closer than twice this may be the same."""
        count = len(self.values)
        return float(np.std(self.values, ddof=1) / math.sqrt(count)) if count > 1 else math.inf

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.standard_error:.3f}"


# -- generation ---------------------------------------------------------------------------------------------


async def answers(
    sampler: Any,
    renderer: Renderer,
    asked: Sequence[Question | str],
    *,
    max_tokens: int,
    samples: int = 1,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[list[str]]:
    """The texts of `samples` answers to each question; the same seed gives the same ones."""

    async def one(at: int, question: Question | str) -> list[str]:
        if isinstance(question, str):
            prompt = renderer.prompt([{"role": "user", "content": question}])
        else:
            prompt = renderer.prompt(question.messages, question.tools)
        params = tinker.SamplingParams(
            max_tokens=max_tokens, temperature=temperature, seed=seed + at, stop=renderer.stop
        )
        answer = await sampler.sample(
            prompt=tinker.ModelInput.from_ints(prompt), num_samples=samples, sampling_params=params
        )
        return [str(renderer.parse(s.tokens).message["content"]) for s in answer.sequences]

    return list(await asyncio.gather(*(one(at, question) for at, question in enumerate(asked))))


async def generate(
    sampler: Any,
    renderer: Renderer,
    questions: Sequence[Question],
    *,
    max_tokens: int,
    temperature: float = 0.0,
    samples: int = 1,
    seed: int = 0,
) -> Score:
    """Mean reward of `samples` answers to each question. temperature 0: greedy, the same every time."""
    texts = await answers(
        sampler,
        renderer,
        questions,
        max_tokens=max_tokens,
        samples=samples,
        temperature=temperature,
        seed=seed,
    )
    rewards = [
        float(np.mean([question.reward(text) for text in some]))
        for question, some in zip(questions, texts, strict=True)
    ]
    return Score(rewards, [some[0] for some in texts])


# -- likelihood ---------------------------------------------------------------------------------------------


async def logprobs(
    sampler: Any, prompt: Sequence[int], continuation: Sequence[int]
) -> npt.NDArray[np.float64]:
    """The logprob of each token of `continuation` after `prompt`."""
    if not prompt or not continuation:
        raise ValueError("both the prompt and its continuation need at least one token")
    scored = await sampler.compute_logprobs(
        tinker.ModelInput.from_ints([*prompt, *continuation]), prompt_logprobs_last_n=len(continuation)
    )
    return np.asarray(scored[-len(continuation) :], np.float64)


async def next_token_logprobs(
    sampler: Any, prompt: Sequence[int], candidates: Sequence[int]
) -> npt.NDArray[np.float64]:
    """The logprob of each of `candidates` as the token right after `prompt`, in one call."""
    asked = np.full((len(prompt), len(candidates)), -1, np.int64)
    asked[-1] = candidates
    answer = await sampler.sample(
        prompt=tinker.ModelInput.from_ints([*prompt, candidates[0]]),
        num_samples=1,
        sampling_params=tinker.SamplingParams(max_tokens=1),
        target_prompt_logprobs=tinker.TensorData.from_numpy(asked),
    )
    return np.asarray(answer.target_prompt_logprobs.to_numpy()[-1], np.float64)


@dataclass(frozen=True)
class Choice:
    """A prompt and what may follow it, in tokens; `right` is the index of the right one."""

    prompt: list[int]
    choices: list[list[int]]
    right: int


async def multiple_choice(sampler: Any, items: Sequence[Choice], *, per_token: bool = False) -> Score:
    """The share where the right choice is the likeliest. per_token: by the mean over a choice's tokens, so
    that long ones are not at a disadvantage."""

    async def one(item: Choice) -> float:
        scored = await asyncio.gather(*(logprobs(sampler, item.prompt, choice) for choice in item.choices))
        totals = [p.mean() if per_token else p.sum() for p in scored]
        return float(int(np.argmax(totals)) == item.right)

    return Score(list(await asyncio.gather(*(one(item) for item in items))))


async def perplexity(sampler: Any, examples: Sequence[Example]) -> float:
    """exp of the mean negative logprob over all tokens that count, of all examples together."""

    async def one(example: Example) -> tuple[float, float]:
        weights = np.asarray(example.weights[1:])
        found = await logprobs(sampler, example.tokens[:1], example.tokens[1:])
        return float((weights * found)[weights != 0].sum()), float(weights.sum())

    sums = await asyncio.gather(*(one(example) for example in examples))
    return math.exp(-sum(total for total, _ in sums) / sum(weight for _, weight in sums))


# -- comparison ---------------------------------------------------------------------------------------------

Judge = Callable[[str, str, str], Awaitable[float]]
"""(question, answer a, answer b) -> how likely a is the better one, 0 to 1."""


@dataclass(frozen=True)
class WinRate:
    """rate: the mean over pairs, both orders averaged. position_bias: how much more than half the first
    place gets, whoever stands there. consistent: the share of pairs where both orders name the same
    winner."""

    rate: float
    standard_error: float
    position_bias: float
    consistent: float


async def win_rate(
    judge: Judge, questions: Sequence[str], ours: Sequence[str], theirs: Sequence[str]
) -> WinRate:
    """How often `ours` beats `theirs`. Each pair is judged in both orders, so that a judge who likes the
    first answer whatever it says gives one half; equal texts are a tie and are not judged."""

    async def pair(question: str, a: str, b: str) -> tuple[float, float] | None:
        if a == b:
            return None
        first, second = await asyncio.gather(judge(question, a, b), judge(question, b, a))
        return first, second

    pairs = zip(questions, ours, theirs, strict=True)
    judged = await asyncio.gather(*(pair(question, a, b) for question, a, b in pairs))
    rates = [0.5 if both is None else (both[0] + 1 - both[1]) / 2 for both in judged]
    differing = [both for both in judged if both is not None]
    score = Score(rates)
    if not differing:
        return WinRate(score.mean, score.standard_error, 0.0, 1.0)
    return WinRate(
        score.mean,
        score.standard_error,
        float(np.mean([(first + second) / 2 - 0.5 for first, second in differing])),
        float(np.mean([(first > 0.5) == (second < 0.5) for first, second in differing])),
    )


async def verdict(sampler: Any, renderer: Renderer, asked: str, verdicts: tuple[str, str]) -> float:
    """How likely the model's answer begins with the first of two verdicts rather than with the second, 0 to
    1. Each must be one token of the model."""
    tokens = [renderer.encode(one) for one in verdicts]
    if any(len(one) != 1 for one in tokens):
        raise ValueError(f"the verdicts {verdicts} must be one token each for this model, and are {tokens}")
    prompt = renderer.prompt([{"role": "user", "content": asked}])
    first, second = await next_token_logprobs(sampler, prompt, [token for (token,) in tokens])
    return float(1 / (1 + math.exp(min(second - first, 700.0))))


@dataclass(frozen=True)
class ModelJudge:
    """A sampler as judge: it reads `form` with {question}, {a} and {b} filled in and says A or B.

    judge = ModelJudge(sampler, renderer, "A: {a}\\nB: {b}\\nWhich is more polite, A or B?")
    """

    sampler: Any
    renderer: Renderer
    form: str
    verdicts: tuple[str, str] = ("A", "B")

    async def __call__(self, question: str, a: str, b: str) -> float:
        asked = self.form.format(question=question, a=a, b=b)
        return await verdict(self.sampler, self.renderer, asked, self.verdicts)
