"""What large bodies may be made of, and whose turn it is to be read."""

import asyncio
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.e2e.wire import datum
from tinsmith.errors import InvalidInput
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api import uploads

KIND = pb.ForwardBackwardRequest


def counted(body: bytes) -> int:
    return uploads._count(memoryview(body), KIND.DESCRIPTOR)


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
    assert counted(message.SerializeToString()) < uploads.MAX_PARTS / 50


@given(st.binary(max_size=300))
def test_no_bytes_are_counted_wrongly_enough_to_raise(body: bytes) -> None:
    assert counted(body) >= 0


def test_counting_ends_when_there_are_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_PARTS", 10)
    assert counted(b"\x1a\x00" * 1_000_000) == 11
    uploads.check_protobuf(b"\x1a\x00" * 1000, KIND)  # a small body may be made of anything
    with pytest.raises(InvalidInput, match="more than 10 parts"):
        uploads.check_protobuf(b"\x1a\x00" * 1_000_000, KIND)


def test_json_of_many_parts_or_numbers_is_refused_and_a_long_text_is_not() -> None:
    uploads.check_json(b'"' + b"x" * 50_000_000 + b'"')
    uploads.check_json(b"[" + b"1234," * 3_000_000 + b"1]")
    with pytest.raises(InvalidInput, match="values"):
        uploads.check_json(b"[" + b"1," * 5_000_000 + b"1]")
    for part in (b"[],", b"{},", b'"",'):
        with pytest.raises(InvalidInput, match="parts"):
            uploads.check_json(b"[" + part * 1_500_000 + b"1]")


def test_a_tenant_s_large_bodies_are_read_one_at_a_time_and_another_s_beside_them() -> None:
    under_way, most = {"a": 0, "b": 0}, {"a": 0, "b": 0}
    both = threading.Barrier(2, timeout=10)

    def read(tenant: str, *, first: bool) -> None:
        under_way[tenant] += 1
        most[tenant] = max(most[tenant], under_way[tenant])
        if first:
            both.wait()  # the other tenant's is being read, too
        under_way[tenant] -= 1

    async def all_of_them() -> None:
        given = uploads.Uploads(1 << 30)
        large = uploads.READ_IN_THREAD_BYTES + 1
        calls = [
            given.in_turn(t, large, lambda t=t, n=n: read(t, first=n == 0)) for t in "ab" for n in range(4)
        ]
        await asyncio.gather(*calls)
        assert not given._turns

    asyncio.run(all_of_them())
    assert most == {"a": 1, "b": 1}
