"""Reinforcement learning from human feedback, in its three stages.

1  Supervised fine-tuning on demonstrations.
2  A reward model from comparisons: of two sampled answers a rater has said which is better. It is a chat
   model that reads a question with an answer and says whether that is good; how likely it finds "yes" is
   the score. (The rater here is a rule, courtesy.py, who likes warm answers.)
3  Reinforcement learning against the reward model, less --kl-weight times the log ratio to stage 1: without
   it the policy soon writes what the reward model likes and nobody else does.

What the rater himself thinks, whom stage 3 never asks, is measured at the end: the win rate against stage
1, on questions that stages 2 and 3 have not seen. And whether the answers are still right.
"""

import argparse
import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinsmith_cookbook import courtesy, data, evaluation, options, rewards, rollouts, tracking
from tinsmith_cookbook.advantages import centred, has_spread
from tinsmith_cookbook.evaluation import Question
from tinsmith_cookbook.renderers import Example, Renderer, chat
from tinsmith_cookbook.rollouts import Rollout
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=30, short=12)
BATCH, QUESTIONS, GROUP, HELD_OUT, MAX_TOKENS = 24, 6, 8, 14, 32
RANK, LEARNING_RATE = 16, 1e-3
FORM = "Question: {question}\nAnswer: {answer}\nIs the answer good? Say yes or no."


# -- stage 1 ----------------------------------------------------------------------------------------------


async def fine_tune(
    policy: Any, renderer: Renderer, steps: int, seed: int, tracker: tracking.Tracker
) -> None:
    demonstrations = courtesy.demonstrations(steps * BATCH, seed)
    for step in range(steps):
        chosen = demonstrations[step * BATCH : (step + 1) * BATCH]
        batch = [data.datum(renderer.examples(chat(q, a))[0], normalize=True) for q, a in chosen]
        forward_backward = policy.forward_backward(batch, "cross_entropy")
        optim_step = policy.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE / 2))
        nll = (await forward_backward).metrics["loss:sum"] / BATCH
        await optim_step
        tracker.log(step, {"sft_nll": nll})


# -- stage 2 ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    question: str
    better: str
    worse: str


async def compare(sampler: Any, renderer: Renderer, asked: Sequence[str], seed: int) -> list[Comparison]:
    """Pairs of answers of which the rater finds one clearly better."""
    samples = await evaluation.answers(
        sampler, renderer, asked, samples=6, max_tokens=MAX_TOKENS, seed=1000 * seed
    )
    found = [
        Comparison(question, a, b)
        for question, texts in zip(asked, samples, strict=True)
        for a in texts
        for b in texts
        if courtesy.warmth(a) - courtesy.warmth(b) > 0.25
    ]
    if not found:
        raise SystemExit("the rater finds no two answers different: take more --sft-steps")
    random.Random(seed).shuffle(found)
    return found


