"""Reading request bodies."""

import asyncio
import threading
from typing import Any

import pytest
from fastapi import Request

from tinsmith.errors import InvalidInput
from tinsmith_api.bodies import Strict, off_loop, parse, read_body


def test_a_large_body_is_read_beside_the_event_loop_and_a_small_one_in_it() -> None:
    async def where_read(size: int) -> int:
        return await off_loop(size, threading.get_ident)

    here = threading.get_ident()
    assert asyncio.run(where_read(1 << 20)) == here
    assert asyncio.run(where_read((1 << 20) + 1)) != here


def test_a_client_that_goes_away_in_the_middle_of_a_body_is_no_fault_of_the_service() -> None:
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> dict[str, Any]:
        return next(parts)

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    with pytest.raises(InvalidInput, match="the connection ended"):
        asyncio.run(read_body(request, 100))


def test_strict_settings_take_a_tag_and_name_what_they_do_not_know() -> None:
    class Given(Strict):
        rate: float = 0.5

    assert parse(Given, b'{"type": "given", "rate": 1}').model_dump() == {"rate": 1.0}
    with pytest.raises(InvalidInput, match="momentum"):
        parse(Given, b'{"momentum": 1}')
