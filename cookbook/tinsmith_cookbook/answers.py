"""What a sampler answers, many prompts at once."""

from collections.abc import Sequence
from typing import Any

from tinsmith_cookbook.renderers import Message, Renderer, Response, Tools
from tinsmith_cookbook.sdk import tinker


def greedy(
    sampler: Any,
    renderer: Renderer,
    asked: Sequence[Sequence[Message]],
    *,
    tools: Sequence[Tools | None] | None = None,
    max_tokens: int = 64,
) -> list[Response]:
    """The next turn of each conversation, the likeliest token each time; tools[i] are conversation i's."""
    params = tinker.SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=renderer.stop)
    return _all(sampler, renderer, asked, tools or [None] * len(asked), [params] * len(asked))


def sampled(
    sampler: Any, renderer: Renderer, asked: Sequence[Sequence[Message]], *, seed: int, max_tokens: int = 64
) -> list[Response]:
    """The next turn of each conversation at temperature 1; the same seed gives the same answers."""
    seeds = [seed * len(asked) + i for i in range(len(asked))]
    params = [tinker.SamplingParams(max_tokens=max_tokens, seed=s, stop=renderer.stop) for s in seeds]
    return _all(sampler, renderer, asked, [None] * len(asked), params)


def _all(
    sampler: Any,
    renderer: Renderer,
    asked: Sequence[Sequence[Message]],
    tools: Sequence[Tools | None],
    params: Sequence[Any],
) -> list[Response]:
    prompts = [
        tinker.ModelInput.from_ints(renderer.prompt(c, known)) for c, known in zip(asked, tools, strict=True)
    ]
    futures = [
        sampler.sample(prompt=prompt, num_samples=1, sampling_params=p)
        for prompt, p in zip(prompts, params, strict=True)
    ]
    return [renderer.parse(future.result().sequences[0].tokens) for future in futures]
