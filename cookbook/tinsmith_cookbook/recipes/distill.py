"""Distillation: a student takes over what a teacher knows. Three methods, four kinds of teacher.

--method off    cross entropy on the teacher's own answers
         on     the student answers, the teacher scores: each token's advantage is minus the reverse KL
                there, -(log p_student - log p_teacher)
         topk   the student answers, and learns the teacher's K likeliest tokens at each place, with their
                probabilities as soft targets (cross entropy with targets [N, K])
--teacher sums    a run that was fine-tuned to get sums right; the student is the base
          two     two of them, one for sums and one for sorting, each asked for its own subject
          prompt  the student itself, but with a system prompt, whose effect goes into the weights
          shown   the student itself, but shown a text that has the answers (self-distillation, SDFT: with
                  on or topk it learns new facts in its own words)
"""

import argparse
import asyncio
import math
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinsmith_cookbook import data, evaluation, options, rollouts, tracking
from tinsmith_cookbook.evaluation import Question
from tinsmith_cookbook.renderers import Example, Renderer, chat
from tinsmith_cookbook.rollouts import Rollout
from tinsmith_cookbook.sdk import tinker
from tinsmith_cookbook.service import connect
from tinsmith_cookbook.subjects import SUBJECTS, Subject

STEPS = options.Steps(full=30, short=12)
PROMPTS, SAMPLES, MAX_TOKENS, TOP_K, HELD_OUT = 12, 4, 24, 8, 100
TEACHER_STEPS, TEACHER_BATCH = 25, 24
RANK, LEARNING_RATE = 16, 1e-3

# -- the teacher ------------------------------------------------------------------------------------------


async def teacher(client: tinker.ServiceClient, base: str, subject: Subject, seed: int) -> Any:
    """A sampler. The base itself where it reads more than the student, else a run fine-tuned on
    right answers."""
    if subject.reads:
        return await client.create_sampling_client(base_model=base)
    training = await client.create_lora_training_client(base, rank=RANK, seed=seed + 100)
    renderer, draw = Renderer.of(training), random.Random(f"teacher {seed}")
    for _ in range(TEACHER_STEPS):
        shown = [renderer.examples(chat(*subject.draw(draw)))[0] for _ in range(TEACHER_BATCH)]
        batch = [data.datum(example, normalize=True) for example in shown]
        training.forward_backward(batch, "cross_entropy")
        await training.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
    return await training.save_weights_and_get_sampling_client()


# -- the three methods: one batch of datums each ----------------------------------------------------------


Batch = list[tuple[tinker.Datum, float]]
"""Each datum with the reverse KL of its tokens, where it is known."""


@dataclass(frozen=True)
class Lesson:
    """One question, as the student and as the teacher read it."""

    student_prompt: list[int]
    teacher_prompt: list[int]
    student: Any
    teacher: Any
    params: Any


async def off_policy(lesson: Lesson) -> Batch:
    group = await rollouts.group(lesson.teacher, lesson.teacher_prompt, SAMPLES, lesson.params)
    made = []
    for written in (rollout.written for rollout in group):
        weights = [0.0] * len(lesson.student_prompt) + [1.0 / len(written)] * len(written)
        made.append((data.datum(Example(lesson.student_prompt + written, weights)), math.nan))
    return made


async def on_policy(lesson: Lesson) -> Batch:
    group = await rollouts.group(lesson.student, lesson.student_prompt, SAMPLES, lesson.params)
    scored = await asyncio.gather(
        *(evaluation.logprobs(lesson.teacher, lesson.teacher_prompt, rollout.written) for rollout in group)
    )
    made = []
    for rollout, log_p_teacher in zip(group, scored, strict=True):
        log_p_student = np.asarray(rollout.logprobs)[np.asarray(rollout.sampled)]
        reverse_kl = log_p_student - log_p_teacher
        made.append((rollout.datum(-reverse_kl), float(reverse_kl.mean())))
    return made


async def top_k(lesson: Lesson) -> Batch:
    group = await rollouts.group(lesson.student, lesson.student_prompt, SAMPLES, lesson.params)
    return list(await asyncio.gather(*(_soft(lesson, rollout) for rollout in group)))


