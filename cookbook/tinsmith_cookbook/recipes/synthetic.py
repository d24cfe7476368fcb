"""Synthetic data: a teacher makes questions and answers out of documents, what is bad is sorted out, a
student learns the rest, and is asked without the documents.

The teacher is the base reading a document; the student is the same base, to which nobody shows it.
Questions come from forms in several wordings (a large model would write and rephrase them itself: put its
call into `ask`). Every question is answered several times. What is kept: answers that most samples agree
on, that stand in the document, in the right form, without personal data, no two nearly the same, no kind of
question too often. A second student learns the unchecked answers for as many steps, to see what the checks
are worth.
"""

import argparse
import asyncio
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tinsmith_cookbook import data, evaluation, options, quality, rewards, rollouts, tracking
from tinsmith_cookbook.data import Batches
from tinsmith_cookbook.evaluation import Question
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect

STEPS = options.Steps(full=90, short=45)
DOCUMENTS, SAMPLES, MAX_TOKENS, BATCH = 8, 5, 12, 16
RANK, LEARNING_RATE = 32, 1e-3

NAMES, THINGS, COLOURS, PLACES, DAYS = map(
    str.split,
    (
        "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Max",
        "lamp clock basket kettle blanket hammer mirror ladder bottle chair",
        "red old small heavy green new round yellow",
        "market school harbor library bakery garden station museum",
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    ),
)
# kind: (wordings to learn from, a wording only the examination has, the form of an answer)
ASKED = {
    "thing": (("What did {} get?", "What did {} buy?"), "Which thing did {} get?", r"an? \w+ \w+"),
    "place": (("Where was {}?", "At which place was {}?"), "Tell me where {} was.", r"at the \w+"),
    "day": (("On which day was {} there?", "When was {} there?"), "Which day was {} there?", r"[A-Z]\w+day"),
    "price": (("How much did {} pay?", "What did {} pay?"), "How many dollars did {} pay?", r"\d+ dollars"),
}


@dataclass(frozen=True)
class Document:
    """about: what the document says about whom, which only the examination looks up."""

    text: str
    about: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Pair:
    kind: str
    question: str
    answer: str
    document: str
    agreement: float
    truth: str = ""  # to measure the checks by, which do not see it


def documents(seed: int) -> list[Document]:
    """Two people each; some have an address at the end that must not get into the data."""
    draw = random.Random(seed)
    people = draw.sample(NAMES, len(NAMES))
    made = []
    for i in range(min(DOCUMENTS, len(people) // 2)):
        about, lines = {}, []
        for who in people[2 * i : 2 * i + 2]:
            colour, place, day = draw.choice(COLOURS), draw.choice(PLACES), draw.choice(DAYS)
            thing = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {draw.choice(THINGS)}"
            price = f"{draw.randrange(2, 100)} dollars"
            lines.append(f"On {day} {who} bought {thing} at the {place} for {price}.")
            about[who] = {"thing": thing, "place": f"at the {place}", "day": day, "price": price}
        if i % 4 == 0:
            lines.append(f"Write to {who.lower()}@{place}.example.org.")
        made.append(Document(" ".join(lines), about))
    return made


# -- teacher ------------------------------------------------------------------------------------------------


async def ask(
    sampler: Any, renderer: Renderer, document: Document, who: str, kind: str, form: str
) -> list[Pair]:
    """One question, answered several times by the teacher who reads the document."""
    question = form.format(who)
    asked = f"{document.text}\n\n{question} Answer briefly."
    prompt = renderer.prompt([{"role": "user", "content": asked}])
    params = tinker.SamplingParams(max_tokens=MAX_TOKENS, stop=renderer.stop, seed=len(asked))
    group = await rollouts.group(sampler, prompt, SAMPLES, params)
    answers = [str(renderer.parse(rollout.written).message["content"]).strip(" .") for rollout in group]
    counts = Counter(answers)
    truth = document.about[who][kind]
    return [Pair(kind, question, a, document.text, counts[a] / SAMPLES, truth) for a in answers]


async def generate(sampler: Any, renderer: Renderer, made: Sequence[Document]) -> list[Pair]:
    work = [
        ask(sampler, renderer, document, who, kind, form)
        for document in made
        for who in document.about
        for kind, (forms, _, _) in ASKED.items()
        for form in forms
    ]
    found = [pair for some in await rollouts.gather(work) for pair in some]
    # What a careless teacher also writes down.
    return found + [
        Pair("place", f"How can one write to {p.question}", match[0], p.document, 1.0)
        for p in found[:: 2 * SAMPLES]
        if (match := re.search(r"\S+@\S+\w", p.document))
    ]


# -- checks -------------------------------------------------------------------------------------------------


def checked(pairs: Sequence[Pair]) -> tuple[list[Pair], Counter[str]]:
    kept, fallen = quality.sift(
        pairs,
        [
            lambda p: quality.personal(p.answer) and "personal data",
            lambda p: None if p.agreement > 0.5 else "samples disagree",
            lambda p: None if p.answer.lower() in p.document.lower() else "not in the document",
            lambda p: None if re.fullmatch(ASKED[p.kind][2], p.answer) else "wrong form",
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
    for step, batch in enumerate(Batches(list(pairs), BATCH, settings.steps, settings.seed)):
        datums = [
            data.datum(renderer.examples(messages(pair.question, pair.answer))[0], normalize=True)
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
        Question(messages(f"{ASKED[kind][1].format(who)} Answer briefly."), rewards.contains(right))
        for document in made
        for who, facts in document.about.items()
        for kind, right in facts.items()
    ]
    return (await evaluation.generate(sampler, renderer, questions, max_tokens=MAX_TOKENS)).mean


def right_share(pairs: Sequence[Pair]) -> float:
    return sum(pair.answer == pair.truth for pair in pairs) / len(pairs)


def messages(question: str, answer: str | None = None) -> list[dict[str, Any]]:
    asked = [{"role": "user", "content": question}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": answer}]


async def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    made = documents(settings.seed)
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


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(options.parser("synthetic", __doc__, STEPS), argv)
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
