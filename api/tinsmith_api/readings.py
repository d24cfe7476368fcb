"""What a large body is read into, in a process of its own: reading one holds Python's lock for up to seconds,
and whomever else the API process serves would wait for it.

`python -m tinsmith_api.readings` answers one question after the other, on stdin and stdout: a line of JSON
with the reading's name, what else it is given and the body's size, then the body; back comes a line of JSON
with the size of what was read, or with an error, then what was read. It ends with its parent.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

from google.protobuf.message import Message

from tinsmith.errors import InvalidInput
from tinsmith.wire import datums, json_form
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.bodies import Readable, parse, parse_any
from tinsmith_api.samples import Sample, task_of

Json = dict[str, Any]

MAX_PARTS = 1_000_000
"""Messages, lists, objects and texts in one body. Official clients send at most some thousands."""
MAX_NUMBERS = 4_000_000
"""In one body of JSON, where each takes up to 40 bytes. Protobuf has them in blobs, without this limit."""
# Fewer bytes of protobuf cannot be made of more parts than are worth counting.
_COUNTED_BYTES = 1 << 20


class InvalidCall(InvalidInput):
    """A call that is refused, but still counts as its run's number `seq_id`; both are as they were sent."""

    def __init__(self, message: str, model_id: object = None, seq_id: object = None) -> None:
        super().__init__(message)
        self.model_id, self.seq_id = model_id, seq_id


# -- the readings ----------------------------------------------------------------------------------------


def head(body: Readable) -> bytes:
    """A ForwardBackwardRequest's call, without its data; InvalidInput unless the whole is one."""
    check_protobuf(body, pb.ForwardBackwardRequest)
    message = datums.parse(body)
    call = {name: getattr(message, name) for name in ("model_id", "seq_id", "loss_fn", "forward_only")}
    return pb.ForwardBackwardRequest(**call).SerializeToString()


def tokens(body: Readable, **limits: int) -> bytes:
    """The number of tokens of a ForwardBackwardRequest; InvalidInput if a base model of these limits cannot
    be trained on it."""
    return str(datums.read(datums.parse(body), **limits).tokens).encode()


def batch_of_json(body: Readable, member: str) -> bytes:
    """A ForwardBackwardRequest that came in its older form; InvalidCall if it is none."""
    check_json(body)
    given = parse_any(body)
    try:
        return json_form.read_request(given, member).SerializeToString()
    except InvalidInput as error:
        called = given if isinstance(given, dict) else {}
        raise InvalidCall(str(error), called.get("model_id"), called.get("seq_id")) from None


def sample_head(body: Readable) -> bytes:
    """A Sample without what may be long in it, in JSON."""
    check_json(body)
    sample = parse(Sample, body)
    sample.prompt.chunks, sample.target_prompt_logprobs = [], None
    return sample.model_dump_json().encode()


class _Limits(NamedTuple):
    vocab_size: int
    max_context_length: int


def sample_task(body: Readable, **limits: int) -> bytes:
    """A Sample's SampleTask, for a base model of these limits."""
    return task_of(parse(Sample, body), _Limits(**limits)).SerializeToString()


def some_json(body: Readable) -> bytes:
    """Nothing; InvalidInput if `body` has too many parts or is no JSON."""
    check_json(body)
    parse_any(body)
    return b""


READINGS: dict[str, Callable[..., bytes]] = {
    reading.__name__: reading
    for reading in (head, tokens, batch_of_json, sample_head, sample_task, some_json)
}


# -- how much a body may be read into --------------------------------------------------------------------
# Its bytes are bounded, but two bytes can name an empty datum or list, which takes thirty times the memory.


def check_json(body: Readable) -> None:
    """InvalidInput if `body` has too many parts; brackets and commas in texts are counted, too."""
    _check(body.count(b"{") + body.count(b"[") + body.count(b'"') // 2)
    if body.count(b",") > MAX_NUMBERS:
        raise InvalidInput(
            f"the body holds more than {MAX_NUMBERS:,} values: send less at a time, or as protobuf"
        )


def check_protobuf(body: Readable, kind: type[Message]) -> None:
    """InvalidInput if `body`, a message of this kind, has too many parts."""
    if len(body) > _COUNTED_BYTES:
        _check(_count(memoryview(body), kind.DESCRIPTOR))


def _check(parts: int) -> None:
    if parts > MAX_PARTS:
        raise InvalidInput(f"the body is made of more than {MAX_PARTS:,} parts: send less at a time")


def _count(body: memoryview, kind: Any) -> int:  # a descriptor, of which there are two implementations
    """Messages and numbers in it, until there are too many. Where it is broken its reader will say so."""
    parts, todo = 0, [(0, len(body), kind)]
    while todo and parts <= MAX_PARTS:
        at, end, of = todo.pop()
        while at < end and parts <= MAX_PARTS:
            tag, at = _varint(body, at, end)
            field, wire_type = of.fields_by_number.get(tag >> 3), tag & 7
            if wire_type == 2:
                size, at = _varint(body, at, end)
                if field is not None and field.message_type is not None:
                    parts += 1
                    todo.append((at, min(at + size, end), field.message_type))
                elif field is not None and field.type not in (field.TYPE_BYTES, field.TYPE_STRING):
                    parts += size  # packed, a byte or more for each
                at += size
            elif wire_type == 0:
                parts += 1
                _, at = _varint(body, at, end)
            elif wire_type in (1, 5):
                parts += 1
                at += 8 if wire_type == 1 else 4
            else:
                return parts  # a group, or none at all: no message of ours
    return parts


def _varint(body: memoryview, at: int, end: int) -> tuple[int, int]:
    """(its value, what follows); at the end if it is broken."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= end:
            return value, end
        byte = body[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    return value, end


# -- the process -----------------------------------------------------------------------------------------


def main(questions: BinaryIO, answers: BinaryIO) -> None:
    while line := questions.readline():
        question = json.loads(line)
        body = questions.read(question["size"])
        if len(body) < question["size"]:
            return
        said, read = _answer(question["reading"], body, question["given"])
        del body  # before the next one comes
        answers.write(json.dumps(said).encode() + b"\n")
        answers.write(read)
        answers.flush()


def _answer(reading: str, body: bytes, given: Json) -> tuple[Json, bytes]:
    try:
        read = READINGS[reading](body, **given)
    except InvalidCall as error:
        return {"error": str(error), "call": {"model_id": error.model_id, "seq_id": error.seq_id}}, b""
    except InvalidInput as error:
        return {"error": str(error)}, b""
    return {"size": len(read)}, read


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for its parent
    os.nice(10)  # who has sent little goes first
    main(sys.stdin.buffer, sys.stdout.buffer)
