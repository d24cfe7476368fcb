"""A sample request on its way: the sequences that continue its prompt, and what it asked about the prompt.

Shapes: P tokens of the prompt, N rows, V vocabulary, K columns asked for.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import SampledPiece, SampledSequence, SampleInput, SampleOutput, TopK
from tinsmith_worker.sampler.distribution import COLDEST, PROMPT_STREAM, draw, plain_logprobs, random_stream
from tinsmith_worker.sampler.stops import StopRule

EMPTY_TOKEN, EMPTY_LOGPROB = 0, -99999.0


@dataclass(eq=False)
class Request:
    """budget: how many tokens each sequence may get, the context's end considered. admitted: how many of its
    sequences have been let in, finished: those that have ended, by index. hits: how many tokens of the prompt
    had been read before, by anybody."""

    given: SampleInput
    stop: StopRule
    budget: int
    scores: "PromptScores | None"
    adapter: Adapter | None = None  # on the device, while it is under way
    admitted: int = 0
    finished: dict[int, SampledSequence] = field(default_factory=dict)
    hits: int | None = None

    @property
    def scope(self) -> tuple[str, str]:
        """Whoever samples the same weights for the same tenant may find what was read before."""
        return self.given.tenant_id, self.given.sampler_id

    @property
    def most_cells(self) -> int:
        """Tokens of one sequence whose keys and values are kept: the last one's are not."""
        return len(self.given.prompt) + max(0, self.budget - 1)

    @property
    def most_hits(self) -> int:
        """So much of the prompt may be taken as read: its last token says what comes next, and what is scored
        must be read."""
        last = len(self.given.prompt) - 1
        return last if self.scores is None else min(last, self.scores.rows(0, last).start)

    @property
    def is_plain(self) -> bool:
        """Whether its tokens' logprobs are the plain model's."""
        given = self.given
        return given.temperature == 0 or (given.temperature == 1 and given.top_k <= 0 and given.top_p == 1)

    @property
    def output(self) -> SampleOutput:
        scores = self.scores
        return SampleOutput(
            request_id=self.given.request_id,
            sequences=[self.finished[index] for index in range(self.given.num_samples)],
            prompt_logprobs=scores.logprobs if scores else None,
            topk_prompt=scores.topk if scores else None,
            target_prompt_logprobs=scores.targets if scores else None,
            prompt_alt_tokens=scores.alternatives if scores else None,
            cache_hit_tokens=self.hits or 0,
        )


