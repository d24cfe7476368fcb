"""The distributed form's doorbell and wake-up: names of operations on Celery queues, of results on Redis
pub/sub, and there, too, tokens that somebody reads as they come. Nothing here has to arrive: the journal
knows everything, and whoever misses a word finds it there.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis
from celery import Celery
from celery.worker import WorkController
from kombu.entity import Exchange, Queue

log = logging.getLogger("tinsmith")

RING = "tinsmith.ring"
DONE_CHANNEL = "tinsmith.done"
EVERYTHING = "*"
"""Announced instead of names: whoever waits has to look for itself."""
JOBS_QUEUE = "tinsmith.jobs"

_PAUSE_SECONDS = 0.5
_PIECES_CHANNEL = "tinsmith.pieces"
_PIECES_AT_MOST = 1024  # messages of them that wait to be sent
_ROOM_SECONDS = 0.01
_UNACKED = (".unacked", ".unacked-index", ".unacked-mutex")  # beside each queue
# What one message carries at most, so that no reader holds up another for long.
_IDS = 256


def queue_of(worker_id: str) -> Queue:
    return _queue(f"tinsmith.worker.{worker_id}")


def forget_queues(redis_url: str, worker_ids: Sequence[str]) -> None:
    """Nobody will read the queues of these workers again: take them away."""
    queues = [queue_of(worker_id).name for worker_id in worker_ids]
    names = [f"{queue}{end}" for queue in queues for end in ("", *_UNACKED)]
    try:
        with redis.Redis.from_url(redis_url, socket_timeout=2, socket_connect_timeout=2) as client:
            for start in range(0, len(names), _IDS):
                client.delete(*names[start : start + _IDS])
    except redis.RedisError as error:
        log.warning("queues of workers that are gone stay in Redis: %s", error)


def _queue(name: str) -> Queue:
    # The default exchange delivers by the queue's name: nothing is kept in Redis for it.
    return Queue(name, exchange=Exchange(""), routing_key=name)


def make_celery(redis_url: str, queue: Queue | None = None) -> Celery:
    """Celery as everybody here uses it, reading `queue`, the jobs' if none is given. Tasks are acknowledged
    when done, results go nowhere."""
    for talkative in ("celery.worker.strategy", "celery.app.trace", "celery.beat"):
        logging.getLogger(talkative).setLevel(logging.WARNING)  # a line for every message
    queue = queue or _queue(JOBS_QUEUE)
    app = Celery("tinsmith", broker=redis_url, set_as_current=False)
    app.conf.update(
        task_acks_late=True,
        task_ignore_result=True,
        task_queues=[queue],
        task_default_queue=queue.name,
        task_serializer="json",
        accept_content=["json"],
        worker_prefetch_multiplier=64,
        worker_hijack_root_logger=False,
        worker_send_task_events=False,
        worker_enable_remote_control=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        # A task is a word to be passed on or a job of minutes; either may run twice.
        broker_transport_options={
            "visibility_timeout": 3600,
            "socket_timeout": 10,
            "socket_connect_timeout": 5,
            "socket_keepalive": True,
            "max_retries": 1,
        },
    )
    return app


class _Sender:
    """A thread that sends what it is given, everything that waits at once. If it cannot, it says so once."""

    def __init__(self, name: str) -> None:
        self._waiting: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Send what was given, or give up if that cannot be done at once."""
        self._waiting.put(None)
        self._thread.join(timeout=5)

    def _run(self) -> None:
        item = self._waiting.get()
        while item is not None:
            by_target: dict[str, list[str]] = {}
            while item is not None:
                by_target.setdefault(item[0], []).append(item[1])
                if self._waiting.empty():
                    break
                item = self._waiting.get()
            for target, names in by_target.items():
                self._deliver(target, names)
            if item is None:
                return
            item = self._waiting.get()

    def _deliver(self, target: str, names: list[str]) -> None:
        for start in range(0, len(names), _IDS):
            piece = names[start : start + _IDS]
            try:
                try:
                    self._send(target, piece)
                except Exception:  # of a connection from before Redis was restarted; the next is a new one
                    self._send(target, piece)
                self._failing = False
            except Exception as error:  # whatever Redis, kombu or the network say
                if not self._failing:
                    log.warning("Redis takes no messages (%s); the journal is looked through instead", error)
                self._failing = True

    def _send(self, target: str, names: list[str]) -> None:
        raise NotImplementedError


class Bell(_Sender):
    """Rings for workers."""

    def __init__(self, redis_url: str) -> None:
        self._app = make_celery(redis_url)
        super().__init__("bell")

    def ring(self, worker_id: str, request_id: str) -> None:
        self._waiting.put((worker_id, request_id))

    def _send(self, target: str, names: list[str]) -> None:
        self._app.send_task(RING, args=[names], queue=queue_of(target), retry=False)


