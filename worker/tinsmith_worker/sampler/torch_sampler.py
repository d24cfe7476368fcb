"""The sampler: requests wait, their prompts are read, their sequences grow together, one token a step.

Shapes: T packed tokens, N rows, one of each sequence that gets a token, D hidden, V vocabulary.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

from tinsmith.errors import InvalidInput
from tinsmith_worker.adapters import Adapter
from tinsmith_worker.contract import AdapterState, Failure, SampleInput, SampleOutput, TopK
from tinsmith_worker.model import Base
from tinsmith_worker.sampler.cache import Cache, Decode, Piece, Prefill, whole_steps
from tinsmith_worker.sampler.distribution import Filters, distribution, draw
from tinsmith_worker.sampler.requests import Continuation, PromptScores, Request, empty_topk, write_topk
from tinsmith_worker.sampler.stops import Decoder, StopRule
from tinsmith_worker.stream import Segment, Stream

log = logging.getLogger("tinsmith.sampler")

# Logits of a prompt that are held at once while it is scored: 2^26 float32 are 256 MB.
_SCORED_LOGITS = 1 << 26


@dataclass(frozen=True)
class SamplerSettings:
    """max_pass_tokens: how much of the prompts is read in one pass. max_sequences: how many grow at once.
    cache_bytes: for keys and values; a sequence is admitted only if it can be finished within. None: a
    quarter of the GPU's memory, 2 GiB without one."""

    max_pass_tokens: int = 8192
    max_sequences: int = 256
    cache_bytes: int | None = None


@dataclass(eq=False)
class Prompt:
    """A prompt being read for some sequences of its request, into the slot of the first."""

    request: Request
    continuations: list[Continuation]
    scores: PromptScores | None
    read: int = 0

    @property
    def unread(self) -> int:
        return len(self.request.given.prompt) - self.read


@dataclass(frozen=True)
class Reading:
    """The next tokens [start, stop) of a prompt."""

    prompt: Prompt
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def completes(self) -> bool:
        return self.stop == len(self.prompt.request.given.prompt)


@dataclass(frozen=True)
class Round:
    """What stays the same from step to step while nobody comes or goes: rows in the order of adapters."""

    rows: list[Continuation]
    slots_N: torch.Tensor
    segments: tuple[Segment, ...]
    filters: Filters


