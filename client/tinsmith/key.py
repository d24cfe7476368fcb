"""The key on every request, or the token a hosted service gives for it."""

import base64
import json
import threading
import time
from collections.abc import Generator
from typing import Any

import httpx

from tinsmith.errors import AuthenticationError


class Key(httpx.Auth):
    """Sends the key itself; once `is_exchanged`, a JWT got for it, renewed at half of its life or when the
    service says that it is invalid."""

    def __init__(self, secret: str | None, exchange_url: str) -> None:
        if not secret:
            raise AuthenticationError("no key: pass api_key=… or set TINSMITH_API_KEY")
        self.secret = secret
        self.is_exchanged = False
        self.claims: dict[str, Any] = {}
        self._exchange_url = exchange_url
        self._token = ""
        self._renewing = threading.Lock()

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        request.headers["X-API-Key"] = self.secret
        if not self.is_exchanged:
            yield request
            return
        for _ in range(2):
            with self._renewing:
                if not self._is_fresh():
                    answer = yield httpx.Request(
                        "POST", self._exchange_url, json={}, headers={"X-API-Key": self.secret}
                    )
                    if answer.status_code != 200:
                        return  # and is what this request is answered with
                    answer.read()
                    self._take(answer.json()["jwt"])
                token = self._token
            request.headers["X-API-Key"] = token
            response = yield request
            wrong = 'error="invalid_token"' in response.headers.get("WWW-Authenticate", "")
            if response.status_code != 401 or not wrong:
                return
            with self._renewing:
                if self._token == token:
                    self._token = ""

    def _is_fresh(self) -> bool:
        if not self._token:
            return False
        life = self.claims["exp"] - self.claims["iat"]
        return bool(time.time() < self.claims["exp"] - max(60.0, life / 2))

    def _take(self, token: str) -> None:
        payload = token.split(".")[1]
        self.claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        self._token = token
