"""Tool use over several turns: a calculator for sums that are too hard to do alone.

The model may call the tool, reads what it says, and answers. Only what the model wrote is trained on: the
tool's output stands in the sequence with no weight. The reward is the right number in the last turn, so
that calling the tool, calling it properly and using what it says are learnt together.
"""

import argparse
import ast
import asyncio
import operator
import random
from collections.abc import Sequence
from typing import Any

from tinsmith_cookbook import options, rewards, rollouts, tracking
from tinsmith_cookbook.advantages import centred, has_spread
from tinsmith_cookbook.renderers import Message, Renderer
from tinsmith_cookbook.rollouts import Rollout
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=20, short=8)
PROBLEMS, GROUP, MAX_TOKENS, MAX_TURNS = 6, 6, 48, 3
RANK, LEARNING_RATE, ASKED = 16, 1e-3, 60

CALCULATOR = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Works out a sum.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}


def calculate(expression: str) -> str:
    """Sums of whole numbers, read as a tree and never run as code. What cannot be read is told to the
    model."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
                return int(_OPERATORS[type(op)](value(left), value(right)))
            case ast.Constant(int(number)) if type(number) is int and number < 10**9:
                return number
            case _:
                raise ValueError

    try:
        if len(expression) > 60:
            raise ValueError
        return str(value(ast.parse(expression.strip(), mode="eval").body))
    except (ValueError, SyntaxError):
        return "error: give a sum of whole numbers such as 12 * 34"


def use(call: dict[str, Any]) -> str:
    if call["name"] != "calculator" or not isinstance(call["arguments"].get("expression"), str):
        return "error: there is only calculator(expression)"
    return calculate(call["arguments"]["expression"])


def problem(draw: random.Random) -> tuple[str, int]:
    a, b, sign = draw.randrange(10, 100), draw.randrange(10, 100), draw.choice("+*")
    if sign == "+":
        a, b = a * 11, b * 9
    return f"What is {a} {sign} {b}?", a + b if sign == "+" else a * b


async def episode(
    sampler: Any, renderer: Renderer, asked: str, right: int, seed: int
) -> tuple[Rollout, list[Message]]:
    """One conversation as one sequence. Each turn is sampled after everything before it, as it was
    written."""
    messages: list[Message] = [{"role": "user", "content": asked}]
    rollout = Rollout()
    rollout.read(renderer.prompt(messages, [CALCULATOR]))
    for turn in range(MAX_TURNS):
        answer = await sampler.sample(
            prompt=tinker.ModelInput.from_ints(rollout.tokens),
            num_samples=1,
            sampling_params=tinker.SamplingParams(
                max_tokens=MAX_TOKENS, stop=renderer.stop, seed=seed + turn
            ),
        )
        said = renderer.parse(rollout.write(answer.sequences[0]))
        messages.append(said.message)
        calls = said.message.get("tool_calls", [])
        if not calls or not said.is_complete or turn == MAX_TURNS - 1:
            break
        results = [{"role": "tool", "content": use(call)} for call in calls]
        messages += results
        rollout.read(renderer.encode(between(renderer, results)))
    rollout.reward = (
        rewards.number(right)(messages[-1]["content"]) if not messages[-1].get("tool_calls") else 0.0
    )
    return rollout, messages


def between(renderer: Renderer, results: Sequence[Message]) -> str:
    """What the template puts between the end of the assistant's turn and the beginning of its next."""
    before = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    shown = renderer.text([*before, *results], [CALCULATOR], for_reply=True)
    return shown[shown.rindex("!" + renderer.end_of_turn) + 1 + len(renderer.end_of_turn) :]


async def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> dict[str, float]:
    training = await client.create_lora_training_client(settings.base, rank=RANK, seed=settings.seed)
    renderer, draw = Renderer.of(training), random.Random(settings.seed)

    async def attempts(sampler: Any) -> list[tuple[Rollout, list[Message]]]:
        asked, right = problem(draw)
        seeds = [draw.randrange(2**30) for _ in range(GROUP)]
        return await rollouts.gather(episode(sampler, renderer, asked, right, seed) for seed in seeds)

    before = await standing(training, renderer)
    for step in range(settings.steps):
        sampler = await training.save_weights_and_get_sampling_client()
        groups = await rollouts.gather(attempts(sampler) for _ in range(PROBLEMS))
        used: list[Rollout] = []
        data: list[tinker.Datum] = []
        for group in groups:
            earned = [rollout.reward for rollout, _ in group]
            if has_spread(earned):
                used += [rollout for rollout, _ in group]
                data += [r.datum(a) for (r, _), a in zip(group, centred(earned), strict=True)]
        numbers = summary([one for group in groups for one in group])
        if data:
            forward_backward = training.forward_backward(data, "importance_sampling")
            optim_step = training.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
            passed = await forward_backward
            await optim_step
            numbers |= rollouts.kl(used, passed)
        tracker.log(step, numbers)
        print(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in numbers.items()), flush=True)
    after = await standing(training, renderer)
    return {
        f"{name}_{when}": found[name]
        for name in ("reward", "called")
        for when, found in (("before", before), ("after", after))
    }


def summary(episodes: Sequence[tuple[Rollout, list[Message]]]) -> dict[str, float]:
    count = len(episodes)
    return {
        "reward": sum(rollout.reward for rollout, _ in episodes) / count,
        "called": sum(any(m.get("tool_calls") for m in messages) for _, messages in episodes) / count,
    }


async def standing(training: Any, renderer: Renderer) -> dict[str, float]:
    """On problems of its own, sampled as in training."""
    sampler = await training.save_weights_and_get_sampling_client()
    asked = [problem(random.Random(f"held out {i}")) for i in range(ASKED)]
    work = (episode(sampler, renderer, *one, 1000 * i) for i, one in enumerate(asked))
    return summary(await rollouts.gather(work))


def parser() -> argparse.ArgumentParser:
    return options.parser("tool_use", __doc__, STEPS)


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        result = asyncio.run(train(client, settings, tracker))
    lines = {name: tracker.line(name) for name in ("reward", "called")}
    tracking.draw(settings.out / "curve.png", f"A calculator, {settings.base}", lines, xlabel="step")
    tracking.write_result(settings.out, result)


if __name__ == "__main__":
    main()