class TorchSampler:
    """Keeps `contract.Sampler`. Rows of many adapters share every pass; a request's tokens depend on its own
    seed and weights alone (up to the rounding of float sums, which may differ with the size of a batch)."""

    def __init__(
        self, base: Base, tokenizer: Decoder | None = None, settings: SamplerSettings | None = None
    ) -> None:
        """`tokenizer` is needed for stop strings only."""
        self.base = base
        self.tokenizer = tokenizer
        self.settings = settings or SamplerSettings()
        self._held: dict[str, Adapter] = {}
        self._waiting: deque[Request] = deque()
        self._reading: deque[Prompt] = deque()
        self._slots: list[Continuation] = []  # by slot
        self._ready: set[Continuation] = set()  # of those, the ones whose prompt is read
        self._round: Round | None = None
        self._done: list[SampleOutput | tuple[str, Failure]] = []
        self._cache = Cache()
        self._cache_bytes = self.settings.cache_bytes or _default_cache_bytes(base.device)
        self._measured = False

    def hold(self, sampler_id: str, state: AdapterState) -> None:
        if sampler_id not in self._held:
            adapter = self.base.adapter_of(state)
            adapter.weights = adapter.compute  # the float32 masters serve training only
            self._held[sampler_id] = adapter

    def holds(self, sampler_id: str) -> bool:
        return sampler_id in self._held

    def release(self, sampler_id: str) -> None:
        self._held.pop(sampler_id, None)

    def add(self, given: SampleInput) -> None:
        """Queue a request; one that cannot be sampled is answered with a Failure by the next step."""
        try:
            self._waiting.append(self._accept(given))
        except InvalidInput as error:
            self._done.append((given.request_id, Failure(str(error))))

    def step(self) -> list[SampleOutput | tuple[str, Failure]]:
        """Admit, read up to max_pass_tokens of prompts, give every sequence that is ready one token."""
        with torch.no_grad():
            self._admit()
            self._read()
            self._decode()
        if not self._slots:
            self._cache.clear()
        done, self._done = self._done, []
        return done

    def cancel(self, request_id: str) -> None:
        self._drop(request_id)

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._slots or self._done)

    # Who takes part

    def _accept(self, given: SampleInput) -> Request:
        facts = self.base.facts
        if given.sampler_id and given.sampler_id not in self._held:
            raise InvalidInput(f"no sampler {given.sampler_id!r} is held here")
        _check(given, facts.vocab_size, facts.max_context_length)
        if given.stop_strings and self.tokenizer is None:
            raise InvalidInput(
                "stop strings need a tokenizer, and this base model has none: give stop tokens"
            )
        token_ids = self.base.end_tokens if given.stop_tokens is None else frozenset(given.stop_tokens)
        return Request(
            given=given,
            adapter=self._held[given.sampler_id] if given.sampler_id else None,
            stop=StopRule(token_ids, given.stop_strings, self.tokenizer),
            budget=min(given.max_tokens, facts.max_context_length - len(given.prompt)),
            scores=PromptScores(given) if PromptScores.asked(given) else None,
        )

    def _admit(self) -> None:
        unread = sum(prompt.unread for prompt in self._reading)
        while self._waiting and unread < self.settings.max_pass_tokens:
            request = self._waiting[0]
            room = self._make_room(request)
            if not room and self._slots:
                break
            if not room:
                self._fail(request, Failure("there is no memory for its keys and values", "server"))
                continue
            first = request.admitted
            request.admitted = min(first + room, request.given.num_samples)
            continuations = [Continuation(request, i) for i in range(first, request.admitted)]
            for continuation in continuations:
                continuation.slot = len(self._slots)
                self._slots.append(continuation)
            prompt = Prompt(request, continuations, scores=None if first else request.scores)
            self._reading.append(prompt)
            unread += prompt.unread
            if request.admitted == request.given.num_samples:
                self._waiting.popleft()

    def _make_room(self, request: Request) -> int:
        """How many of the request's sequences can join now, their slots made; fewer where memory ends."""
        count = 0
        try:
            count = min(self._room(request.longest), request.given.num_samples - request.admitted)
        except RuntimeError:
            log.exception("one token could not be read")
        while count:
            try:
                self._reserve(len(self._slots) + count, len(request.given.prompt))
                break
            except RuntimeError:
                log.exception("no memory for %d more sequences", count)
                count //= 2
        return count

    def _room(self, longest: int) -> int:
        """How many sequences that may grow to `longest` tokens can join; one always can join none."""
        longest = whole_steps(max(longest, *(c.request.longest for c in self._slots), 1))
        at_once = self._cache_bytes // (self._bytes_per_token() * longest)
        return max(min(at_once, self.settings.max_sequences) - len(self._slots), 0 if self._slots else 1)

    def _bytes_per_token(self) -> int:
        """One token through the base tells it, whatever the architecture."""
        if not self._measured:
            self._cache.reserve(1, 1)
            zero_T = torch.zeros(1, dtype=torch.int64, device=self.base.device)
            self.base.forward(
                Stream(zero_T, zero_T, (Segment(0, 1, None),), Prefill(self._cache, [Piece(0, 0, 1)]))
            )
            self._cache.clear()
            self._measured = True
        return self._cache.token_bytes

    def _drop(self, request_id: str) -> None:
        """Forget everything about a request."""
        self._waiting = deque(r for r in self._waiting if r.given.request_id != request_id)
        self._reading = deque(p for p in self._reading if p.request.given.request_id != request_id)
        self._leave({c for c in self._slots if c.request.given.request_id == request_id})

    def _leave(self, leaving: set[Continuation]) -> None:
        """Free their slots; the last ones in use move into the gaps."""
        if not leaving:
            return
        used, staying = len(self._slots), len(self._slots) - len(leaving)
        gaps = [slot for slot, continuation in enumerate(self._slots[:staying]) if continuation in leaving]
        moving = [continuation for continuation in self._slots[staying:] if continuation not in leaving]
        self._cache.copy([_slot(continuation) for continuation in moving], gaps)
        self._cache.clean(slice(staying, used))
        for continuation, gap in zip(moving, gaps, strict=True):
            self._slots[gap], continuation.slot = continuation, gap
        del self._slots[staying:]
        for continuation in leaving:
            continuation.slot = None
        self._ready -= leaving
        self._round = None

    def _reserve(self, slots: int, length: int) -> None:
        """All prompts, those still being read too, have their room from the start."""
        held = [c.length for c in self._ready] + [len(p.request.given.prompt) for p in self._reading]
        self._cache.reserve(slots, max(length, *held, 0), self._cache_bytes)

    def _fail(self, request: Request, failure: Failure) -> None:
        self._drop(request.given.request_id)
        self._done.append((request.given.request_id, failure))

    # Reading prompts

    def _read(self) -> None:
        readings = self._next_readings()
        if not readings or self._read_together(readings):
            return
        for reading in readings:
            if reading.prompt in self._reading:  # else its request has just failed
                self._read_together([reading])

    def _read_together(self, readings: Sequence[Reading]) -> bool:
        """False if the pass failed and nobody knows because of whom; alone, the request has failed itself."""
        try:
            logits_NV = self._pass(readings)
        except RuntimeError as error:
            log.exception("reading %d prompts in one pass failed", len(readings))
            if len(readings) == 1:
                message = f"the prompt could not be read: {error}"
                self._fail(readings[0].prompt.request, Failure(message, "server"))
            return len(readings) == 1
        self._take_up(readings, logits_NV)
        return True

    def _next_readings(self) -> list[Reading]:
        """Prompts in the order of their arrival up to max_pass_tokens, then in the order of adapters."""
        readings: list[Reading] = []
        left = self.settings.max_pass_tokens
        for prompt in self._reading:
            if not left:
                break
            stop = prompt.read + min(left, prompt.unread)
            left -= stop - prompt.read
            readings.append(Reading(prompt, prompt.read, stop))
        return _by_adapter(readings, [r.prompt.request.adapter for r in readings])

    def _pass(self, readings: Sequence[Reading]) -> torch.Tensor:
        """Read, score what is asked; [N, V] logits after each prompt that is now complete."""
        device = self.base.device
        pieces = [Piece(_slot(r.prompt.continuations[0]), r.start, r.stop) for r in readings]
        tokens = np.concatenate([r.prompt.request.given.prompt[r.start : r.stop] for r in readings])
        positions = np.concatenate([np.arange(r.start, r.stop) for r in readings])
        stream = Stream(
            tokens_T=torch.from_numpy(tokens.astype(np.int64)).to(device),
            positions_T=torch.from_numpy(positions).to(device),
            segments=_segments([(r.prompt.request.adapter, r.rows) for r in readings]),
            attention=Prefill(self._cache, pieces),
        )
        hidden_TD = self.base.forward(stream)
        row, ends = 0, []
        for reading in readings:
            self._score(reading, hidden_TD[row : row + reading.rows])
            row += reading.rows
            if reading.completes:
                ends.append((reading.prompt.request.adapter, row - 1))
        hidden_ND = hidden_TD[torch.tensor([end for _, end in ends], dtype=torch.int64, device=device)]
        return self._logits(hidden_ND, _segments([(adapter, 1) for adapter, _ in ends]))

    def _score(self, reading: Reading, hidden_TD: torch.Tensor) -> None:
        scores = reading.prompt.scores
        if scores is None:
            return
        wanted = scores.rows(reading.start, reading.stop)
        rows_at_once = max(1, _SCORED_LOGITS // self.base.facts.vocab_size)
        for start in range(wanted.start, wanted.stop, rows_at_once):
            stop = min(start + rows_at_once, wanted.stop)
            chunk_ND = hidden_TD[start - reading.start : stop - reading.start]
            scores.take(start, self.base.head.logits(chunk_ND, reading.prompt.request.adapter))

    def _take_up(self, readings: Sequence[Reading], logits_NV: torch.Tensor) -> None:
        """Give the sequences of every complete prompt their first token; row n of the logits is its own."""
        for reading in readings:
            reading.prompt.read = reading.stop
        complete = [reading.prompt for reading in readings if reading.completes]
        growing: list[tuple[Continuation, int]] = []
        for row, prompt in enumerate(complete):
            self._reading.remove(prompt)
            first, *others = prompt.continuations
            try:
                if prompt.request.budget > 1:
                    self._cache.copy([_slot(first)] * len(others), [_slot(other) for other in others])
            except RuntimeError as error:
                log.exception("copying a prompt %d times failed", len(others))
                self._fail(prompt.request, Failure(f"its prompt could not be copied: {error}", "server"))
                continue
            growing += [(continuation, row) for continuation in prompt.continuations]
        self._finish([c for c, _ in growing if c.slot is not None and c.full])
        source = {c: row for c, row in growing if c.slot is not None and not c.full}
        if not source:
            return
        self._ready.update(source)
        self._round = None
        self._grow(self._plan(list(source)), lambda rows: logits_NV[[source[c] for c in rows.rows]])

    # Growing sequences

    def _decode(self) -> None:
        self._lengthen()
        if not self._ready:
            return
        if self._round is None:
            self._round = self._plan([c for c in self._slots if c in self._ready])
        self._grow(self._round, self._next_logits)

    def _lengthen(self) -> None:
        """Make room for one token more of each sequence; where memory ends, the longest fails."""
        while self._ready:
            longest = max(self._ready, key=lambda c: c.length)
            try:
                self._reserve(len(self._slots), longest.length)
                return
            except RuntimeError as error:
                log.exception("no memory for a sequence of %d tokens", longest.length)
                message = f"there is no memory for a sequence of {longest.length} tokens: {error}"
                self._fail(longest.request, Failure(message, "server"))

    def _grow(self, this: Round, logits_of: Callable[[Round], torch.Tensor]) -> None:
        """Give each row its next token. If that fails, it is tried request by request: one that fails by
        itself has failed, the others go on as if nothing had been."""
        try:
            drawn = self._draw(this, logits_of(this))
        except RuntimeError as error:
            log.exception("the next token of %d sequences failed", len(this.rows))
            requests = list({id(c.request): c.request for c in this.rows}.values())
            if len(requests) == 1:
                self._fail(requests[0], Failure(f"the next token could not be sampled: {error}", "server"))
                return
            for request in requests:
                rows = [c for c in this.rows if c.request is request and c in self._ready]
                if rows:
                    self._grow(self._plan(rows), logits_of)
            return
        self._extend(this.rows, *drawn)

    def _next_logits(self, this: Round) -> torch.Tensor:
        """What the base says after the last token of each row: [N, V]."""
        count, device = len(this.rows), self.base.device
        tokens_N = torch.from_numpy(np.fromiter((c.last_token for c in this.rows), np.int64, count)).to(
            device
        )
        positions = np.fromiter((c.length - 1 for c in this.rows), np.int64, count)
        positions_N, longest = torch.from_numpy(positions).to(device), int(positions.max()) + 1
        attention = Decode(self._cache, this.slots_N, positions_N, slots=len(self._slots), longest=longest)
        hidden_ND = self.base.forward(Stream(tokens_N, positions_N, this.segments, attention))
        return self._logits(hidden_ND, this.segments)

    def _plan(self, growing: Sequence[Continuation]) -> Round:
        rows = _by_adapter(growing, [c.request.adapter for c in growing])
        return Round(
            rows=rows,
            slots_N=torch.tensor([_slot(c) for c in rows], device=self.base.device),
            segments=_segments([(c.request.adapter, 1) for c in rows]),
            filters=self._filters(rows),
        )

    def _filters(self, rows: Sequence[Continuation]) -> Filters:
        settings = [(c.request.given.temperature, c.request.given.top_k, c.request.given.top_p) for c in rows]
        return Filters.of(settings, self.base.facts.vocab_size, self.base.device)

    def _logits(self, hidden_ND: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
        if not segments:
            return hidden_ND.new_empty((0, self.base.facts.vocab_size), dtype=torch.float32)
        return torch.cat([self.base.head.logits(hidden_ND[s.start : s.stop], s.adapter) for s in segments])

    def _draw(self, this: Round, logits_NV: torch.Tensor) -> tuple[list[int], list[float], TopK]:
        """The next token of every row, its logprob, and the likeliest ones as far as somebody asks for them.
        The one place of a step where the CPU waits for the device."""
        rows, filters = this.rows, this.filters
        logprobs_NV = distribution(logits_NV, filters)
        uniform_N1 = torch.tensor([[c.uniform] for c in rows], dtype=torch.float64, device=logits_NV.device)
        tokens_N1 = draw(logprobs_NV, uniform_N1, filters.greedy_N)
        chosen_N1 = logprobs_NV.gather(-1, tokens_N1)
        width = max(c.request.given.topk_sample_logprobs for c in rows)
        table = empty_topk(len(rows), width)
        if width:
            write_topk(table, slice(0, len(rows)), logprobs_NV)
        return tokens_N1[:, 0].tolist(), chosen_N1[:, 0].tolist(), table

    def _extend(
        self, rows: Sequence[Continuation], tokens: list[int], chosen: list[float], table: TopK
    ) -> None:
        for row, continuation in enumerate(rows):
            if continuation.slot is None:  # another sequence of its request has just failed
                continue
            if np.isnan(chosen[row]):
                message = (
                    "the model's logits are not finite: these weights have diverged, sample earlier ones"
                )
                self._fail(continuation.request, Failure(message))
                continue
            k = continuation.request.given.topk_sample_logprobs
            topk = TopK(table.token_ids[row : row + 1, :k], table.logprobs[row : row + 1, :k]) if k else None
            continuation.append(tokens[row], chosen[row], topk)
        self._finish([c for c in rows if c.slot is not None and (c.stopped or c.full)])

    def _finish(self, ended: Sequence[Continuation]) -> None:
        self._leave(set(ended))
        for continuation in ended:
            request = continuation.request
            request.finished[continuation.index] = continuation.sequence
            if len(request.finished) == request.given.num_samples:
                self._done.append(request.output)


Item = TypeVar("Item")


def _by_adapter(items: Iterable[Item], adapters: Iterable[Adapter | None]) -> list[Item]:
    """Items of one adapter together, adapters and items in the order they first appear; those of the base
    alone lead, so that they are no gap among the rows of adapters."""
    found: dict[int, list[Item]] = {id(None): []}
    for item, adapter in zip(items, adapters, strict=True):
        found.setdefault(id(adapter), []).append(item)
    return [item for group in found.values() for item in group]


def _segments(rows: Iterable[tuple[Adapter | None, int]]) -> tuple[Segment, ...]:
    """One segment for each stretch of rows of one adapter, given (adapter, rows) in their order."""
    segments: list[Segment] = []
    end = 0
    for adapter, count in rows:
        start = segments.pop().start if segments and segments[-1].adapter is adapter else end
        end += count
        segments.append(Segment(start, end, adapter))
    return tuple(segments)


def _slot(continuation: Continuation) -> int:
    assert continuation.slot is not None
    return continuation.slot


def _default_cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // 4
    return 2 << 30


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
