"""What OpenAI's clients ask for: every member that is accepted is honoured."""

from typing import Annotated, Any, ClassVar, Literal, TypeVar

from fastapi import Request
from pydantic import ConfigDict, Field, ValidationError

from tinsmith_api import readings
from tinsmith_api.bodies import Body, off_loop
from tinsmith_api.chat import Refused
from tinsmith_api.owner import Owner

Json = dict[str, Any]
Read = TypeVar("Read", bound="Asked")


class Exact(Body):
    """Whatever we do not know would have no effect: it is refused."""

    model_config = ConfigDict(extra="forbid")


Zero = Annotated[float, Field(ge=0, le=0)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class StreamOptions(Exact):
    include_usage: bool = False


class Asked(Exact):
    """What both kinds of completion take. Members with one value only are those that clients send of their
    own, with what has no effect."""

    prompt_param: ClassVar[str]

    model: str
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise Refused("stream_options needs stream: true", "stream_options")


Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
Several = Field(min_length=1, max_length=1024)


class Completion(Asked):
    prompt_param = "prompt"

    prompt: str | Tokens | Annotated[list[str], Several] | Annotated[list[Tokens], Several]
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt

    def check(self) -> None:
        super().check()
        if self.best_of not in (None, self.n or 1):
            raise Refused("best_of must be n: nothing is compared here, ask for n and choose", "best_of")


class Text(Exact):
    type: Literal["text"]
    text: str


class CalledFunction(Exact):
    name: str
    arguments: str


class Call(Exact):
    id: str
    type: Literal["function"]
    function: CalledFunction


class Message(Exact):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Text] | None = None
    tool_calls: list[Call] | None = None
    tool_call_id: str | None = None
    # Clients send back what they got, with the members that they know besides.
    refusal: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    name: None = None


class Function(Exact):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: Json | None = None
    strict: Literal[False] | None = None


class Tool(Exact):
    type: Literal["function"]
    function: Function


class ResponseFormat(Exact):
    type: Literal["text"]


class TemplateVariables(Exact):
    enable_thinking: bool | None = None


class Chat(Asked):
    prompt_param = "messages"

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    chat_template_kwargs: TemplateVariables | None = None

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise Refused("max_tokens is the older name of max_completion_tokens: give one", "max_tokens")

    @property
    def offered(self) -> list[Json]:
        """The tools that may be called."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or []]


async def read(mine: Owner, request: Request, model: type[Read]) -> Read:
    async with mine.receive(request, mine.service.settings.max_sample_bytes) as raw:
        await mine.read(raw, readings.some_json)
        try:
            body = await off_loop(len(raw), lambda: model.model_validate_json(raw or b"{}"))
        except ValidationError as error:
            raise _refusal(error) from None
    body.check()
    return body


def _refusal(error: ValidationError) -> Refused:
    """Of the first member that is wrong. One that may be of several forms has an error for each: the form
    whose kind was right was meant, or the one that went deepest."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    of_first = [e for e in errors if e["loc"][:1] == errors[0]["loc"][:1]]
    worst = max(of_first, key=lambda e: (not e["type"].endswith(("_type", "_parsing")), len(e["loc"])))
    # The names of the forms are in it, too.
    place = [part for part in worst["loc"] if isinstance(part, int) or part.replace("_", "").isalnum()]
    param = ".".join(str(part) for part in place if part != "str")
    if worst["type"] == "extra_forbidden":
        return Refused(f"{param} is not known here and would have no effect: leave it out", param)
    return Refused(f"{param or 'the body'}: {worst['msg']}", param or None)


_KINDS: dict[int, tuple[str, str | None]] = {
    401: ("authentication_error", "invalid_api_key"),
    402: ("insufficient_quota", "insufficient_quota"),
    403: ("permission_error", None),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", None),
}


def error_body(error: Exception, status: int, said: str = "") -> Json:
    """`said`, or the error's own sentence, as OpenAI's clients read it."""
    kind, code = _KINDS.get(status, ("invalid_request_error", None))
    param, code = getattr(error, "param", None), getattr(error, "code", None) or code
    return {"error": {"message": said or str(error), "type": kind, "param": param, "code": code}}