class Announcer(_Sender):
    """Tells every API process which operations have their result."""

    def __init__(self, redis_url: str) -> None:
        self._redis = redis.Redis.from_url(redis_url, socket_timeout=5, socket_connect_timeout=5)
        super().__init__("announce")

    def announce(self, request_id: str) -> None:
        self._waiting.put((DONE_CHANNEL, request_id))

    def pass_on(self, to: str, request_id: str, pieces: str) -> None:
        """Tokens of a sample, to the API process that calls itself `to`. Waits while too many wait."""
        while self._waiting.qsize() >= _PIECES_AT_MOST and self._thread.is_alive():
            time.sleep(_ROOM_SECONDS)
        self._waiting.put((f"{_PIECES_CHANNEL}.{to}", f"{request_id}:{pieces}"))

    def _send(self, target: str, names: list[str]) -> None:
        self._redis.publish(target, " ".join(names))


class Listener:
    """Hears of results, and of tokens for `name`, on a thread of its own. `on_missed` is called when some
    results may not have been heard of: after every (re)connection, and now and then while there is none.
    `on_pieces` is given (sample, tokens) as `Announcer.pass_on` had them."""

    def __init__(
        self,
        redis_url: str,
        *,
        name: str,
        on_done: Callable[[Sequence[str]], object],
        on_pieces: Callable[[Sequence[tuple[str, str]]], object],
        on_missed: Callable[[], object],
    ) -> None:
        self._redis = redis.Redis.from_url(
            redis_url, socket_timeout=5, socket_connect_timeout=5, socket_keepalive=True
        )
        self._pieces_channel = f"{_PIECES_CHANNEL}.{name}"
        self._on_done = on_done
        self._on_pieces = on_pieces
        self._on_missed = on_missed
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="listen", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        self._redis.close()

    def _run(self) -> None:
        is_known_down = False
        while not self._closing:
            try:
                self._listen()
                is_known_down = False
            except Exception as error:
                if not self._closing and not is_known_down:
                    log.warning("Redis sends no messages (%s); connecting again", error)
                is_known_down = True
                time.sleep(_PAUSE_SECONDS)
                self._on_missed()  # nothing is announced: until it is again, whoever waits looks for itself

    def _listen(self) -> None:
        with self._redis.pubsub() as subscription:
            subscription.subscribe(DONE_CHANNEL, self._pieces_channel)
            pinged = time.monotonic()
            while not self._closing:
                message = subscription.get_message(timeout=2.0)
                if message is not None and message["type"] == "subscribe":
                    self._on_missed()
                elif message is not None and message["type"] == "message":
                    self._take_in(message["channel"].decode(), message["data"].decode().split())
                # A connection that is cut in the middle looks like silence.
                if time.monotonic() - pinged > 2.0:
                    subscription.ping()
                    pinged = time.monotonic()

    def _take_in(self, channel: str, words: list[str]) -> None:
        if channel == self._pieces_channel:
            self._on_pieces([(word.partition(":")[0], word.partition(":")[2]) for word in words])
            return
        self._on_done(words)
        if EVERYTHING in words:
            self._on_missed()


class Consumer:
    """Reads the queue of one worker: a Celery worker of pool "solo" whose tasks only hand over."""

    def __init__(self, redis_url: str, worker_id: str, on_ring: Callable[[Sequence[str]], None]) -> None:
        own = queue_of(worker_id)
        app = make_celery(redis_url, own)
        # Of its own as well: messages that were being read when a worker died are of no use to the others.
        app.conf.broker_transport_options = {
            **app.conf.broker_transport_options,
            "unacked_key": f"{own.name}{_UNACKED[0]}",
            "unacked_index_key": f"{own.name}{_UNACKED[1]}",
            "unacked_mutex_key": f"{own.name}{_UNACKED[2]}",
        }

        @app.task(name=RING)  # type: ignore[untyped-decorator]
        def ring(request_ids: list[str]) -> None:
            on_ring(request_ids)

        app.finalize()
        self._controller: Any = WorkController(
            app=app,
            pool="solo",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
        )
        self._redis_url = redis_url
        self._worker_id = worker_id
        self._thread = threading.Thread(target=self._run, name="celery", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Nobody will read this queue again."""
        forget_queues(self._redis_url, [self._worker_id])

    def _run(self) -> None:
        while True:
            try:
                self._controller.start()
                return
            except Exception:
                log.exception("reading the queue failed; beginning again")
                time.sleep(_PAUSE_SECONDS)