class Continuation:
    """One sequence of a request: its tokens so far, and its own random numbers.

    `pages` hold its keys and values and `seat` is where the device keeps its last token, while it is under
    way. `launched` tokens have been asked of the device, `count` of them have come back.
    """

    def __init__(self, request: Request, index: int) -> None:
        self.request = request
        self.index = index
        self.seat: int | None = None
        self.pages: list[int] = []
        self.launched = 0
        self.count = 0
        self.stopped = False
        self._random = random_stream(request.given.seed, index)
        self._uniforms = np.empty(0)
        self._tokens = np.empty(16, np.int32)
        self._logprobs = np.empty(16, np.float32)
        self._topk: list[TopK] = []

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the sequence, those that are still to come back included."""
        return len(self.request.given.prompt) + self.launched

    @property
    def uniform(self) -> float:
        """The random number of the next token that is launched, however often it is tried."""
        if self.launched >= len(self._uniforms):
            more = self._random.random(min(64, self.request.budget))
            self._uniforms = np.concatenate([self._uniforms, more])
        return float(self._uniforms[self.launched])

    @property
    def full(self) -> bool:
        return self.launched == self.request.budget

    @property
    def ended(self) -> bool:
        return self.stopped or self.count == self.request.budget

    @property
    def text(self) -> npt.NDArray[np.int32]:
        """The prompt and the tokens that have come back."""
        return np.concatenate([self.request.given.prompt, self._tokens[: self.count]])

    def append(self, token: int, logprob: float, topk: TopK | None) -> None:
        """Take the next token; `ended` then says whether that was the last one."""
        if self.count == len(self._tokens):
            self._tokens = np.resize(self._tokens, 2 * self.count)
            self._logprobs = np.resize(self._logprobs, 2 * self.count)
        self._tokens[self.count], self._logprobs[self.count] = token, logprob
        self.count += 1
        if topk is not None:
            self._topk.append(topk)
        self.stopped = self.request.stop.ends(self._tokens[: self.count])

    @property
    def last_piece(self) -> SampledPiece:
        """The token that was appended last."""
        last = slice(self.count - 1, self.count)
        topk = self._topk[-1] if self._topk else None
        token = SampledSequence(
            self._tokens[last].copy(), self._logprobs[last].copy(), stopped=self.stopped, topk=topk
        )
        return SampledPiece(self.request.given.request_id, self.index, last.start, token, self.ended)

    @property
    def sequence(self) -> SampledSequence:
        width = self.request.given.topk_sample_logprobs
        parts = [empty_topk(0, width), *self._topk]
        return SampledSequence(
            tokens=self._tokens[: self.count].copy(),
            logprobs=self._logprobs[: self.count].copy(),
            stopped=self.stopped,
            topk=TopK(
                np.concatenate([part.token_ids for part in parts]),
                np.concatenate([part.logprobs for part in parts]),
            )
            if width
            else None,
        )


class PromptScores:
    """What a request asked about its prompt, filled as the prompt is read.

    The logits of row i are the plain model's and score position i + 1. Logprobs and top-k cover the last
    `prompt_logprobs_last_n` positions if that is set. Alternatives are drawn from the whole distribution at
    the request's temperature (no top-k, no top-p), with the plain model's logprobs.
    """

    def __init__(self, given: SampleInput) -> None:
        length = len(given.prompt)
        self._given = given
        self._first = (
            1 if given.prompt_logprobs_last_n is None else max(1, length - given.prompt_logprobs_last_n)
        )
        self.logprobs = np.full(length, np.nan, np.float32) if given.prompt_logprobs else None
        self.topk = empty_topk(length, given.topk_prompt_logprobs) if given.topk_prompt_logprobs else None
        self.alternatives = (
            empty_topk(length - 1, given.prompt_alt_tokens_k) if given.prompt_alt_tokens_k else None
        )
        asked = given.target_prompt_logprobs
        self.targets = None if asked is None else np.zeros(asked.shape, np.float32)
        # Made whole at once: the draws must not depend on the pieces in which the prompt is read.
        drawn = (length - 1, given.prompt_alt_tokens_k)
        self._uniforms = random_stream(given.seed, PROMPT_STREAM).random(
            drawn if self.alternatives else (0, 0)
        )

    @staticmethod
    def asked(given: SampleInput) -> bool:
        return bool(
            given.prompt_logprobs
            or given.topk_prompt_logprobs
            or given.prompt_alt_tokens_k
            or given.target_prompt_logprobs is not None
        )

    def rows(self, start: int, stop: int) -> range:
        """The rows among [start, stop) whose logits are wanted."""
        everywhere = self.alternatives is not None or self.targets is not None
        last = min(stop, len(self._given.prompt) - 1)
        return range(min(last, max(start, 0 if everywhere else self._first - 1)), last)

    def take(self, first_row: int, logits_NV: torch.Tensor) -> None:
        """Score positions from first_row + 1 on by the plain model's `logits_NV`. Waits for the device."""
        logprobs_NV = plain_logprobs(logits_NV)
        rows = slice(first_row, first_row + len(logits_NV))
        positions = slice(rows.start + 1, rows.stop + 1)
        covered = slice(max(positions.start, self._first), positions.stop)
        if covered.start < covered.stop:
            self._score(logprobs_NV[covered.start - positions.start :], covered)
        if self.targets is not None:
            assert self._given.target_prompt_logprobs is not None
            asked_NK = torch.from_numpy(self._given.target_prompt_logprobs[rows].astype(np.int64)).to(
                logprobs_NV.device
            )
            found_NK = logprobs_NV.gather(-1, asked_NK.clamp(min=0)).masked_fill_(asked_NK < 0, 0.0)
            self.targets[rows] = found_NK.cpu().numpy()
        if self.alternatives is not None:
            self._draw(logprobs_NV, logits_NV, rows)

    def _score(self, logprobs_NV: torch.Tensor, covered: slice) -> None:
        if self.logprobs is not None:
            tokens_N1 = torch.from_numpy(self._given.prompt[covered].astype(np.int64))[:, None].to(
                logprobs_NV.device
            )
            self.logprobs[covered] = logprobs_NV.gather(-1, tokens_N1)[:, 0].cpu().numpy()
        if self.topk is not None:
            width = self.topk.token_ids.shape[1]
            best = logprobs_NV.topk(min(width, logprobs_NV.shape[-1]), dim=-1)
            found = fill_topk(width, best.values.cpu().numpy(), best.indices.cpu().numpy())
            self.topk.logprobs[covered], self.topk.token_ids[covered] = found.logprobs, found.token_ids

    def _draw(self, logprobs_NV: torch.Tensor, logits_NV: torch.Tensor, rows: slice) -> None:
        assert self.alternatives is not None
        temperature = self._given.temperature
        greedy_N = torch.full((len(logits_NV),), temperature == 0, device=logits_NV.device)
        drawn_NV = logprobs_NV
        if temperature not in (0, 1):
            drawn_NV = torch.log_softmax(
                (logits_NV - logits_NV.amax(-1, keepdim=True)) / max(temperature, COLDEST), dim=-1
            )
        uniform_NK = torch.from_numpy(self._uniforms[rows]).to(logits_NV.device)
        tokens_NK = draw(drawn_NV, uniform_NK, greedy_N)
        self.alternatives.token_ids[rows] = tokens_NK.cpu().numpy()
        self.alternatives.logprobs[rows] = logprobs_NV.gather(-1, tokens_NK).cpu().numpy()


def empty_topk(length: int, width: int) -> TopK:
    return TopK(
        np.full((length, width), EMPTY_TOKEN, np.int32), np.full((length, width), EMPTY_LOGPROB, np.float32)
    )


def fill_topk(width: int, logprobs_NK: npt.NDArray[np.float32], tokens_NK: npt.NDArray[np.int64]) -> TopK:
    """The likeliest tokens of each row, best first, in `width` columns; a cell is empty where a row has no
    more of any chance."""
    table = empty_topk(len(tokens_NK), width)
    possible = np.isfinite(logprobs_NK)
    table.logprobs[:, : logprobs_NK.shape[1]] = np.where(possible, logprobs_NK, EMPTY_LOGPROB)
    table.token_ids[:, : tokens_NK.shape[1]] = np.where(possible, tokens_NK, EMPTY_TOKEN)
    return table
