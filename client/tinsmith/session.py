"""A session: what one program does at a service, opened when it is first needed."""

import contextlib
import itertools
import threading
from collections.abc import Mapping
from typing import Any

from tinsmith.connection import Connection
from tinsmith.errors import NotFound, ServiceUnavailable, TinsmithError

HEARTBEAT_SECONDS = 10.0
# A Tinsmith says how long it waits for a silent session (`session_seconds`, a day by default), and takes
# every call for a sign of life. One that waits less than this gets heartbeats, and so does any other service.
_PATIENT_SECONDS = 3600


class Session:
    """`heartbeat` None: a thread of its own beats only where the service would take silence for the end."""

    def __init__(
        self, connection: Connection, fields: Mapping[str, Any], heartbeat: bool | None = None
    ) -> None:
        self.connection = connection
        self.runs = itertools.count()
        self.samplers = itertools.count()
        self._fields = fields
        self._heartbeat = heartbeat
        self._opening = threading.Lock()
        self._id = ""
        self._over = threading.Event()

    @property
    def id(self) -> str:
        """Opens the session if there is none yet."""
        with self._opening:
            if not self._id:
                self._id = self.connection.post("create_session", self._fields, fatal=(402,))["session_id"]
                if self._needs_heartbeat():
                    threading.Thread(target=self._beat, name="tinsmith-heartbeat", daemon=True).start()
        return self._id

    @property
    def is_open(self) -> bool:
        return bool(self._id)

    def finish(self, reason: str, detail: str | None) -> None:
        """Tried for a few seconds: a service that is away ends a session that stays silent."""
        if self._over.is_set():
            return
        self._over.set()
        if self._id:
            finish = {"reason": {"type": reason}, "detail": detail}
            with contextlib.suppress(ServiceUnavailable, NotFound):
                self.connection.send(
                    "POST", f"sessions/{self._id}/finish", json=finish, patience=10.0
                ).result()

    def _needs_heartbeat(self) -> bool:
        if self._heartbeat is not None:
            return self._heartbeat
        return bool(self.connection.config.get("session_seconds", 0) < _PATIENT_SECONDS)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT_SECONDS):
            try:
                self.connection.post("session_heartbeat", {"session_id": self._id})
            except NotFound as error:
                if error.status_code == 410:
                    return
            except TinsmithError:
                pass  # a lost beat is followed by the next; the calls themselves say what is wrong
