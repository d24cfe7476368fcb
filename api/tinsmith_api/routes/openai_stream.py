"""Answers as server-sent events, a token's text when it was sampled.

Pieces come from the workers beside the journal, and none has to arrive: of each choice it is known which
tokens were sent, so a piece that comes again (a worker died, and the sample is computed once more) is passed
over, and what a lost one held comes with the result.
"""

import asyncio
import base64
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from fastapi.responses import StreamingResponse
from pydantic_core import to_json
from starlette.background import BackgroundTask
from starlette.types import Message, Send

from tinsmith.errors import InvalidInput
from tinsmith.tokenizer import Tokenizer
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api import chat
from tinsmith_api.chat import Token
from tinsmith_api.routes.openai_requests import Asked, error_body
from tinsmith_api.routes.openai_samples import SampleFailed, Samples
from tinsmith_api.streams import Pieces

Json = dict[str, Any]

log = logging.getLogger("tinsmith")

# A proxy between takes a silent connection for a dead one.
_SILENCE_SECONDS = 10.0
# Who takes nothing for so long is given up, and with it what is kept for it.
_UNREAD_SECONDS = 120.0
_READ_TOKENS = 256


class Writing(Protocol):
    """One choice, in the form of its endpoint."""

    def begin(self, answer: pb.SampleResponse) -> Iterator[Json]:
        """`answer` is empty if nothing was sampled yet."""
        ...

    def write(self, tokens: Sequence[Token]) -> Iterator[Json]: ...
    def end(self, tokens: Sequence[Token], finish_reason: str) -> Iterator[Json]: ...


@dataclass
class _Choice:
    """`taken`: the tokens that were read of it, int32."""

    writing: Writing
    reader: chat.Reader
    taken: bytearray = field(default_factory=bytearray)
    is_over: bool = False

    def take(self, piece: pb.SampledPiece) -> Iterator[Json]:
        """SampleFailed if it is another text than what was taken before."""
        given, start, taken = piece.sequence, 4 * piece.start, len(self.taken)
        if start > taken:
            return  # one before it was lost
        overlap = slice(start, start + len(given.tokens))
        is_shorter = piece.ends and overlap.stop < taken
        if is_shorter or self.taken[overlap] != given.tokens[: len(self.taken[overlap])]:
            raise SampleFailed(
                "the worker that sampled this ended, and computed again it came out otherwise, by rounding: "
                "ask again"
            )
        new = slice((taken - start) // 4, None)
        self.taken += given.tokens[taken - start :]
        ids = np.frombuffer(given.tokens, "<i4")[new].tolist()
        tokens = self.reader.read(ids, chat.logprobs_of(given)[new], chat.top_of(given)[new])
        if not piece.ends:
            yield from self.writing.write(tokens)
        elif not self.is_over:
            self.is_over = True
            stopped = given.stop_reason == pb.STOP_REASON_STOP
            rest = [*tokens, *self.reader.end(stopped)]
            yield from self.writing.end(rest, chat.finish_reason(stopped))


def stream(
    body: Asked, samples: Samples, kind: str, tokenizer: Tokenizer, writings: Sequence[Writing]
) -> StreamingResponse:
    """`writings`: of all choices, those of one prompt after those of another."""
    head = samples.head(kind)
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        head["usage"] = None

    async def events() -> AsyncIterator[bytes]:
        choices = [_Choice(writing, chat.Reader(tokenizer, body.stops)) for writing in writings]
        answers = asyncio.ensure_future(samples.answers())
        try:
            async for choice in _written(samples, choices, answers):
                yield b": still sampling\n\n" if choice is None else _event({**head, "choices": [choice]})
        except (InvalidInput, SampleFailed) as error:
            yield _event(error_body(error, 400 if isinstance(error, InvalidInput) else 500))
            return
        finally:
            answers.cancel()
            samples.close()
        if with_usage:
            yield _event({**head, "choices": [], "usage": samples.usage(answers.result())})
        yield b"data: [DONE]\n\n"

    return Events(
        events(),
        media_type="text/event-stream",
        headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        background=BackgroundTask(samples.let_go),  # run, too, when the client has hung up
    )


class Events(StreamingResponse):
    """Ends, and runs its background task, if its reader takes nothing for `patience_seconds`."""

    patience_seconds = _UNREAD_SECONDS

    async def stream_response(self, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self.patience_seconds):
                await send(message)

        try:
            await super().stream_response(send_in_time)
        except TimeoutError:
            log.info("a reader of a stream takes nothing: it is given up")


async def _written(
    samples: Samples, choices: Sequence[_Choice], answers: "asyncio.Future[list[pb.SampleResponse]]"
) -> AsyncIterator[Json | None]:
    """All of it in the endpoint's form, as it comes; None now and then while nothing does."""
    count = len(choices) // len(samples.request_ids)
    of_sample = {
        request_id: choices[place * count : (place + 1) * count]
        for place, request_id in enumerate(samples.request_ids)
    }
    if samples.pieces is not None:
        for choice in choices:
            for written in choice.writing.begin(pb.SampleResponse()):
                yield written
    async for news in _pieces(samples, answers):
        if news is None:
            yield None
            continue
        request_id, message = news
        for piece in pb.SampledPieces.FromString(base64.b64decode(message)).pieces:
            for written in of_sample[request_id][piece.index].take(piece):
                yield written
    for of_answer, answer in zip(of_sample.values(), answers.result(), strict=True):
        for choice, sequence in zip(of_answer, answer.sequences, strict=True):
            if samples.pieces is None:
                for written in choice.writing.begin(answer):
                    yield written
            for piece in _cut_up(sequence):
                for written in await asyncio.to_thread(_all_of, choice, piece):
                    yield written


async def _pieces(
    samples: Samples, answers: "asyncio.Future[list[pb.SampleResponse]]"
) -> AsyncIterator[tuple[str, str] | None]:
    """What comes before the answers are there."""
    pieces = samples.pieces or Pieces()  # to which nothing comes
    while not answers.done():
        news = asyncio.ensure_future(pieces.next())
        try:
            done, _ = await asyncio.wait(
                (news, answers), timeout=_SILENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED
            )
            if news in done:
                yield news.result()
            elif not done:
                yield None
        finally:
            news.cancel()


def _all_of(choice: _Choice, piece: pb.SampledPiece) -> list[Json]:
    return list(choice.take(piece))


def _cut_up(sequence: pb.SampledSequence) -> Iterator[pb.SampledPiece]:
    """Pieces that are read at once: no more of it is held in a reader's form than that."""
    count, top = len(sequence.tokens) // 4, sequence.topk_sampled_logprobs
    for start in range(0, count or 1, _READ_TOKENS):
        stop = min(count, start + _READ_TOKENS)
        tokens, rows = slice(4 * start, 4 * stop), slice(4 * top.k * start, 4 * top.k * stop)
        cut = pb.SampledSequence(
            stop_reason=sequence.stop_reason,
            tokens=sequence.tokens[tokens],
            logprobs=sequence.logprobs[tokens],
            topk_sampled_logprobs=pb.TopkLogprobs(
                length=stop - start if top.k else 0,
                k=top.k,
                token_ids=top.token_ids[rows],
                logprobs=top.logprobs[rows],
            ),
        )
        yield pb.SampledPiece(start=start, sequence=cut, ends=stop == count)


def _event(value: Json) -> bytes:
    return b"data: " + to_json(value) + b"\n\n"
