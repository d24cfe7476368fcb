"""The line between a worker and the rest of a fleet: rings from its Celery queue, heartbeats to the journal,
results announced on Redis. Keeps the interface of `channel.Channel`.
"""

import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import sqlalchemy as sa

from tinsmith_api.journal import leases
from tinsmith_api.journal.bell import EVERYTHING, Announcer, Consumer
from tinsmith_api.journal.store import Store

log = logging.getLogger("tinsmith.worker")


class FleetChannel:
    """Registers the worker and beats for it from construction on. `on_given_up` is called, on the beating
    thread, when others took this worker for dead. `journal` is the channel's own: a beat that stood in line
    behind a slow write of results would come too late.

    Every beat brings the names of all that is queued for this worker; those that were rung for already are
    left out, so a ring that was lost on the way arrives one beat later.
    """

    def __init__(
        self,
        journal: Store,
        redis_url: str,
        worker_id: str,
        base_model: str,
        *,
        lease_seconds: float,
        on_given_up: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._worker_id = worker_id
        self._base_model = base_model
        self._lease_seconds = lease_seconds
        self._on_given_up = on_given_up
        self._inbox: queue.SimpleQueue[list[list[str]]] = queue.SimpleQueue()
        self._rung: dict[str, int | None] = {}  # request id -> the epoch of its run, once a beat told it
        self._is_ready = False
        self._closing = threading.Event()
        self._announcer = Announcer(redis_url)
        self._consumer = Consumer(redis_url, worker_id, self._ring)
        journal.write(lambda c: leases.register_worker(c, worker_id, base_model, {})).result()
        self._beating = threading.Thread(target=self._beat_forever, name="heartbeat", daemon=True)
        self._beating.start()

    def messages(self) -> Iterator[list[list[str]]]:
        """Batches of messages, each a list of words."""
        self._consumer.start()
        while True:
            yield self._inbox.get()

    def send(self, *words: str) -> None:
        if words[0] == "done":
            self._rung.pop(words[1], None)
            self._announcer.announce(words[1])
        elif words[0] == "piece":
            self._announcer.pass_on(*words[1:])
        elif words[0] == "ready":
            self._is_ready = True
        elif words[0] == "leaving":
            self._closing.set()

    def close(self) -> None:
        self._closing.set()
        self._consumer.close()
        self._announcer.close()
        self._journal.close()

    def _ring(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._rung.setdefault(request_id, None)
        self._inbox.put([["ring", request_id] for request_id in request_ids])

    def _beat_forever(self) -> None:
        # Who was cut off, or stood still, does not know whether the others were, too: it judges nobody for a
        # lease from then on.
        cut_off_until = last = time.monotonic()
        while not self._closing.wait(self._lease_seconds / 4):
            asked = time.monotonic()
            if asked - last > self._lease_seconds / 2:
                cut_off_until = asked
            try:
                beat = self._journal.write(functools.partial(self._beat, asked, cut_off_until)).result()
            except Exception:
                log.exception("no heartbeat")
                continue
            last = time.monotonic()
            if last - asked > self._lease_seconds / 2:
                cut_off_until = last
            if not beat.is_alive:
                if self._closing.is_set():  # it said so itself
                    return
                log.error("this worker was silent for too long and given up; its runs are others' now")
                self._on_given_up()
                return
            self._take_in(beat)

    def _beat(self, asked: float, cut_off_until: float, connection: sa.Connection) -> leases.Beat:
        # The first thing that a database does when it is back is what waited for it: judge by now, not by
        # then.
        now = time.monotonic()
        judges = now - cut_off_until > self._lease_seconds and now - asked < self._lease_seconds / 2
        return leases.beat(
            connection,
            self._worker_id,
            self._base_model,
            dead_after_seconds=self._lease_seconds if judges else None,
        )

    def _take_in(self, beat: leases.Beat) -> None:
        if beat.gave_up:
            # What the dead worker finished last may be in the journal without a word of it having been sent.
            self._announcer.announce(EVERYTHING)
        messages = []
        for finished in self._rung.keys() - beat.queued.keys():
            self._rung.pop(finished, None)
        if self._is_ready:
            for request_id, epoch in beat.queued.items():
                if self._rung.get(request_id) != epoch:
                    self._rung[request_id] = epoch
                    messages.append(["ring", request_id])
        if beat.is_draining:
            messages.append(["drain"])
        elif beat.has_surplus:
            messages.append(["share"])
        if messages:
            self._inbox.put(messages)
