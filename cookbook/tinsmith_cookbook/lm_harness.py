"""EleutherAI's lm-evaluation-harness on a sampler: pip install 'tinsmith[evaluation]'.

from lm_eval import simple_evaluate
results = simple_evaluate(SamplerLM(sampler, renderer), tasks=["gsm8k"], apply_chat_template=True)
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from tinsmith_cookbook.renderers import Message, Renderer
from tinsmith_cookbook.sdk import tinker

_KNOWN = ("until", "max_gen_toks", "temperature", "top_p", "top_k", "do_sample")


class SamplerLM(LM):  # type: ignore[misc] # lm_eval is not annotated
    """All requests of a task are in flight at once, up to `at_once`; the service batches them. Texts longer
    than `context` tokens lose their beginning; in rolling loglikelihoods, which must not, they are cut into
    windows."""

    def __init__(
        self,
        sampler: Any,
        renderer: Renderer,
        *,
        context: int = 4096,
        max_gen_toks: int = 256,
        at_once: int = 256,
    ) -> None:
        super().__init__()
        self._sampler, self._renderer = sampler, renderer
        self._context, self._max_gen_toks, self._at_once = context, max_gen_toks, at_once
        # What stands before the first token of a text: its end-of-turn, for want of a beginning-of-text.
        self._prefix = list(renderer.stop[:1])

    # -- what the harness calls ---------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        return self._all([self._continuation(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        return self._all([self._rolling(*request.args) for request in requests])

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        return self._all([self._generate(*request.args) for request in requests])

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        text = self._renderer.text(chat_history, for_reply=add_generation_prompt)
        if add_generation_prompt:
            return text
        # The harness prefills the assistant's message: it stays open.
        return text[: text.rindex(self._renderer.end_of_turn)]

    @property
    def tokenizer_name(self) -> str:
        return type(self._renderer.tokenizer).__name__

    # -- one request each ---------------------------------------------------------------------------------

    async def _continuation(self, context: str, continuation: str) -> tuple[float, bool]:
        """The logprob of the continuation, and whether greedy decoding would write it."""
        # Tokenized together and cut where the context ends, so that a merge over the seam counts as
        # continuation.
        before = self._renderer.encode(context)
        whole = self._renderer.encode(context + continuation)
        before = before[: _common(before, whole)]
        return await self._score(before or self._prefix, whole[len(before) :])

    async def _rolling(self, text: str) -> float:
        """Every token once, each with as much context as fits."""
        tokens = self._renderer.encode(text)
        window = self._context - 1
        total = 0.0
        for start in range(0, len(tokens), window):
            part = tokens[start : start + window]
            # The last window is short: it gets its context back from those before it.
            context = tokens[max(0, start + len(part) - self._context) : start] or self._prefix
            total += (await self._score(context, part))[0]
        return total

    async def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if unknown := settings.keys() - set(_KNOWN):
            raise ValueError(f"gen_kwargs {sorted(unknown)} mean nothing here: there are {', '.join(_KNOWN)}")
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        most = int(settings.get("max_gen_toks", self._max_gen_toks))
        greedy = not settings.get("do_sample", float(settings.get("temperature", 0)) > 0)
        prompt = self._renderer.encode(context)[-(self._context - most) :] or self._prefix
        answer = await self._sampler.sample(
            prompt=tinker.ModelInput.from_ints(prompt),
            num_samples=1,
            sampling_params=tinker.SamplingParams(
                max_tokens=most,
                temperature=0.0 if greedy else float(settings.get("temperature", 1.0)),
                top_p=float(settings.get("top_p", 1.0)),
                top_k=int(settings.get("top_k", -1)),
                stop=self._renderer.stop,
            ),
        )
        text = self._renderer.decode(answer.sequences[0].tokens).split(self._renderer.end_of_turn)[0]
        # Cut here: a service takes stops as texts or as tokens, not both at once.
        for stop in until:
            text = text.split(stop)[0] if stop else text
        return text

    async def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        if not continuation:
            return 0.0, True
        tokens = [*context, *continuation][-self._context :]
        count = min(len(continuation), len(tokens) - 1)
        answer = await self._sampler.sample(
            prompt=tinker.ModelInput.from_ints(tokens),
            num_samples=1,
            sampling_params=tinker.SamplingParams(max_tokens=1),
            include_prompt_logprobs=True,
            topk_prompt_logprobs=1,
            prompt_logprobs_last_n=count,
        )
        found = np.asarray(answer.prompt_logprobs[-count:], np.float64)
        best = [row[0][0] for row in answer.topk_prompt_logprobs[-count:]]
        return float(found.sum()), best == tokens[-count:]

    def _all(self, work: list[Coroutine[Any, Any, Any]]) -> list[Any]:
        async def together() -> list[Any]:
            room = asyncio.Semaphore(self._at_once)

            async def one(piece: Coroutine[Any, Any, Any]) -> Any:
                async with room:
                    return await piece

            return list(await asyncio.gather(*map(one, work)))

        return asyncio.run(together())


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens both begin with."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
