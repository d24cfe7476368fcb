"""The sampler: requests wait, their prompts are read, their sequences grow together, one token a step."""

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from tinsmith.errors import InvalidInput
from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import AdapterState, Failure, SampledPiece, SampleInput, SampleOutput, TopK
from tinsmith_worker.model import Base
from tinsmith_worker.sampler.order import by_adapter
from tinsmith_worker.sampler.pages import Pages
from tinsmith_worker.sampler.places import Part, Places
from tinsmith_worker.sampler.recorded import MOST_ADAPTERS
from tinsmith_worker.sampler.requests import Continuation, PromptScores, Request
from tinsmith_worker.sampler.runner import Drawn, Runner
from tinsmith_worker.sampler.shelf import Shelf
from tinsmith_worker.sampler.stops import Decoder, StopRule

log = logging.getLogger("tinsmith.sampler")

# How many sequences get their first token at once: each has its logits, which many of one request share.
_FIRST_TOKENS = 256


@dataclass(frozen=True)
class SamplerSettings:
    """max_pass_tokens: how much of the prompts is read in one step. max_sequences: how many grow at once.
    cache_bytes: for keys and values; None: a quarter of the GPU's memory, 2 GiB without one, and at least
    what one sequence as long as the context needs. page_tokens: what sequences share are whole pages.
    adapter_bytes: for adapters on the device; None: a sixteenth of the GPU's memory."""

    max_pass_tokens: int = 8192
    max_sequences: int = 256
    cache_bytes: int | None = None
    page_tokens: int = 32
    adapter_bytes: int | None = None


# log p of every token but the first of each text, as the engine computes it.
Score = Callable[[Sequence[tuple[Adapter, npt.NDArray[np.int32]]]], Sequence[npt.NDArray[np.float32]]]
# A pass that scores texts takes as long for a few of them: answers wait for company, this many steps at most.
_SCORING_STEPS = 16


@dataclass(frozen=True)
class Launched:
    """A token for each of these, asked of the device."""

    rows: list[Continuation]
    drawn: Drawn


