"""Evaluation: the base and a trained adapter through one harness, side by side.

Generation judged by rewards, multiple choice by likelihood, perplexity, and a win rate in both orders.
--path names the adapter (tinker://…/sampler_weights/…, as save_weights_for_sampler gave it); without one, a
small run is fine-tuned here to have something to compare. --lm-eval runs tasks of EleutherAI's
lm-evaluation-harness on both besides (pip install 'tinsmith[evaluation]'; they download their data).
"""

import argparse
import asyncio
import random
from collections.abc import Sequence
from typing import Any

from tinsmith_cookbook import courtesy, data, evaluation, options, rewards, tracking
from tinsmith_cookbook.evaluation import Choice, Question, Score
from tinsmith_cookbook.renderers import Renderer, chat
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=40, short=20)
ASKED, MAX_TOKENS, BATCH = 50, 32, 16
RANK, LEARNING_RATE = 16, 1e-3


def sums(count: int, seed: str) -> list[tuple[str, int]]:
    draw = random.Random(seed)
    pairs = [(draw.randrange(10, 100), draw.randrange(10, 100)) for _ in range(count)]
    return [(f"What is {a} + {b}?", a + b) for a, b in pairs]


async def adapter(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> Any:
    """A sampler of the weights at --path, or of a run that is taught to answer sums with the number alone."""
    if settings.path:
        return await client.create_sampling_client(model_path=settings.path)
    training = await client.create_lora_training_client(settings.base, rank=RANK, seed=settings.seed)
    renderer, rows = Renderer.of(training), sums(settings.steps * BATCH, f"training {settings.seed}")
    for step in range(settings.steps):
        batch = [
            data.datum(renderer.examples(chat(question, str(right)))[0], normalize=True)
            for question, right in rows[step * BATCH : (step + 1) * BATCH]
        ]
        forward_backward = training.forward_backward(batch, "cross_entropy")
        optim_step = training.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
        loss = (await forward_backward).metrics["loss:sum"] / BATCH
        await optim_step
        tracker.log(step, {"loss": loss})
    return await training.save_weights_and_get_sampling_client()


async def scores(sampler: Any, renderer: Renderer) -> dict[str, Score]:
    held_out = sums(ASKED, "held out")
    asked = [Question(chat(question), rewards.number(value)) for question, value in held_out]
    greedy = await evaluation.generate(sampler, renderer, asked, max_tokens=MAX_TOKENS)
    facts = [Question(chat(question), rewards.contains(fact)) for question, fact in courtesy.facts()]
    choices = [
        Choice(
            renderer.prompt(chat(question)),
            [renderer.encode(f"{value + off}{renderer.end_of_turn}") for off in (0, 1, -2, 10)],
            right=0,
        )
        for question, value in held_out[: ASKED // 2]
    ]
    return {
        "sums, greedy": greedy,
        "sums, number only": Score([rewards.matches(r"-?\d+")(text) for text in greedy.answers]),
        "sums, temperature 1": await evaluation.generate(
            sampler, renderer, asked, max_tokens=MAX_TOKENS, temperature=1.0, samples=2
        ),
        "sums, multiple choice": await evaluation.multiple_choice(sampler, choices),
        "facts, greedy": await evaluation.generate(sampler, renderer, facts, max_tokens=MAX_TOKENS),
    }


async def brevity(ours: Any, theirs: Any, renderer: Renderer) -> evaluation.WinRate:
    """Who answers shorter, for a judge that is a rule."""

    async def shorter(question: str, a: str, b: str) -> float:
        return 0.5 if len(a) == len(b) else float(len(a) < len(b))

    asked = [question for question, _ in sums(ASKED, "held out")]
    mine, others = [
        [texts[0] for texts in await evaluation.answers(sampler, renderer, asked, max_tokens=MAX_TOKENS)]
        for sampler in (ours, theirs)
    ]
    return await evaluation.win_rate(shorter, asked, mine, others)


async def compare(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> tuple[dict[str, Any], list[dict[str, Any]], list[Any], Renderer]:
    reader = await client.create_lora_training_client(settings.base, rank=8)
    renderer = Renderer.of(reader)
    samplers = [
        await client.create_sampling_client(base_model=settings.base),
        await adapter(client, settings, tracker),
    ]
    base, trained = [await scores(sampler, renderer) for sampler in samplers]
    texts = [e for q, right in sums(20, "texts") for e in renderer.examples(chat(q, str(right)))]
    perplexities = [await evaluation.perplexity(sampler, texts) for sampler in samplers]
    table = [
        {
            "what": name,
            "base": str(base[name]),
            "trained": str(trained[name]),
            "delta": trained[name].mean - base[name].mean,
        }
        for name in base
    ]
    table.append(
        {
            "what": "perplexity of bare answers",
            "base": perplexities[0],
            "trained": perplexities[1],
            "delta": perplexities[1] - perplexities[0],
        }
    )
    won = await brevity(samplers[1], samplers[0], renderer)
    result = {
        "number_only_base": base["sums, number only"].mean,
        "number_only_trained": trained["sums, number only"].mean,
        "sums_base": base["sums, temperature 1"].mean,
        "sums_trained": trained["sums, temperature 1"].mean,
        "shorter_win_rate": won.rate,
    }
    return result, table, samplers, renderer


def lm_eval(
    samplers: Sequence[Any], renderer: Renderer, tasks: Sequence[str], limit: int
) -> list[dict[str, Any]]:
    from lm_eval import simple_evaluate

    from tinsmith_cookbook.lm_harness import SamplerLM

    found = [
        simple_evaluate(
            SamplerLM(sampler, renderer), tasks=list(tasks), limit=limit, apply_chat_template=True
        )["results"]
        for sampler in samplers
    ]
    return [
        {"what": f"{task} {metric}", "base": value, "trained": found[1][task][metric]}
        for task, metrics in found[0].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    ]


def parser() -> argparse.ArgumentParser:
    made = options.parser("evaluate", __doc__, STEPS)
    made.add_argument("--path", help="the sampler weights to compare with the base")
    made.add_argument("--lm-eval", nargs="*", default=[], metavar="TASK")
    made.add_argument("--limit", type=int, default=100, help="questions per task of --lm-eval")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        result, table, samplers, renderer = asyncio.run(compare(client, settings, tracker))
        if settings.lm_eval:
            table += lm_eval(samplers, renderer, settings.lm_eval, settings.limit)
    bars = {
        side: (range(5), [float(str(row[side]).split()[0]) for row in table[:5]])
        for side in ("base", "trained")
    }
    tracking.draw(
        settings.out / "curve.png",
        f"Base and adapter, {settings.base}",
        bars,
        xlabel="row of the table",
        ylim=(0, 1.05),
    )
    tracking.write_result(settings.out, result, table)


if __name__ == "__main__":
    main()
