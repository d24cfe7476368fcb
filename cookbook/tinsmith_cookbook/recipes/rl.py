"""Reinforcement learning with verifiable rewards: sums, right or wrong (GRPO: no critic, no reward model).

Each step samples a group of answers to every problem, rewards those that give the right number, and trains
on how much better each was than its group. The base gets some sums wrong when it is sampled; the curve
shows that going away.

--behind K is the asynchronous form: step t trains on answers that were sampled K steps earlier, while those
for step t + K are being sampled; the losses weigh by the ratio of both policies. --loss takes any that the
service has for this (docs/losses.md; recipes/rl_losses.py compares them), --updates how often each batch is
trained on (PPO: 2 or more).
"""

import argparse
import asyncio
import random
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from tinsmith_cookbook import evaluation, options, rewards, rollouts, tracking
from tinsmith_cookbook.advantages import centred, has_spread
from tinsmith_cookbook.evaluation import Question
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.rollouts import Rollout
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=40, short=15)
GROUP, MAX_TOKENS, HELD_OUT = 8, 6, 150
RANK, LEARNING_RATE = 16, 1e-3
LOSSES = ("importance_sampling", "ppo", "cispo", "dro", "gspo", "stable_reinforce")


def problem(source: random.Random) -> Question:
    a, b = sorted((source.randrange(10, 100), source.randrange(10, 100)), reverse=True)
    sign = source.choice("+-")
    asked = f"What is {a} {sign} {b}? Answer with the number only."
    return Question([{"role": "user", "content": asked}], rewards.number(a + b if sign == "+" else a - b))


async def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> dict[str, Any]:
    training = await client.create_lora_training_client(settings.base, rank=settings.rank, seed=settings.seed)
    renderer = Renderer.of(training)
    source = random.Random(settings.seed)

    async def attempt(sampler: Any, asked: Question, seed: int) -> list[Rollout]:
        params = tinker.SamplingParams(max_tokens=MAX_TOKENS, stop=renderer.stop, seed=seed)
        # dro holds every token near its old logprob, those of the prompt too: it has to know them.
        needs_all = settings.loss == "dro"
        group = await rollouts.group(
            sampler, renderer.prompt(asked.messages), settings.group, params, prompt_logprobs=needs_all
        )
        for rollout in group:
            rollout.reward = asked.reward(renderer.parse(rollout.written).message["content"])
        return group

    before = await accuracy(training, renderer)
    under_way: deque[asyncio.Task[list[list[Rollout]]]] = deque()
    for step in range(settings.steps):
        started = time.perf_counter()
        while len(under_way) <= min(settings.behind, settings.steps - 1 - step):
            sampler = await training.save_weights_and_get_sampling_client(
                record_stability_info=settings.loss == "stable_reinforce"
            )
            batch = [
                attempt(sampler, problem(source), source.randrange(2**31)) for _ in range(settings.problems)
            ]
            under_way.append(asyncio.create_task(rollouts.gather(batch)))
        groups = await under_way.popleft()
        sampling_seconds = time.perf_counter() - started

        used: list[Rollout] = []
        data: list[tinker.Datum] = []
        for group in groups:
            earned = [rollout.reward for rollout in group]
            if has_spread(earned):  # else every advantage is 0
                used += group
                data += [r.datum(a, settings.loss) for r, a in zip(group, centred(earned), strict=True)]
        numbers = {
            "reward": sum(r.reward for group in groups for r in group) / sum(map(len, groups)),
            "trained_share": len(used) / sum(map(len, groups)),
        }
        for update in range(settings.updates if data else 0):
            forward_backward = training.forward_backward(data, settings.loss)
            optim_step = training.optim_step(tinker.AdamParams(learning_rate=settings.learning_rate))
            passed = await forward_backward
            await optim_step
            if update == 0:
                numbers |= rollouts.kl(used, passed)
        numbers |= {"sampling_seconds": sampling_seconds, "seconds": time.perf_counter() - started}
        tracker.log(step, numbers)
        print(
            f"{settings.loss} step {step}: reward {numbers['reward']:.3f}, kl {numbers.get('kl', 0):.4f}",
            flush=True,
        )
    after = await accuracy(training, renderer)
    path = (await training.save_state("final", overwrite=True)).path
    return {"accuracy_before": before, "accuracy_after": after, "path": path}


async def accuracy(training: Any, renderer: Renderer) -> float:
    """Of answers sampled at temperature 1, as in training, to problems drawn apart from those of training,
    which meets few of them."""
    sampler = await training.save_weights_and_get_sampling_client()
    held_out = [problem(random.Random(f"held out {i}")) for i in range(HELD_OUT)]
    score = await evaluation.generate(sampler, renderer, held_out, max_tokens=MAX_TOKENS, temperature=1.0)
    return score.mean


def parser() -> argparse.ArgumentParser:
    made = options.parser("rl", __doc__, STEPS)
    made.add_argument("--loss", choices=LOSSES, default="importance_sampling")
    made.add_argument("--behind", type=int, default=0, metavar="K", help="train on samples K steps old")
    made.add_argument("--updates", type=int, default=1, help="optimizer steps per batch")
    made.add_argument("--problems", type=int, default=12, help="per step")
    made.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    made.add_argument("--rank", type=int, default=RANK)
    made.add_argument("--group", type=int, default=GROUP, help="answers to each")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(made := parser(), argv)
    if settings.group < 2:
        made.error("--group must be at least 2: an answer is judged against the others of its group")
    if settings.behind < 0 or settings.updates < 1 or settings.problems < 1:
        made.error("--updates and --problems must be at least 1, and --behind not below 0")
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        result = asyncio.run(train(client, settings, tracker))
    lines = {"reward": (tracker.column("step"), tracker.column("reward"))}
    title = f"Sums, {settings.loss}, {settings.behind} steps behind, {settings.base}"
    tracking.draw(settings.out / "curve.png", title, lines, xlabel="step", ylabel="share of right answers")
    tracking.write_result(settings.out, {"loss": settings.loss, "behind": settings.behind, **result})


if __name__ == "__main__":
    main()
