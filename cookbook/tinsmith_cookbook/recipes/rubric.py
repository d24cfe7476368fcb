"""A rubric as reward, and a judge for the win rate: answers are made warmer, point by point.

The reward of an answer is its score on a rubric (courtesy.RUBRIC), whose points are rules here; with
--judge model the reward is a language model's opinion instead: how likely it finds the answer more polite
than one of the base, averaged over both orders, so that a liking for the first place cancels out.

Whether a judge can be trusted is measured, not assumed: against the rubric, how often it is right about
pairs of the base's answers, how often both orders give the same verdict, and how much it leans to the first
place.
"""

import argparse
import asyncio
import random
from collections.abc import Sequence
from typing import Any

from tinsmith_cookbook import courtesy, data, evaluation, options, rollouts, tracking
from tinsmith_cookbook.advantages import centred, has_spread
from tinsmith_cookbook.evaluation import ModelJudge
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.rollouts import Rollout
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=30, short=12)
QUESTIONS, GROUP, MAX_TOKENS = 8, 8, 40
RANK, LEARNING_RATE = 16, 1e-3
FORM = "A: {a}\nB: {b}\nWhich is more polite, A or B?"


async def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    training = await client.create_lora_training_client(settings.base, rank=RANK, seed=settings.seed)
    renderer, draw = Renderer.of(training), random.Random(settings.seed)
    asked, held_out = data.split(courtesy.questions(settings.seed), 12, settings.seed)
    base = await training.save_weights_and_get_sampling_client()
    judge = ModelJudge(base, renderer, FORM)

    async def attempt(sampler: Any, question: str, seed: int) -> list[Rollout]:
        prompt = renderer.prompt([{"role": "user", "content": question}])
        params = tinker.SamplingParams(max_tokens=MAX_TOKENS, stop=renderer.stop, seed=seed)
        [other], group = await asyncio.gather(
            rollouts.group(base, prompt, 1, params), rollouts.group(sampler, prompt, GROUP, params)
        )

        async def reward(rollout: Rollout) -> float:
            ours, theirs = said(renderer, rollout), said(renderer, other)
            if settings.judge == "rubric":
                return courtesy.warmth(ours)
            first, second = await asyncio.gather(judge(question, ours, theirs), judge(question, theirs, ours))
            return (first + 1 - second) / 2

        for rollout, earned in zip(group, await asyncio.gather(*map(reward, group)), strict=True):
            rollout.reward = earned
        return group

    before = await evaluation.answers(base, renderer, held_out, samples=6, max_tokens=MAX_TOKENS)
    for step in range(settings.steps):
        sampler = await training.save_weights_and_get_sampling_client()
        chosen = draw.sample(list(asked), QUESTIONS)
        groups = await rollouts.gather(attempt(sampler, q, draw.randrange(2**31)) for q in chosen)
        used: list[Rollout] = []
        batch: list[tinker.Datum] = []
        for group in groups:
            earned = [rollout.reward for rollout in group]
            if has_spread(earned):
                used += group
                batch += [r.datum(a) for r, a in zip(group, centred(earned), strict=True)]
        texts = [said(renderer, rollout) for group in groups for rollout in group]
        numbers = {
            "reward": sum(r.reward for group in groups for r in group) / len(texts),
            "rubric": sum(map(courtesy.warmth, texts)) / len(texts),
            "words": sum(len(text.split()) for text in texts) / len(texts),
        }
        if batch:
            forward_backward = training.forward_backward(batch, "importance_sampling")
            optim_step = training.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
            passed = await forward_backward
            await optim_step
            numbers |= rollouts.kl(used, passed)
        tracker.log(step, numbers)
        print(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()), flush=True)

    trained = await training.save_weights_and_get_sampling_client()
    after = await evaluation.answers(trained, renderer, held_out, samples=6, max_tokens=MAX_TOKENS)
    table = [
        {"point": name, "before": share(before, reward), "after": share(after, reward)}
        for name, (reward, _) in courtesy.RUBRIC.items()
    ]
    result = {"rubric_before": share(before, courtesy.warmth), "rubric_after": share(after, courtesy.warmth)}
    return result | await win_rates(judge, held_out, before, after), table


async def win_rates(
    judge: ModelJudge, asked: Sequence[str], before: list[list[str]], after: list[list[str]]
) -> dict[str, float]:
    """After against before, by the rubric and by the model, both orders; and how good a judge the model
    is."""

    async def by_rubric(question: str, a: str, b: str) -> float:
        difference = courtesy.warmth(a) - courtesy.warmth(b)
        return 0.5 if difference == 0 else float(difference > 0)

    flat = [
        (q, a, b)
        for q, some, more in zip(asked, after, before, strict=True)
        for a, b in zip(some, more, strict=True)
    ]
    questions, ours, theirs = ([row[i] for row in flat] for i in range(3))
    rule = await evaluation.win_rate(by_rubric, questions, ours, theirs)
    model = await evaluation.win_rate(judge, questions, ours, theirs)
    # Pairs of one model's answers: nothing but the answers tells them apart.
    pairs = [(q, a, b) for q, some in zip(asked, before, strict=True) for a in some for b in some]
    pairs = [pair for pair in pairs if courtesy.warmth(pair[1]) > courtesy.warmth(pair[2])][:100]
    odds = await asyncio.gather(*(judge(q, *both) for q, a, b in pairs for both in ((a, b), (b, a))))
    right = [(first + 1 - second) / 2 > 0.5 for first, second in zip(odds[::2], odds[1::2], strict=True)]
    return {
        "win_rate_by_rubric": rule.rate,
        "win_rate_by_model": model.rate,
        "model_leans_to_first": model.position_bias,
        "model_consistent": model.consistent,
        "model_agrees_with_rubric": sum(right) / max(1, len(right)),
    }


def share(texts: list[list[str]], reward: Any) -> float:
    every = [reward(text) for some in texts for text in some]
    return float(sum(every) / len(every))


def said(renderer: Renderer, rollout: Rollout) -> str:
    return str(renderer.parse(rollout.written).message["content"])


def parser() -> argparse.ArgumentParser:
    made = options.parser("rubric", __doc__, STEPS)
    made.add_argument("--judge", choices=("rubric", "model"), default="rubric", help="what the reward is")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        result, table = asyncio.run(train(client, settings, tracker))
    lines = {name: tracker.line(name) for name in ("reward", "rubric")}
    tracking.draw(
        settings.out / "curve.png", f"Rubric, {settings.judge}, {settings.base}", lines, xlabel="step"
    )
    tracking.write_result(settings.out, {"judge": settings.judge, **result}, table)


if __name__ == "__main__":
    main()