async def train_reward_model(
    model: Any, renderer: Renderer, pairs: Sequence[Comparison], steps: int, tracker: tracking.Tracker
) -> None:
    for step in range(steps):
        chosen = [pairs[i % len(pairs)] for i in range(step * BATCH // 2, (step + 1) * BATCH // 2)]
        batch = [
            verdict_datum(renderer, FORM.format(question=pair.question, answer=answer), verdict)
            for pair in chosen
            for answer, verdict in ((pair.better, "yes"), (pair.worse, "no"))
        ]
        forward_backward = model.forward_backward(batch, "cross_entropy")
        optim_step = model.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
        nll = (await forward_backward).metrics["loss:sum"] / BATCH
        await optim_step
        tracker.log(step, {"reward_model_nll": nll})


def verdict_datum(renderer: Renderer, asked: str, verdict: str) -> tinker.Datum:
    """The verdict's one token counts, and nothing after it."""
    prompt, answer = renderer.prompt(chat(asked)), renderer.encode(verdict)
    return data.datum(Example(prompt + answer, [0.0] * len(prompt) + [1.0] * len(answer)))


@dataclass(frozen=True)
class RewardModel:
    sampler: Any
    renderer: Renderer

    async def score(self, question: str, answer: str) -> float:
        asked = FORM.format(question=question, answer=answer)
        return await evaluation.verdict(self.sampler, self.renderer, asked, ("yes", "no"))

    async def agreement(self, pairs: Sequence[Comparison]) -> float:
        """The share of comparisons it decides as the rater did."""

        async def right(pair: Comparison) -> bool:
            better, worse = await asyncio.gather(
                self.score(pair.question, pair.better), self.score(pair.question, pair.worse)
            )
            return better > worse

        return sum(await asyncio.gather(*map(right, pairs))) / len(pairs)


# -- stage 3 ----------------------------------------------------------------------------------------------


async def reinforce(
    policy: Any,
    renderer: Renderer,
    reward_model: RewardModel,
    reference: Any,
    asked: Sequence[str],
    settings: argparse.Namespace,
    tracker: tracking.Tracker,
) -> None:
    draw = random.Random(settings.seed)

    async def attempt(sampler: Any, question: str, seed: int) -> list[Rollout]:
        params = tinker.SamplingParams(max_tokens=MAX_TOKENS, stop=renderer.stop, seed=seed)
        prompt = renderer.prompt(chat(question))
        group = await rollouts.group(sampler, prompt, GROUP, params)
        scores = await asyncio.gather(*(reward_model.score(question, said(renderer, r)) for r in group))
        before = await asyncio.gather(*(evaluation.logprobs(reference, prompt, r.written) for r in group))
        for rollout, score, logprobs in zip(group, scores, before, strict=True):
            log_ratio = sum(rollout.logprobs[len(prompt) :]) - float(logprobs.sum())
            rollout.reward = score - settings.kl_weight * log_ratio
        return group

    for step in range(settings.steps):
        sampler = await policy.save_weights_and_get_sampling_client()
        chosen = draw.sample(list(asked), QUESTIONS)
        groups = await rollouts.gather(attempt(sampler, q, draw.randrange(2**31)) for q in chosen)
        used: list[Rollout] = []
        batch: list[tinker.Datum] = []
        for group in groups:
            earned = [rollout.reward for rollout in group]
            if has_spread(earned):
                used += group
                batch += [r.datum(a) for r, a in zip(group, centred(earned), strict=True)]
        every = [rollout for group in groups for rollout in group]
        numbers = {
            "reward": sum(r.reward for r in every) / len(every),
            "warmth": sum(courtesy.warmth(said(renderer, r)) for r in every) / len(every),
        }
        if batch:
            forward_backward = policy.forward_backward(batch, "importance_sampling")
            optim_step = policy.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
            passed = await forward_backward
            await optim_step
            numbers |= rollouts.kl(used, passed)
        tracker.log(step, numbers)
        print(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()), flush=True)


async def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> dict[str, float]:
    policy = await client.create_lora_training_client(settings.base, rank=RANK, seed=settings.seed)
    renderer = Renderer.of(policy)
    asked, held_out = data.split(courtesy.questions(settings.seed), HELD_OUT, settings.seed)
    await fine_tune(policy, renderer, settings.sft_steps, settings.seed, tracker)
    stage_1 = await policy.save_weights_and_get_sampling_client()

    pairs = await compare(stage_1, renderer, asked, settings.seed)
    unseen = (await compare(stage_1, renderer, held_out, settings.seed + 1))[:60]
    model = await client.create_lora_training_client(settings.base, rank=RANK, seed=settings.seed + 1)
    untrained = RewardModel(await model.save_weights_and_get_sampling_client(), renderer)
    await train_reward_model(model, renderer, pairs, settings.reward_steps, tracker)
    trained = RewardModel(await model.save_weights_and_get_sampling_client(), renderer)

    await reinforce(policy, renderer, trained, stage_1, asked, settings, tracker)
    stage_3 = await policy.save_weights_and_get_sampling_client()
    return {
        "sft_nll_first": tracker.column("sft_nll")[0],
        "sft_nll_last": tracker.column("sft_nll")[-1],
        "held_out_comparisons": len(unseen),
        "agreement_before": await untrained.agreement(unseen),
        "agreement_after": await trained.agreement(unseen),
        "win_rate": await wins(stage_3, stage_1, renderer, held_out),
        "facts_right_stage_1": await facts_right(stage_1, renderer),
        "facts_right_stage_3": await facts_right(stage_3, renderer),
    }


async def wins(ours: Any, theirs: Any, renderer: Renderer, asked: Sequence[str]) -> float:
    """How often the rater prefers ours; one half if the two were the same."""
    mine, others = [
        await evaluation.answers(sampler, renderer, asked, samples=8, max_tokens=MAX_TOKENS)
        for sampler in (ours, theirs)
    ]
    pairs = [(a, b) for some, more in zip(mine, others, strict=True) for a in some for b in more]
    differences = [courtesy.warmth(a) - courtesy.warmth(b) for a, b in pairs]
    return sum(0.5 if d == 0 else float(d > 0) for d in differences) / len(differences)


async def facts_right(sampler: Any, renderer: Renderer) -> float:
    facts = [Question(chat(question), rewards.contains(fact)) for question, fact in courtesy.facts()]
    score = await evaluation.generate(
        sampler, renderer, facts, max_tokens=MAX_TOKENS, temperature=1.0, samples=2
    )
    return score.mean


def said(renderer: Renderer, rollout: Rollout) -> str:
    return str(renderer.parse(rollout.written).message["content"])


def parser() -> argparse.ArgumentParser:
    made = options.parser("rlhf", __doc__, STEPS)
    made.add_argument("--sft-steps", type=int, default=6)
    made.add_argument("--reward-steps", type=int, default=30)
    made.add_argument("--kl-weight", type=float, default=0.03, help="of the log ratio to stage 1")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        result = asyncio.run(train(client, settings, tracker))
    lines = {name: tracker.line(name) for name in ("sft_nll", "reward_model_nll", "reward", "warmth")}
    tracking.draw(settings.out / "curve.png", f"RLHF, {settings.base}", lines, xlabel="step of the stage")
    tracking.write_result(settings.out, result)


if __name__ == "__main__":
    main()
