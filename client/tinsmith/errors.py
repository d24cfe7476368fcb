"""What can go wrong, split by what the caller can do about it.

TinsmithError
├── InvalidInput        the request is wrong; the sentence says what to change
├── RequestFailed       the service accepted the call and it failed; `category` says whose fault it was
├── AuthenticationError the key is missing or wrong, or may not do this
├── BillingError        the account must be put in order first (a hosted service's 402)
├── NotFound            no such thing, or it is not yours
└── ServiceUnavailable  the service could not be reached in time; the call may be repeated

Scripts written for the official SDK find its names at the end; each is one of these.
"""


class TinsmithError(Exception):
    """Root of every error this package raises on purpose. `status_code` is the answer's, if there was one."""

    status_code: int | None = None


class InvalidInput(TinsmithError, ValueError):  # noqa: N818 - the names say what happened, not that it is an error
    """The request breaks a rule. The message says which one and what to change."""


class RequestFailed(TinsmithError):  # noqa: N818
    """An accepted call failed. `category` is "user", "server" or "unknown"."""

    def __init__(self, message: str, request_id: str = "", category: str = "unknown") -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.category = category

    def __reduce__(self) -> tuple[type["RequestFailed"], tuple[str, str, str]]:
        return type(self), (self.message, self.request_id, self.category)


class AuthenticationError(TinsmithError):
    """The key is missing, wrong or revoked, or may not do this."""


class BillingError(TinsmithError):
    """The account behind the key has to be put in order before the service goes on."""


class NotFound(TinsmithError):  # noqa: N818
    """No such run, session, sampler, future or checkpoint among yours."""


class ServiceUnavailable(TinsmithError):  # noqa: N818
    """The service did not answer in time. Every call carries its number, so repeating it is safe."""


TinkerError = APIError = APIStatusError = APIResponseValidationError = TinsmithError
BadRequestError = UnprocessableEntityError = InvalidInput
RequestFailedError = RequestFailed
PermissionDeniedError = AuthenticationError
NotFoundError = NotFound
APIConnectionError = APITimeoutError = ConflictError = RateLimitError = InternalServerError = (
    ServiceUnavailable
)