async def _soft(lesson: Lesson, rollout: Rollout) -> tuple[tinker.Datum, float]:
    written, start = rollout.written, len(lesson.student_prompt) - 1
    answer = await lesson.teacher.sample(
        prompt=tinker.ModelInput.from_ints(lesson.teacher_prompt + written),
        num_samples=1,
        sampling_params=tinker.SamplingParams(max_tokens=1),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=TOP_K,
        prompt_logprobs_last_n=len(written),
    )
    targets = np.zeros((len(rollout.tokens) - 1, TOP_K), np.int64)
    weights = np.zeros(targets.shape, np.float32)
    for at, likeliest in enumerate(answer.topk_prompt_logprobs[-len(written) :], start):
        tokens, logprobs = zip(*likeliest, strict=True)
        odds = np.exp(logprobs)
        targets[at, : len(tokens)] = tokens
        weights[at, : len(tokens)] = odds / odds.sum() / len(written)
    log_p_teacher = np.asarray(answer.prompt_logprobs[-len(written) :], float)
    log_p_student = np.asarray(rollout.logprobs)[np.asarray(rollout.sampled)]
    inputs = {
        "target_tokens": tinker.TensorData.from_numpy(targets),
        "weights": tinker.TensorData.from_numpy(weights),
    }
    datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(rollout.tokens[:-1]), loss_fn_inputs=inputs)
    return datum, float((log_p_student - log_p_teacher).mean())


METHODS: dict[str, tuple[Callable[[Lesson], Coroutine[Any, Any, Batch]], tinker.types.LossFnType]] = {
    "off": (off_policy, "cross_entropy"),
    "on": (on_policy, "importance_sampling"),
    "topk": (top_k, "cross_entropy"),
}


# -- the student ------------------------------------------------------------------------------------------


async def train(
    client: tinker.ServiceClient, settings: argparse.Namespace, tracker: tracking.Tracker
) -> dict[str, float]:
    subjects = SUBJECTS[settings.teacher]
    teachers = [await teacher(client, settings.base, subject, settings.seed) for subject in subjects]
    training = await client.create_lora_training_client(settings.base, rank=RANK, seed=settings.seed)
    renderer, draw = Renderer.of(training), random.Random(settings.seed)
    learn, loss_fn = METHODS[settings.method]

    async def score(sampler: Any, subject: Subject, *, as_teacher: bool = False) -> float:
        """At temperature 1, on questions of its own."""
        drawn = [subject.draw(random.Random(f"held out {i}")) for i in range(HELD_OUT)]
        asked = [
            Question(subject.teachers(question) if as_teacher else chat(question), subject.judged(right))
            for question, right in drawn
        ]
        made = await evaluation.generate(sampler, renderer, asked, max_tokens=MAX_TOKENS, temperature=1.0)
        return made.mean

    async def scores(sampler: Any) -> list[float]:
        return [await score(sampler, subject) for subject in subjects]

    before = await scores(await training.save_weights_and_get_sampling_client())
    for step in range(settings.steps):
        student = await training.save_weights_and_get_sampling_client()
        lessons = []
        for i in range(PROMPTS):
            subject, its_teacher = subjects[i % len(subjects)], teachers[i % len(subjects)]
            asked, _ = subject.draw(draw)
            params = tinker.SamplingParams(
                max_tokens=MAX_TOKENS, stop=renderer.stop, seed=draw.randrange(2**31)
            )
            prompts = renderer.prompt(chat(asked)), renderer.prompt(subject.teachers(asked))
            lessons.append(learn(Lesson(*prompts, student, its_teacher, params)))
        made = [pair for some in await rollouts.gather(lessons) for pair in some]
        forward_backward = training.forward_backward([datum for datum, _ in made], loss_fn)
        optim_step = training.optim_step(tinker.AdamParams(learning_rate=LEARNING_RATE))
        metrics = (await forward_backward).metrics
        await optim_step
        numbers = {"loss": metrics["loss:sum"] / len(made)}
        if settings.method != "off":
            numbers["reverse_kl"] = float(np.mean([kl for _, kl in made]))
        tracker.log(step, numbers)
        print(f"step {step}: " + ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()), flush=True)
    after = await scores(await training.save_weights_and_get_sampling_client())
    taught = [await score(t, s, as_teacher=True) for t, s in zip(teachers, subjects, strict=True)]
    return {
        f"{name}_{i}" if len(subjects) > 1 else name: value
        for name, values in (("student_before", before), ("student_after", after), ("teacher", taught))
        for i, value in enumerate(values)
    }


def parser() -> argparse.ArgumentParser:
    made = options.parser("distill", __doc__, STEPS)
    made.add_argument("--method", choices=list(METHODS), default="on")
    made.add_argument("--teacher", choices=list(SUBJECTS), default="sums")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    with (
        connect(settings.out) as client,
        tracking.Tracker(settings.out, also=settings.track, config=vars(settings)) as tracker,
    ):
        result = asyncio.run(train(client, settings, tracker))
    name = "loss" if settings.method == "off" else "reverse_kl"
    title = f"Distillation, {settings.method}, {settings.teacher}, {settings.base}"
    tracking.draw(settings.out / "curve.png", title, {name: tracker.line(name)}, xlabel="step", ylabel=name)
    tracking.write_result(settings.out, {"method": settings.method, "of": settings.teacher, **result})


if __name__ == "__main__":
    main()
