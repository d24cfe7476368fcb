"""Who takes part in the next step: requests wait, their prompts are read, their sequences grow. No torch.

Two things are short: seats (how many sequences are under way) and pages of the cache. A sequence is let in
when there is room for its prompt; it is not known how long it will grow. When pages run out, the sequence
that came last steps back and is read again later: its tokens and its random numbers stay what they were.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from tinsmith_worker.sampler.pages import Pages
from tinsmith_worker.sampler.requests import Continuation, PromptScores, Request


@dataclass(eq=False)
class Reading:
    """Tokens that are read for some continuations of a request, into the pages of the first: the prompt, or
    all that a sequence had when it stepped back."""

    request: Request
    tokens: npt.NDArray[np.int32]
    continuations: list[Continuation]
    scores: PromptScores | None
    read: int
    first_page: bytes  # its tokens

    @property
    def pages(self) -> list[int]:
        return self.continuations[0].pages

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.read


@dataclass(frozen=True)
class Part:
    """The next tokens [start, stop) of a reading."""

    reading: Reading
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def completes(self) -> bool:
        return self.stop == len(self.reading.tokens)


@dataclass
class Places:
    """`growing` are the sequences that get a token a step, in the order in which they were let in."""

    pages: Pages
    seats: int
    waiting: deque[Request] = field(default_factory=deque)
    returning: deque[Continuation] = field(default_factory=deque)
    reading: list[Reading] = field(default_factory=list)
    growing: dict[Continuation, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._free_seats = list(range(self.seats - 1, -1, -1))

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.returning or self.reading or self.growing)

    def of(self, request_id: str) -> Iterator[Continuation]:
        """Those of a request that are under way."""
        for reading in self.reading:
            if reading.request.given.request_id == request_id:
                yield from reading.continuations
        yield from (c for c in self.growing if c.request.given.request_id == request_id)

    # Letting in

    @property
    def samplers(self) -> set[str]:
        """Whose weights are in use."""
        of_reading = {reading.request.given.sampler_id for reading in self.reading}
        return of_reading | {c.request.given.sampler_id for c in self.growing}

    def admit(self, most_unread: int, prepare: Callable[[Request], bool]) -> None:
        """Let in who comes next, until there are `most_unread` tokens to read, or no room. `prepare` says
        whether there is room for a request's weights."""
        unread = sum(reading.unread for reading in self.reading)
        later: list[Request] = []
        while unread < most_unread and self._free_seats and (self.returning or self.waiting):
            reading = None
            if not prepare(self.returning[0].request if self.returning else self.waiting[0]):
                break
            if self.returning:
                continuation = self.returning[0]
                reading = self._let_in(continuation.request, continuation.text, [continuation])
                if reading:
                    self.returning.popleft()
            else:
                request = self.waiting[0]
                if self._is_being_read(request):
                    later.append(self.waiting.popleft())
                    continue
                reading = self._let_in_some(request)
                if reading and request.admitted == request.given.num_samples:
                    self.waiting.popleft()
            if reading is None:
                break
            unread += reading.unread
        self.waiting.extendleft(reversed(later))

    def _let_in_some(self, request: Request) -> Reading | None:
        """As many of a request's sequences as there is room for."""
        count = min(len(self._free_seats), request.given.num_samples - request.admitted)
        while count:
            first = request.admitted
            continuations = [Continuation(request, index) for index in range(first, first + count)]
            if reading := self._let_in(request, request.given.prompt, continuations):
                request.admitted += count
                return reading
            count //= 2
        return None

    def _let_in(
        self, request: Request, tokens: npt.NDArray[np.int32], continuations: list[Continuation]
    ) -> Reading | None:
        pages, first = self.pages, continuations[0]
        scores = request.scores if first.index == 0 and not first.count else None
        most = len(tokens) - 1 if scores is None else request.most_hits
        found = pages.find(request.scope, tokens[: most // pages.page_tokens * pages.page_tokens])
        own = pages.needed(len(tokens)) - len(found)
        # Each of the others has its own copy of the page that the prompt ends in, or begins one there.
        of_others = len(continuations) - 1 if request.budget > 1 else 0
        # Whoever grows may need another page soon; who is alone gets all there is.
        spare = len(self.growing) + sum(len(r.continuations) for r in self.reading)
        if own + of_others + spare > pages.available:
            pages.leave(found)
            return None
        first.pages = found + pages.take(own)
        for other in continuations[1:] if of_others else ():
            other.pages = pages.take(1)
        for continuation in continuations:
            continuation.seat = self._free_seats.pop()
        read = len(found) * pages.page_tokens
        if request.hits is None:
            request.hits = read
        first_page = tokens[: pages.page_tokens].tobytes()
        reading = Reading(request, tokens, continuations, scores, read, first_page)
        self.reading.append(reading)
        return reading

    def _is_being_read(self, request: Request) -> bool:
        """Whether somebody is reading just now what this request could then find."""
        size, prompt = self.pages.page_tokens, request.given.prompt
        whole = request.most_hits // size * size
        first_page, scope = prompt[:size].tobytes(), request.scope
        for reading in self.reading:
            theirs = reading.tokens
            if first_page != reading.first_page or scope != reading.request.scope:
                continue
            shared = min(whole, len(theirs) // size * size)
            unequal = np.flatnonzero(prompt[:shared] != theirs[:shared])
            alike = (int(unequal[0]) if len(unequal) else shared) // size * size
            if alike > reading.read // size * size:
                return True
        return False

    # Reading

    def parts(self, most_tokens: int) -> list[Part]:
        """What is read next, in the order of arrival."""
        found = []
        for reading in self.reading:
            if not most_tokens:
                break
            stop = reading.read + min(most_tokens, reading.unread)
            most_tokens -= stop - reading.read
            found.append(Part(reading, reading.read, stop))
        return found

    def has_read(self, part: Part) -> None:
        """Others can find it from now on; a reading that is complete is no longer one."""
        reading = part.reading
        reading.read = part.stop
        self.pages.remember(reading.request.scope, reading.tokens[: part.stop], reading.pages)
        if part.completes:
            self.reading.remove(reading)

    def grow(self, continuations: list[Continuation]) -> None:
        self.growing.update(dict.fromkeys(continuations))

    # Growing and leaving

    def extend(self, continuation: Continuation) -> bool:
        """Room for the keys and values of its last token. False if there is none."""
        missing = self.pages.needed(continuation.length) - len(continuation.pages)
        if missing <= 0:
            return True
        if missing > self.pages.available:
            return False
        continuation.pages += self.pages.take(missing)
        return True

    def step_back(self) -> Continuation:
        """Whoever came last gives up its pages until there is room again. All its tokens must have come
        back."""
        last = next(reversed(self.growing))
        assert last.launched == last.count, (last.launched, last.count)
        self.leave(last)
        self.returning.appendleft(last)
        return last

    def leave(self, continuation: Continuation, *, is_sound: bool = True) -> list[int]:
        """It gives back its seat and its pages; what they hold can be found unless it is not `is_sound`.
        Returns the pages that are free now."""
        self.growing.pop(continuation, None)
        if continuation.seat is None:
            return []
        self._free_seats.append(continuation.seat)
        continuation.seat = None
        if continuation.count and is_sound:
            # The last token's keys and values were never made, or are those of a token that was not wanted.
            self.pages.remember(continuation.request.scope, continuation.text[:-1], continuation.pages)
        if not is_sound:
            self.pages.forget(continuation.pages)
        pages, continuation.pages = continuation.pages, []
        return self.pages.leave(pages)

    def drop(self, request_id: str) -> list[Continuation]:
        """Forget everything about a request. Those that were under way are still to `leave`."""
        leaving = list(self.of(request_id))
        self.waiting = deque(r for r in self.waiting if r.given.request_id != request_id)
        self.returning = deque(c for c in self.returning if c.request.given.request_id != request_id)
        self.reading = [r for r in self.reading if r.request.given.request_id != request_id]
        return leaving
