"""Synthetic data: a teacher makes questions and answers out of documents, what is bad is sorted out, a
student learns the rest, and is asked without the documents.

The teacher is the base reading a document; the student is the same base, to which nobody shows it. Questions
and their rephrasings come from forms (a large model would write them itself: its call goes into `ask` and
`rephrased`). Every question is answered several times. What is kept: answers that most samples agree on, that
stand in the document, in the right form, without personal data, no two nearly the same, no kind of question
too often. A second student learns the unchecked answers for as many steps, to see what the checks are worth.
"""

import argparse
import asyncio
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tinsmith_cookbook import data, evaluation, options, quality, rewards, rollouts, tracking
from tinsmith_cookbook.data import Batches
from tinsmith_cookbook.evaluation import Question
from tinsmith_cookbook.renderers import Renderer, chat
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect
from tinsmith_cookbook.villagers import KINDS, NAMES, Document, documents

STEPS = options.Steps(full=120, short=60)
DOCUMENTS, SAMPLES, MAX_TOKENS, BATCH = 6, 5, 14, 16
RANK, LEARNING_RATE = 32, 2e-3


@dataclass(frozen=True)
class Pair:
    kind: str
    question: str
    answer: str
    document: str
    agreement: float
    truth: str = ""  # to measure the checks by, which do not see it


# -- teacher ------------------------------------------------------------------------------------------------


async def ask(sampler: Any, renderer: Renderer, document: Document, who: str, kind: str) -> list[Pair]:
    """One question, answered several times by the teacher who reads the document."""
    question = KINDS[kind].asked.format(who=who)
    prompt = renderer.prompt(chat(f"{document.text}\n\n{question}"))
    params = tinker.SamplingParams(max_tokens=MAX_TOKENS, stop=renderer.stop, seed=len(document.text))
    group = await rollouts.group(sampler, prompt, SAMPLES, params)
    answers = [str(renderer.parse(rollout.written).message["content"]) for rollout in group]
    counts, truth = Counter(answers), document.facts[who][kind]
    return [Pair(kind, question, a, document.text, counts[a] / SAMPLES, truth) for a in answers]


async def generate(sampler: Any, renderer: Renderer, made: Sequence[Document]) -> list[Pair]:
    work = [
        ask(sampler, renderer, document, who, kind)
        for document in made
        for who in document.facts
        for kind in KINDS
    ]
    found = [pair for some in await rollouts.gather(work) for pair in some]
    # What a careless teacher also writes down.
    return found + [
        Pair("place", "How can one write to them?", address[0], document.text, 1.0)
        for document in made
        if (address := re.search(r"\S+@[\w.]+\w", document.text))
    ]


def rephrased(pairs: Sequence[Pair]) -> list[Pair]:
    """Every pair also in other words."""
    return [
        replace(pair, question=pair.question if form == KINDS[pair.kind].asked else form.format(who=who))
        for pair in pairs
        for form in (KINDS[pair.kind].asked, *KINDS[pair.kind].otherwise)
        for who in [next((name for name in NAMES if name in pair.question), "")]
    ]


# -- checks -------------------------------------------------------------------------------------------------


def checked(pairs: Sequence[Pair]) -> tuple[list[Pair], Counter[str]]:
    kept, fallen = quality.sift(
        pairs,
        [
            lambda p: quality.personal(p.answer) and "personal data",
            lambda p: None if p.agreement > 0.5 else "samples disagree",
            lambda p: None if p.answer.lower().strip(".") in p.document.lower() else "not in the document",
            lambda p: None if re.fullmatch(r"[\w ]{2,40}\.?", p.answer) else "wrong form",
        ],
    )
    again = quality.duplicates([f"{p.question} {p.answer}" for p in kept], at_least=0.95)
    fallen["nearly the same"] = len(again)
    kept = [p for at, p in enumerate(kept) if at not in again]
    kinds = len({p.kind for p in kept})
    even = quality.balanced(kept, lambda p: p.kind, most=max(0.4, 1 / kinds)) if kinds else []
    fallen["too many of a kind"] = len(kept) - len(even)
    return even, fallen


# -- student ------------------------------------------------------------------------------------------------


async def learn(
    client: tinker.ServiceClient,
    settings: argparse.Namespace,
    pairs: Sequence[Pair],
    name: str,
    log: dict[int, dict[str, float]],
) -> tuple[Any, Renderer]:
    training = await client.create_lora_training_client(settings.base, rank=RANK, seed=settings.seed)
    renderer = Renderer.of(training)
    for step, batch in enumerate(Batches(rephrased(pairs), BATCH, settings.steps, settings.seed)):
        datums = [
            data.datum(renderer.examples(chat(pair.question, pair.answer))[0], normalize=True)
            for pair in batch
        ]
        forward_backward = training.forward_backward(datums, "cross_entropy")
        optim_step = training.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
        log.setdefault(step, {})[f"loss_{name}"] = (await forward_backward).metrics["loss:sum"] / BATCH
        await optim_step
    return await training.save_weights_and_get_sampling_client(), renderer


async def examination(sampler: Any, renderer: Renderer, made: Sequence[Document]) -> float:
    """Greedy, without documents, in wordings that were not learnt from."""
    questions = [
        Question(chat(KINDS[kind].examined.format(who=who)), rewards.contains(fact))
        for document in made
        for who, facts in document.facts.items()
        for kind, fact in facts.items()
    ]
    return (await evaluation.generate(sampler, renderer, questions, max_tokens=MAX_TOKENS)).mean


def right_share(pairs: Sequence[Pair]) -> float:
    told = [pair for pair in pairs if pair.truth]
    return sum(rewards.contains(pair.truth)(pair.answer) for pair in told) / len(told)


async def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    made = documents(DOCUMENTS, settings.seed)
    base = await client.create_lora_training_client(settings.base, rank=8, seed=settings.seed)
    sampler, renderer = await base.save_weights_and_get_sampling_client(), Renderer.of(base)
    pairs = await generate(sampler, renderer, made)
    kept, fallen = checked(pairs)

    log: dict[int, dict[str, float]] = {}
    (with_checks, _), (without, _) = await asyncio.gather(
        learn(client, settings, kept, "checked", log), learn(client, settings, pairs, "unchecked", log)
    )
    for step, numbers in sorted(log.items()):
        tracker.log(step, numbers)
    table = [
        {"check": "generated", "pairs": len(pairs)},
        *({"check": k, "pairs": -n} for k, n in fallen.items()),
    ]
    table.append({"check": "kept", "pairs": len(kept)})
    return {
        "right_of_generated": right_share(pairs),
        "right_of_kept": right_share(kept),
        "exam_before": await examination(sampler, renderer, made),
        "exam_after": await examination(with_checks, renderer, made),
        "exam_after_unchecked": await examination(without, renderer, made),
    }, table


def parser() -> argparse.ArgumentParser:
    return options.parser("synthetic", __doc__, STEPS)


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        result, table = asyncio.run(train(client, settings, tracker))
    lines = {name: tracker.line(name) for name in ("loss_checked", "loss_unchecked")}
    tracking.draw(settings.out / "curve.png", f"Learning made-up data, {settings.base}", lines, xlabel="step")
    tracking.write_result(settings.out, result, table)


if __name__ == "__main__":
    main()