class TorchSampler:
    """Keeps `contract.Sampler`. Rows of many adapters share every pass; a request's tokens depend on its own
    seed and weights alone (up to the rounding of float sums, which may differ with the size of a batch, and
    with how much of the prompt had been read before)."""

    def __init__(
        self,
        base: Base,
        tokenizer: Decoder | None = None,
        settings: SamplerSettings | None = None,
        *,
        score: Score | None = None,
    ) -> None:
        """`tokenizer` is needed for stop strings only. `score`: exact mode. What is said about the tokens of
        a request that narrows nothing is then what this says of the whole text (`TorchEngine.score`)."""
        self.base = base
        self.tokenizer = tokenizer
        self.settings = settings or SamplerSettings()
        self._launched: deque[Launched] = deque()
        self._complete: list[Request] = []
        self._unscored: list[Request] = []
        self._scoring_steps = 0  # since the first of them came
        self._done: list[SampleOutput | tuple[str, Failure]] = []
        self._pieces: list[SampledPiece] = []
        self._score = score
        self._runner = Runner(base, self.settings.max_sequences, self.settings.page_tokens)
        pages = Pages(self._open_cache(), self.settings.page_tokens)
        self._places = Places(pages, self.settings.max_sequences)
        self._shelf = Shelf(
            base,
            self.settings.adapter_bytes or _device_bytes(base.device, 16),
            enter=self._runner.enter,
            leave=self._runner.leave,
            most=MOST_ADAPTERS,
        )

    def _open_cache(self) -> int:
        """Pages that sequences can have. Fewer than asked for where there is no memory for more."""
        size = self.settings.page_tokens
        page_bytes = self._runner.cache.page_bytes(self.base.dtype)
        if self.settings.cache_bytes is None:
            least = math.ceil(self.base.facts.max_context_length / size)
            count = max(least, _device_bytes(self.base.device, 4) // page_bytes)
        else:
            count = max(1, self.settings.cache_bytes // page_bytes)
        while True:
            try:
                self._runner.open(count)
                return count
            except RuntimeError:
                if count == 1:
                    raise
                log.warning("no memory for %d pages of keys and values; trying half of them", count)
                count //= 2

    def hold(self, sampler_id: str, weights: AdapterState | Adapter) -> None:
        """See `contract.Sampler`; `weights` may be `Engine.frozen`'s."""
        self._shelf.hold(sampler_id, weights, self._places.samplers - {""})

    def holds(self, sampler_id: str) -> bool:
        return self._shelf.holds(sampler_id)

    def release(self, sampler_id: str) -> None:
        self._shelf.release(sampler_id)

    def warm_up(self) -> None:
        """Have everything compiled before somebody waits for it."""
        self._runner.warm_up()

    def add(self, given: SampleInput) -> None:
        """Queue a request; one that cannot be sampled is answered with a Failure by the next step."""
        try:
            self._places.waiting.append(self._accept(given))
        except InvalidInput as error:
            self._done.append((given.request_id, Failure(str(error))))

    def step(self) -> list[SampleOutput | tuple[str, Failure]]:
        """Let in, read up to max_pass_tokens of prompts, give every sequence that is ready one token."""
        before = len(self._launched)
        with torch.no_grad():
            self._places.admit(self.settings.max_pass_tokens, self._prepare)
            self._read()
            self._decode()
        # On a GPU the tokens of one step come back while the next one is under way: nobody waits for them.
        is_ahead = self._runner.is_ahead and len(self._launched) > before
        self._collect(before if is_ahead else len(self._launched))
        self._deliver()
        done, self._done = self._done, []
        return done

    def notify(self, call: Callable[[], None]) -> None:
        """It becomes busy by being given something, and not otherwise."""

    def pieces(self) -> list[SampledPiece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def cancel(self, request_id: str) -> None:
        self._drop(request_id)

    @property
    def most_sequences(self) -> int:
        return self.settings.max_sequences

    @property
    def busy(self) -> bool:
        return self._places.busy or bool(self._launched or self._unscored or self._done)

    def _prepare(self, request: Request) -> bool:
        """Have its weights on the device. False if there is no room for them now."""
        if sampler_id := request.given.sampler_id:
            request.adapter = self._shelf.bring(sampler_id, self._places.samplers - {""})
        return request.adapter is not None or not sampler_id

    def _accept(self, given: SampleInput) -> Request:
        facts = self.base.facts
        if given.sampler_id and not self._shelf.holds(given.sampler_id):
            raise InvalidInput(f"no sampler {given.sampler_id!r} is held here")
        _check(given, facts.vocab_size, facts.max_context_length)
        if given.stop_strings and self.tokenizer is None:
            raise InvalidInput(
                "stop strings need a tokenizer, and this base model has none: give stop tokens"
            )
        token_ids = self.base.end_tokens if given.stop_tokens is None else frozenset(given.stop_tokens)
        request = Request(
            given=given,
            stop=StopRule(token_ids, given.stop_strings, self.tokenizer),
            budget=min(given.max_tokens, facts.max_context_length - len(given.prompt)),
            scores=PromptScores(given) if PromptScores.asked(given) else None,
        )
        pages = self._places.pages
        if pages.needed(request.most_cells) > pages.count:
            raise InvalidInput(
                f"a prompt of {len(given.prompt)} tokens and {request.budget} more are beyond the "
                f"{pages.count * pages.page_tokens} that this worker has memory for: shorten it, or set a "
                "smaller max_tokens"
            )
        return request

    def _drop(self, request_id: str, *, is_sound: bool = True) -> None:
        """Forget everything about a request."""
        self._unscored = [r for r in self._unscored if r.given.request_id != request_id]
        for continuation in self._places.drop(request_id):
            freed = self._places.leave(continuation, is_sound=is_sound)
            if not is_sound:
                self._runner.clean(freed)

    def _fail(self, request: Request, failure: Failure, *, is_sound: bool = True) -> None:
        self._drop(request.given.request_id, is_sound=is_sound)
        self._done.append((request.given.request_id, failure))

    # Reading prompts

    def _read(self) -> None:
        parts = self._places.parts(self.settings.max_pass_tokens)
        parts = by_adapter(parts, [part.reading.request.adapter for part in parts])
        if not parts or self._read_together(parts):
            return
        for part in parts:
            if part.reading in self._places.reading:  # else its request has just failed
                self._read_together([part])

    def _read_together(self, parts: Sequence[Part]) -> bool:
        """False if the pass failed and nobody knows because of whom; alone, the request has failed itself."""
        try:
            logits_NV = self._runner.read(parts)
        except RuntimeError as error:
            log.exception("reading %d prompts in one pass failed", len(parts))
            if len(parts) == 1:
                message = f"the prompt could not be read: {error}"
                self._fail(parts[0].reading.request, Failure(message, "server"))
            return len(parts) == 1
        row_of: dict[Continuation, int] = {}
        for part in parts:
            self._places.has_read(part)
        for row, part in enumerate(part for part in parts if part.completes):
            row_of |= dict.fromkeys(self._begin(part), row)
        beginning = list(row_of)
        for start in range(0, len(beginning), _FIRST_TOKENS):
            rows = [c for c in beginning[start : start + _FIRST_TOKENS] if c in self._places.growing]
            self._launch(rows, lambda some: self._runner.pick(logits_NV, [row_of[c] for c in some]))
        return True

    def _begin(self, part: Part) -> list[Continuation]:
        """The sequences of a text that is now read, which get their next token."""
        request, continuations = part.reading.request, part.reading.continuations
        if not request.budget:
            self._finish(continuations)
            return []
        first, *others = continuations
        self._places.grow(continuations)
        if request.budget > 1:
            full = len(part.reading.tokens) // self.settings.page_tokens
            for other in others:
                other.pages = self._places.pages.share(first.pages[:full]) + other.pages
            try:
                self._runner.share([(first, other) for other in others], len(part.reading.tokens), full)
            except RuntimeError as error:
                log.exception("the prompt of %d sequences could not be copied", len(others))
                self._fail(request, Failure(f"the prompt could not be copied: {error}", "server"))
                return []
        return continuations

    # Growing

    def _decode(self) -> None:
        growing = [c for c in self._places.growing if not c.full and not c.ended]
        rows = [c for c in growing if c in self._places.growing and self._extend(c)]
        rows = [c for c in rows if c in self._places.growing]  # some stepped back for others
        self._launch(by_adapter(rows, [c.request.adapter for c in rows]), self._runner.next_logits)

    def _extend(self, continuation: Continuation) -> bool:
        """Whether it has room for the keys and values of its last token; others make some if need be."""
        while not self._places.extend(continuation):
            if self._launched:
                self._collect(len(self._launched))
            elif self._places.step_back() is continuation:
                return False
            if continuation not in self._places.growing:
                return False
        return True

    def _launch(
        self, rows: list[Continuation], logits_of: Callable[[Sequence[Continuation]], torch.Tensor]
    ) -> None:
        """Ask for the next token of every row; if that fails, of every request's by itself. Those that fail
        alone are given up."""
        if not rows:
            return
        try:
            drawn = self._runner.draw(rows, logits_of(rows))
        except RuntimeError as error:
            log.exception("the next token of %d sequences failed", len(rows))
            requests = list({id(c.request): c.request for c in rows}.values())
            if len(requests) == 1:
                self._fail(requests[0], Failure(f"the next token could not be sampled: {error}", "server"))
                return
            for request in requests:
                self._launch([c for c in rows if c.request is request], logits_of)
            return
        for continuation in rows:
            continuation.launched += 1
        self._launched.append(Launched(rows, drawn))

    def _collect(self, count: int) -> None:
        """Take in the tokens that were asked for so many times, the earliest first."""
        for _ in range(min(count, len(self._launched))):
            self._take(self._launched.popleft())

    def _take(self, launched: Launched) -> None:
        tokens, chosen, table = launched.drawn.wait()
        ended = []
        for row, continuation in enumerate(launched.rows):
            if continuation not in self._places.growing:
                continue  # it ended before this token, or its request has failed
            if np.isnan(chosen[row]):
                message = (
                    "the model's logits are not finite: these weights have diverged, sample earlier ones"
                )
                self._fail(continuation.request, Failure(message), is_sound=False)
                continue
            k = continuation.request.given.topk_sample_logprobs
            topk = None
            if k and table is not None:
                topk = TopK(table.token_ids[row : row + 1, :k], table.logprobs[row : row + 1, :k])
            continuation.append(tokens[row], chosen[row], topk)
            if continuation.request.given.is_streamed and not self._scores(continuation.request):
                self._pieces.append(continuation.last_piece)
            if continuation.ended:
                ended.append(continuation)
        self._finish(ended)

    def _finish(self, ended: Sequence[Continuation]) -> None:
        for continuation in ended:
            self._places.leave(continuation)
            request = continuation.request
            request.finished[continuation.index] = continuation.sequence
            if len(request.finished) == request.given.num_samples:
                self._complete.append(request)

    def _deliver(self) -> None:
        """Answer the requests that are complete."""
        complete, self._complete = self._complete, []
        for request in complete:
            if self._scores(request):
                self._unscored.append(request)
            else:
                self._done.append(request.output)
        if not self._unscored or self._score is None:
            return
        self._scoring_steps += 1
        tokens = sum(
            len(request.given.prompt) + len(sequence.tokens)
            for request in self._unscored
            for sequence in request.finished.values()
        )
        is_over = not self._places.busy and not self._launched
        if is_over or tokens >= self.settings.max_pass_tokens or self._scoring_steps >= _SCORING_STEPS:
            requests, self._unscored, self._scoring_steps = self._unscored, [], 0
            self._answer_scored(requests, self._score)

    def _scores(self, request: Request) -> bool:
        """Whether what is said about its tokens is known when all are there, and not before."""
        return self._score is not None and request.is_plain

    def _answer_scored(self, requests: Sequence[Request], score: Score) -> None:
        """Together; if that fails, each by itself."""
        try:
            self._rescore(requests, score)
        except RuntimeError as error:
            log.exception("%d requests could not be scored", len(requests))
            if len(requests) > 1:
                for request in requests:
                    self._answer_scored([request], score)
                return
            message = f"what was sampled could not be scored: {error}"
            self._done.append((requests[0].given.request_id, Failure(message, "server")))
            return
        self._done += [request.output for request in requests]

    def _rescore(self, requests: Sequence[Request], score: Score) -> None:
        wanted = [
            (request, index, sequence)
            for request in requests
            for index, sequence in request.finished.items()
            if len(sequence.tokens)
        ]
        texts = [
            (request.adapter or self._shelf.nothing, np.concatenate([request.given.prompt, sequence.tokens]))
            for request, _, sequence in wanted
        ]
        for (request, index, sequence), found in zip(wanted, score(texts) if texts else (), strict=True):
            logprobs = found[len(request.given.prompt) - 1 :].astype(np.float32)
            request.finished[index] = replace(sequence, logprobs=logprobs)


def _device_bytes(device: torch.device, part: int) -> int:
    """A part of the GPU's memory, or of 8 GiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // part
    return (8 << 30) // part


def _check(given: SampleInput, vocab_size: int, max_context_length: int) -> None:
    """InvalidInput for what would break the pass it shares with others."""
    length, targets = len(given.prompt), given.target_prompt_logprobs
    if not length:
        raise InvalidInput("the prompt is empty: give at least one token")
    if length > max_context_length:
        raise InvalidInput(
            f"the prompt's {length} tokens are more than the model's {max_context_length}; shorten it"
        )
    if not 0 <= given.prompt.min() <= given.prompt.max() < vocab_size:
        raise InvalidInput(f"the prompt holds tokens outside the vocabulary 0..{vocab_size - 1}")
    if given.num_samples < 1 or given.max_tokens < 0:
        raise InvalidInput("num_samples must be at least 1 and max_tokens at least 0")
    if not 0 <= given.temperature < float("inf"):
        raise InvalidInput(f"temperature must be 0 or a finite positive number, got {given.temperature}")
    if not 0 <= given.top_p <= 1:
        raise InvalidInput(f"top_p must be between 0 and 1, got {given.top_p}")
    if "" in given.stop_strings:
        raise InvalidInput("a stop string is empty: every text contains it; leave it out")
    if targets is not None and (targets.ndim != 2 or len(targets) != length - 1):
        raise InvalidInput(
            f"target_prompt_logprobs has shape {list(targets.shape)}, it must be [{length - 1}, K] here"
        )
    if targets is not None and targets.size and not -1 <= targets.min() <= targets.max() < vocab_size:
        raise InvalidInput(f"target_prompt_logprobs holds tokens outside the vocabulary 0..{vocab_size - 1}")
