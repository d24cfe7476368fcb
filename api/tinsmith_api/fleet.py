"""The distributed form: the doorbell and the wake-up over Redis, and the processes beside the API's."""

import asyncio
import functools
import logging
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

from celery import beat
from celery.worker import WorkController
from redis import asyncio as aioredis
from redis.exceptions import RedisError

from tinsmith_api.house import PERIODS, House
from tinsmith_api.journal import metrics
from tinsmith_api.journal.bell import Bell, Listener, make_celery
from tinsmith_api.journal.store import Store
from tinsmith_api.limits import LocalCalls
from tinsmith_api.settings import Settings, open_objects

log = logging.getLogger("tinsmith")

_JOB = "tinsmith.job"


class Fleet:
    """Workers that live elsewhere. All of these are called on the event loop. `name`: whom tokens are for."""

    ready = True  # what there is of workers is the pools' matter, not this process's

    def __init__(
        self,
        redis_url: str,
        *,
        name: str,
        on_done: Callable[[str], None],
        on_piece: Callable[[str, str], None],
        on_missed: Callable[[], None],
    ) -> None:
        self._redis_url = redis_url
        self._name = name
        self._on_done = on_done
        self._on_piece = on_piece
        self._on_missed = on_missed

    async def start(self) -> None:
        loop = asyncio.get_running_loop()

        def wake(request_ids: Sequence[str]) -> None:
            for request_id in request_ids:
                self._on_done(request_id)

        def pass_on(pieces: Sequence[tuple[str, str]]) -> None:
            for request_id, piece in pieces:
                self._on_piece(request_id, piece)

        self._bell = Bell(self._redis_url)
        self._listener = Listener(
            self._redis_url,
            name=self._name,
            on_pieces=lambda pieces: loop.call_soon_threadsafe(pass_on, pieces),
            on_done=lambda ids: loop.call_soon_threadsafe(wake, ids),
            on_missed=functools.partial(loop.call_soon_threadsafe, self._on_missed),
        )
        self._listener.start()

    def ring(self, worker_id: str, request_id: str) -> None:
        self._bell.ring(worker_id, request_id)

    async def stop(self) -> None:
        self._listener.close()
        await asyncio.to_thread(self._bell.close)


class SharedCalls:
    """Counted in Redis. While that is gone every process counts for itself: nobody is locked out."""

    def __init__(self, redis_url: str) -> None:
        self._redis = aioredis.Redis.from_url(redis_url, socket_timeout=1, socket_connect_timeout=1)
        self._alone = LocalCalls()

    async def count(self, key_id: int, minute: int) -> int:
        name = f"tinsmith.calls.{key_id}.{minute}"
        try:
            async with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.incr(name)
                pipeline.expire(name, 120)
                answers = await pipeline.execute()
            return int(answers[0])
        except (RedisError, OSError) as error:
            log.warning("calls per minute are counted in this process alone: %s", error)
            return await self._alone.count(key_id, minute)


def run_jobs(settings: Settings) -> None:
    """`tinsmith jobs`: do what beat says, until told to stop."""
    metrics.serve(settings.metrics_port)
    app = make_celery(settings.redis.get_secret_value())
    house = House(settings, Store(settings.database_url, patience_seconds=300.0), open_objects(settings))

    app.task(house.do, name=_JOB)
    app.finalize()
    controller: Any = WorkController(
        app=app,
        pool="threads",
        concurrency=len(PERIODS),  # so that no long chore keeps the others waiting
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: threading.Thread(target=controller.stop).start())
    controller.start()


def run_beat(settings: Settings) -> None:
    """`tinsmith beat`: say when what is due. Nothing is kept: after a restart everything is due at once."""
    metrics.serve(settings.metrics_port)
    app = make_celery(settings.redis.get_secret_value())
    app.conf.beat_schedule = {
        # What was not begun before it is due again is not begun at all.
        name: {"task": _JOB, "args": [name], "schedule": seconds, "options": {"expires": seconds}}
        for name, seconds in PERIODS.items()
    }
    app.finalize()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    beat.Service(app=app, max_interval=5, scheduler_cls=beat.Scheduler).start()
