"""Rollouts: what a model read and wrote, kept as training needs it, and gathered side by side."""

import asyncio
import logging
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from tinsmith_cookbook.sdk import tinker

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass
class Rollout:
    """One episode as one sequence. What the model wrote (`sampled`) is trained on; what it was given —
    prompts, tool output, the other side's moves — is only read.

        rollout = Rollout()
        rollout.read(prompt)
        rollout.write(answer.sequences[0])
        datum = rollout.datum(advantage=0.5)
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    reward: float = 0.0
    # (sequence_id, tokens read before it, tokens written), for stable_reinforce.
    _turns: list[tuple[str, int, int]] = field(default_factory=list)

    def read(self, tokens: Sequence[int], logprobs: Sequence[float | None] | None = None) -> None:
        """Tokens given to the model. Their logprobs are needed by dro only; the very first has none."""
        if logprobs is not None:
            missing = [at for at, p in enumerate(logprobs, len(self.tokens)) if p is None and at]
            if missing or len(logprobs) != len(tokens):
                raise ValueError("the tokens that were read came without all of their logprobs")
        self.tokens += tokens
        self.logprobs += [0.0] * len(tokens) if logprobs is None else [p or 0.0 for p in logprobs]
        self.sampled += [False] * len(tokens)

    def write(self, sequence: Any) -> list[int]:
        """Tokens the model sampled after all of the above; returns them."""
        if sequence.logprobs is None or len(sequence.logprobs) != len(sequence.tokens):
            raise ValueError("a sampled sequence came without its logprobs: there is nothing to train on")
        written = list(sequence.tokens)
        read = len(self.tokens) - sum(before + wrote for _, before, wrote in self._turns)
        self._turns.append((sequence.sequence_id, read, len(written)))
        self.tokens += written
        self.logprobs += sequence.logprobs
        self.sampled += [True] * len(written)
        return written

    @property
    def written(self) -> list[int]:
        """The sampled tokens alone."""
        return [token for token, own in zip(self.tokens, self.sampled, strict=True) if own]

    def datum(self, advantage: npt.ArrayLike, loss_fn: str = "importance_sampling") -> tinker.Datum:
        """Position i predicts token i + 1. The advantage, one number or one for each token of `written`,
        stands where that token was sampled, and 0 elsewhere."""
        own = np.asarray(self.sampled, np.float32)
        advantages = np.zeros(len(own), np.float32)
        advantages[own > 0] = advantage
        inputs = {
            "target_tokens": _integers(self.tokens[1:]),
            "logprobs": _floats(self.logprobs[1:]),
            "advantages": _floats(advantages[1:]),
        }
        if loss_fn == "gspo":
            inputs["sequence_ratio_mask"] = _floats(own[1:])
        if loss_fn == "stable_reinforce":
            del inputs["logprobs"]  # the service looks them up in its own record of the samples
        datum = tinker.Datum(model_input=tinker.ModelInput.from_ints(self.tokens[:-1]), loss_fn_inputs=inputs)
        return datum.with_provenance(*self._spans()) if loss_fn == "stable_reinforce" else datum

    def _spans(self) -> tuple[list[Any], list[Any]]:
        """Which sample each position came from: of the input tokens[:-1], and of the targets tokens[1:]."""
        types = tinker.types
        spans: list[tuple[Any, str, int, int]] = []
        at = 0
        for sequence_id, read, wrote in self._turns:
            spans.append((types.PromptProvenanceSpan, sequence_id, at, read))
            spans.append((types.SampledProvenanceSpan, sequence_id, 0, wrote))
            at += read + wrote
        if at < len(self.tokens):
            raise ValueError("the rollout ends with tokens that no sample followed: leave them out")
        (kind, name, offset, length), *rest = spans
        last_kind, last_name, last_offset, last_length = spans[-1]
        inputs = [*spans[:-1], (last_kind, last_name, last_offset, last_length - 1)]
        targets = [(kind, name, offset + 1, length - 1), *rest]
        return (
            [k(sequence_id=n, offset=o, length=size) for k, n, o, size in inputs],
            [k(sequence_id=n, offset=o, length=size) for k, n, o, size in targets],
        )


async def group(
    sampler: Any, prompt: Sequence[int], size: int, params: Any, *, prompt_logprobs: bool = False
) -> list[Rollout]:
    """`size` answers to one prompt, each a rollout of one turn."""
    answer = await sampler.sample(
        prompt=tinker.ModelInput.from_ints(list(prompt)),
        num_samples=size,
        sampling_params=params,
        include_prompt_logprobs=prompt_logprobs,
    )
    made = []
    for sequence in answer.sequences:
        rollout = Rollout()
        rollout.read(list(prompt), (answer.prompt_logprobs or []) if prompt_logprobs else None)
        rollout.write(sequence)
        made.append(rollout)
    return made


async def gather(
    work: Iterable[Coroutine[Any, Any, T]], *, timeout_seconds: float = 300, tolerated: float = 0.5
) -> list[T]:
    """Run all of it side by side; what finished, in the order given.

    A piece that raises or takes longer is left out and logged, so that one failed rollout neither hangs nor
    ends a run. Where more than the share `tolerated` fails something is wrong with all of them: that is
    raised.
    """
    done = await asyncio.gather(
        *(asyncio.wait_for(piece, timeout_seconds) for piece in work), return_exceptions=True
    )
    failed = [result for result in done if isinstance(result, BaseException)]
    for error in failed:
        if not isinstance(error, Exception):  # cancelled from outside, or a keyboard interrupt
            raise error
        logger.warning("a rollout failed and is left out: %s: %s", type(error).__name__, error)
    if failed and len(failed) > tolerated * len(done):
        raise RuntimeError(
            f"{len(failed)} of {len(done)} rollouts failed, the first: {failed[0]!r}"
        ) from failed[0]
    return [result for result in done if not isinstance(result, BaseException)]


def kl(rollouts: Sequence[Rollout], passed: Any) -> dict[str, float]:
    """How far the sampler's distribution is from the trainer's, over the sampled tokens, from the output of
    the forward_backward of these rollouts: `kl` is the mean of q - lp (k1), `kl_k2` that of its square
    halved.

    On-policy they should stay below 0.01; dense models reach 0.0002 when all is well (the official cookbook).
    """
    differences = []
    for rollout, output in zip(rollouts, passed.loss_fn_outputs, strict=True):
        own = np.asarray(rollout.sampled[1:])
        q = np.asarray(rollout.logprobs[1:])[own]
        differences.append(q - output["logprobs"].to_numpy()[own])
    joined = np.concatenate(differences)
    return {"kl": float(joined.mean()), "kl_k2": float((joined**2).mean() / 2)}


def _floats(values: Any) -> tinker.TensorData:
    return tinker.TensorData.from_numpy(np.asarray(values, np.float32))


def _integers(values: npt.ArrayLike) -> tinker.TensorData:
    return tinker.TensorData.from_numpy(np.asarray(values, np.int64))
