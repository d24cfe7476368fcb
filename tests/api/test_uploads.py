"""What large bodies may be made of, who reads them and whose turn it is."""

import asyncio
import json
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.e2e.wire import datum
from tinsmith.errors import InvalidInput
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api import readings, uploads

KIND = pb.ForwardBackwardRequest


def counted(body: bytes) -> int:
    return readings._count(memoryview(body), KIND.DESCRIPTOR)


def test_every_message_and_number_is_a_part_and_blobs_are_none() -> None:
    assert counted(b"") == 0
    assert counted(pb.ForwardBackwardRequest(model_id="x" * 1000, seq_id=7).SerializeToString()) == 1
    message = pb.ForwardBackwardRequest()
    message.data.add().model_input.add().encoded_text.tokens = bytes(5000)
    assert counted(message.SerializeToString()) == 3
    message.data[0].loss_fn_inputs["a"].shape.extend([1, 2, 3])
    assert counted(message.SerializeToString()) == 3 + 2 + 3
    # What the official clients send most of in one body is far below the limit.
    message = pb.ForwardBackwardRequest(data=[datum([1] * 100)] * 1024)
    assert counted(message.SerializeToString()) < readings.MAX_PARTS / 50


@given(st.binary(max_size=300))
def test_no_bytes_are_counted_wrongly_enough_to_raise(body: bytes) -> None:
    assert counted(body) >= 0


def test_counting_ends_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "MAX_PARTS", 10)
    assert counted(b"\x1a\x00" * 1_000_000) == 11
    readings.check_protobuf(b"\x1a\x00" * 1000, KIND)  # a small body may be made of anything
    with pytest.raises(InvalidInput, match="more than 10 parts"):
        readings.check_protobuf(b"\x1a\x00" * 1_000_000, KIND)


def test_json_of_many_parts_or_numbers_is_refused_and_a_long_text_is_not() -> None:
    readings.check_json(b'"' + b"x" * 50_000_000 + b'"')
    readings.check_json(b"[" + b"1234," * 3_000_000 + b"1]")
    with pytest.raises(InvalidInput, match="values"):
        readings.check_json(b"[" + b"1," * 5_000_000 + b"1]")
    for part in (b"[],", b"{},", b'"",'):
        with pytest.raises(InvalidInput, match="parts"):
            readings.check_json(b"[" + part * 1_500_000 + b"1]")


# -- the process that reads them -------------------------------------------------------------------------

LARGE = pb.ForwardBackwardRequest(
    model_id="a:train:0", seq_id=7, loss_fn="cross_entropy", data=[datum([1, 2, 3] * 1000)] * 40
).SerializeToString()
LIMITS = {"vocab_size": 10, "max_context_length": 5000}


@pytest.fixture
def given_uploads() -> Iterator[uploads.Uploads]:
    made = uploads.Uploads(1 << 30)
    yield made
    made.stop()


def read(by: uploads.Uploads, body: bytes, reading: Any, **given: Any) -> bytes:
    return asyncio.run(by.read("a", body, reading, **given))


def test_a_large_body_is_read_by_another_process_as_it_would_be_here(given_uploads: uploads.Uploads) -> None:
    assert len(LARGE) > uploads.READ_APART_BYTES
    head = pb.ForwardBackwardRequest.FromString(read(given_uploads, LARGE, readings.head))
    assert (head.model_id, head.seq_id, len(head.data)) == ("a:train:0", 7, 0)
    assert int(read(given_uploads, LARGE, readings.tokens, **LIMITS)) == 40 * 2999
    with pytest.raises(InvalidInput, match="more than the model's 100"):
        read(given_uploads, LARGE, readings.tokens, vocab_size=10, max_context_length=100)
    (reader,) = given_uploads._idle
    assert reader._process.pid != os.getpid()

    sample: dict[str, Any] = {"sampling_session_id": "s", "seq_id": 3, "prompt": {"chunks": []}}
    prompt = [1, 2, 3] * 200_000
    sample["prompt"]["chunks"] = [{"type": "encoded_text", "tokens": prompt}]
    body = json.dumps(sample).encode()
    assert len(read(given_uploads, body, readings.sample_head)) < 1000
    limits = {"vocab_size": 10, "max_context_length": 1_000_000}
    task = pb.SampleTask.FromString(read(given_uploads, body, readings.sample_task, **limits))
    assert len(task.prompt) == 4 * len(prompt)


def test_a_large_call_that_is_refused_still_has_its_number(given_uploads: uploads.Uploads) -> None:
    body = json.dumps({"model_id": "a:train:0", "seq_id": 7, "x": "y" * uploads.READ_APART_BYTES}).encode()
    with pytest.raises(readings.InvalidCall) as refused:
        read(given_uploads, body, readings.batch_of_json, member="forward_input")
    assert (refused.value.model_id, refused.value.seq_id) == ("a:train:0", 7)


def test_whoever_reads_may_be_killed(given_uploads: uploads.Uploads, monkeypatch: pytest.MonkeyPatch) -> None:
    read(given_uploads, LARGE, readings.head)
    (reader,) = given_uploads._idle
    os.kill(reader._process.pid, signal.SIGKILL)
    reader._process.wait()
    assert read(given_uploads, LARGE, readings.head)
    # A body that ends its reader every time, for want of memory, is refused.
    monkeypatch.setattr(readings, "__name__", "tinsmith_api.nothing")
    os.kill(given_uploads._idle[0]._process.pid, signal.SIGKILL)
    given_uploads._idle[0]._process.wait()
    with pytest.raises(InvalidInput, match="send less"):
        read(given_uploads, LARGE, readings.head)


def test_a_tenant_s_large_bodies_are_read_one_at_a_time_and_another_s_beside_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    under_way, most = {"a": 0, "b": 0}, {"a": 0, "b": 0}
    both = threading.Barrier(2, timeout=10)

    def ask(body: bytes, reading: str, given: dict[str, Any]) -> bytes:
        tenant = given["tenant"]
        under_way[tenant] += 1
        most[tenant] = max(most[tenant], under_way[tenant])
        if given["number"] == 0:
            both.wait()  # the other tenant's is being read, too
        under_way[tenant] -= 1
        return b""

    async def all_of_them() -> None:
        by = uploads.Uploads(1 << 30)
        monkeypatch.setattr(by, "_ask", ask)
        await asyncio.gather(
            *(by.read(t, LARGE, readings.head, tenant=t, number=n) for n in range(4) for t in "ab")
        )
        assert not by._turns

    asyncio.run(all_of_them())
    assert most == {"a": 1, "b": 1}
