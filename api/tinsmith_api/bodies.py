"""Request bodies: bounded while they arrive, and read into models once."""

from typing import Any, TypeVar

from fastapi import Request, Response
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import to_json

from tinsmith.errors import InvalidInput

Model = TypeVar("Model", bound=BaseModel)


class TooLarge(Exception):  # noqa: N818 - answered as 413
    pass


class UnsupportedEncoding(Exception):  # noqa: N818 - answered as 415
    pass


class Body(BaseModel):
    """Base of request bodies. Fields of newer clients that we do not know are refused by those routes
    that would otherwise drop something the caller meant; `type` tags are allowed everywhere."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes."""
    encoding = request.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UnsupportedEncoding(f"send the body without Content-Encoding: {encoding}")
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise TooLarge(f"the body has {declared} bytes, the limit here is {limit}: send less at a time")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise TooLarge(f"the body has more than {limit} bytes: send less at a time")
        parts.append(part)
    return b"".join(parts)


def parse(model: type[Model], body: bytes) -> Model:
    """InvalidInput names the first field that is wrong."""
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        raise InvalidInput(sentence(error)) from None


def parse_any(body: bytes) -> Any:
    try:
        return TypeAdapter(Any).validate_json(body)
    except ValidationError:
        raise InvalidInput("the body is not JSON") from None


def sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "the body"
    return f"{where}: {first['msg']}"


def reply(value: Any, status: int = 200) -> Response:
    return Response(to_json(value), status, media_type="application/json")
