"""What can go wrong, split by what the caller can do about it.

TinsmithError
├── InvalidInput        the request is wrong; the sentence says what to change
├── RequestFailed       the service accepted the call and it failed; `category` says whose fault it was
├── AuthenticationError the key is missing or wrong
├── NotFound            no such thing, or it is not yours
└── ServiceUnavailable  the service could not be reached in time; the call may be repeated
"""


class TinsmithError(Exception):
    """Root of every error this package raises on purpose."""


class InvalidInput(TinsmithError, ValueError):  # noqa: N818 - the names say what happened, not that it is an error
    """The request breaks a rule. The message says which one and what to change."""


class RequestFailed(TinsmithError):  # noqa: N818
    """An accepted call failed. `category` is "user", "server" or "unknown"."""

    def __init__(self, message: str, *, request_id: str = "", category: str = "unknown") -> None:
        super().__init__(message)
        self.request_id = request_id
        self.category = category


class AuthenticationError(TinsmithError):
    """The key is missing, wrong or revoked."""


class NotFound(TinsmithError):  # noqa: N818
    """No such run, session, sampler, future or checkpoint among yours."""


class ServiceUnavailable(TinsmithError):  # noqa: N818
    """The service did not answer in time. Every call carries its number, so repeating it is safe."""
