"""Request bodies: bounded while they arrive, and read into models once."""

import asyncio
import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from fastapi import Request, Response
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect

from tinsmith.errors import InvalidInput

Model = TypeVar("Model", bound=BaseModel)
Made = TypeVar("Made")
Readable = bytes | bytearray

# What takes longer with a result larger than this than other requests should wait for the event loop.
READ_IN_THREAD_BYTES = 1 << 20


class TooLarge(Exception):  # noqa: N818 - answered as 413
    pass


class UnsupportedEncoding(Exception):  # noqa: N818 - answered as 415
    pass


class Body(BaseModel):
    """Base of request bodies. Members that we do not know are ignored: clients of many versions send tags
    of their own. What a client means to be honoured to the letter is a `Strict`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


def _storable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("NaN and infinity are no JSON: send them as texts")
    if isinstance(value, str) and "\0" in value:
        raise ValueError("it holds a NUL character, which databases cannot search")
    if isinstance(value, dict):
        for part in (*value, *value.values()):
            _storable(part)
    if isinstance(value, list):
        for part in value:
            _storable(part)
    return value


Metadata = Annotated[dict[str, Any], AfterValidator(_storable)]
"""JSON that is kept as it is, and searched."""


class Strict(Body):
    """Settings of a computation: a member that we do not know would change it, so it is refused."""

    model_config = ConfigDict(extra="forbid")

    type: str | None = Field(None, exclude=True)


async def read_body(request: Request, limit: int, hold: Callable[[int], None] = lambda _: None) -> Readable:
    """The whole body, at most `limit` bytes. `hold` is told the size of each part, and may refuse it."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedEncoding(f"send the body without Content-Encoding: {encoding}")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > limit:
        raise TooLarge(f"the body has {declared} bytes, the limit here is {limit}: send less at a time")
    body = bytearray()  # which grows in place: a large one is not copied
    try:
        async for part in request.stream():
            if len(body) + len(part) > limit:
                raise TooLarge(f"the body has more than {limit} bytes: send less at a time")
            hold(len(part))
            body += part
    except ClientDisconnect:
        raise InvalidInput("the connection ended before the body did") from None
    return body


async def off_loop(size: int, read: Callable[[], Made]) -> Made:
    """`read()` of a result of `size` bytes; in a thread if the event loop would wait for it too long."""
    return await asyncio.to_thread(read) if size > READ_IN_THREAD_BYTES else read()


def parse(model: type[Model], body: Readable) -> Model:
    """InvalidInput names the first field that is wrong."""
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise InvalidInput(sentence(error)) from None


def takes(model: type[BaseModel]) -> dict[str, Any]:
    """For a route's `openapi_extra`: the JSON body that it reads by itself."""
    schema = model.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(item) for item in part]
        if not isinstance(part, dict):
            return part
        if (name := part.get("$ref", "").removeprefix("#/$defs/")) in definitions:
            return {**inline(definitions[name]), **{k: inline(v) for k, v in part.items() if k != "$ref"}}
        return {key: inline(value) for key, value in part.items()}

    return {"requestBody": {"required": True, "content": {"application/json": {"schema": inline(schema)}}}}


def parse_any(body: Readable) -> Any:
    try:
        return TypeAdapter(Any).validate_json(body)
    except ValidationError:
        raise InvalidInput("the body is not JSON") from None


def sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    if first["type"] == "extra_forbidden":
        return f"{where} is not known here and would have no effect: leave it out"
    return f"{where}: {first['msg']}"


def reply(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")
