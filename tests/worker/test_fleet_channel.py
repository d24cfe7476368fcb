"""The line between a worker and the rest of a fleet, on a real PostgreSQL and a real Redis."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa
from pydantic import SecretStr

from tests import servers
from tests.chaos.proxy import Proxy
from tests.servers import wait_until
from tinsmith_api.house import House
from tinsmith_api.journal import leases
from tinsmith_api.journal.bell import Announcer, Bell, Listener
from tinsmith_api.journal.store import Store
from tinsmith_api.journal.tables import workers
from tinsmith_api.settings import Settings, open_objects
from tinsmith_worker.fleet_channel import FleetChannel

LEASE_SECONDS = 1.0


class Members:
    """Workers of one pool, each with a line to the database that can be cut."""

    def __init__(self, server: servers.Redis, url: str) -> None:
        self.redis = server
        self.url = sa.make_url(url)
        self.journal = Store(url)
        self.given_up: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.lines: dict[str, Proxy] = {}
        self.channels: dict[str, FleetChannel] = {}

    def join(self, name: str) -> FleetChannel:
        assert self.url.port is not None
        line = self.lines[name] = Proxy(self.url.port)
        through = self.url.set(port=line.port).render_as_string(hide_password=False)
        channel = self.channels[name] = FleetChannel(
            Store(through, patience_seconds=60),
            self.redis.url,
            name,
            "m",
            lease_seconds=LEASE_SECONDS,
            on_given_up=lambda: self.given_up.put(name),
        )
        self.journal.write(lambda c: leases.describe_worker(c, name, {"vocab_size": 7})).result()
        return channel

    def living(self) -> set[str]:
        statement = sa.select(workers.c.id).where(workers.c.stopped_at.is_(None))
        return set(self.journal.read(lambda c: c.execute(statement).scalars().all()).result())

    def close(self) -> None:
        for name, channel in self.channels.items():
            channel.close()
            self.lines[name].close()
        self.journal.close()


@pytest.fixture
def members(tmp_path: Path, new_database: Callable[[], str]) -> Iterator[Members]:
    server = servers.Redis(tmp_path / "redis")
    made = Members(server, new_database())
    yield made
    made.close()
    server.stop()


def test_who_had_no_database_for_longer_than_a_lease_gives_up_nobody(members: Members) -> None:
    for name in ("w1", "w2"):
        members.join(name)
    time.sleep(2.5 * LEASE_SECONDS)  # from here on both would judge
    for line in members.lines.values():
        line.cut()
    time.sleep(2 * LEASE_SECONDS)
    # The beat of the first to be back was asked for before the database was gone.
    members.lines["w1"].heal()
    time.sleep(0.5)
    members.lines["w2"].heal()
    time.sleep(2 * LEASE_SECONDS)
    assert members.living() == {"w1", "w2"}
    assert members.given_up.empty()


def test_a_dead_worker_is_given_up_and_everybody_is_told_to_look(members: Members) -> None:
    missed = threading.Event()
    listener = Listener(
        members.redis.url,
        name="api",
        on_done=lambda _: None,
        on_pieces=lambda _: None,
        on_missed=missed.set,
    )
    listener.start()
    members.join("w1")
    members.join("w2")
    time.sleep(2.5 * LEASE_SECONDS)
    assert missed.is_set(), "when it began to listen"
    missed.clear()
    members.lines["w2"].cut()
    wait_until(lambda: members.living() == {"w1"}, 5 * LEASE_SECONDS, "its being given up")
    assert missed.wait(5), "what it finished last may not have been announced"
    members.lines["w2"].heal()
    assert members.given_up.get(timeout=10) == "w2"
    listener.close()


def test_tokens_reach_the_process_that_they_are_for(members: Members) -> None:
    heard: dict[str, list[tuple[str, str]]] = {"one": [], "two": []}
    is_listening = {name: threading.Event() for name in heard}
    done: list[str] = []
    listeners = [
        Listener(
            members.redis.url,
            name=name,
            on_done=done.extend,
            on_pieces=heard[name].extend,
            on_missed=is_listening[name].set,
        )
        for name in heard
    ]
    for listener in listeners:
        listener.start()
    assert all(event.wait(10) for event in is_listening.values())
    time.sleep(0.2)  # each has two channels
    line = members.join("w1")
    line.send("piece", "one", "r1", "dG9rZW4=")
    line.send("piece", "two", "r2", "")
    line.send("piece", "nobody", "r3", "dG9rZW4=")
    line.send("done", "r1")
    wait_until(lambda: done == ["r1", "r1"], 10, "the word to both")
    assert heard == {"one": [("r1", "dG9rZW4=")], "two": [("r2", "")]}
    for listener in listeners:
        listener.close()


def test_the_queue_of_a_worker_that_was_killed_does_not_stay_in_redis(
    members: Members, tmp_path: Path
) -> None:
    members.join("lives")
    members.journal.write(lambda c: leases.register_worker(c, "killed", "m", {})).result()
    bell = Bell(members.redis.url)
    for name in (
        "lives",
        "killed",
    ):  # neither reads: the one because it is dead, the other because not asked to
        bell.ring(name, "some-call")
    bell.close()
    with redis.Redis.from_url(members.redis.url) as client:
        wait_until(lambda: len(client.keys("tinsmith.worker.*")) == 2, 5, "ringing")
        members.journal.write(lambda c: leases.stop_worker(c, "killed", died=True)).result()
        settings = Settings(data_dir=tmp_path, redis=SecretStr(members.redis.url))
        House(settings, members.journal, open_objects(settings)).do("tidy")
        assert client.keys("tinsmith.worker.*") == [b"tinsmith.worker.lives"]


def test_a_worker_that_leaves_is_not_told_that_it_was_given_up(members: Members) -> None:
    channel = members.join("w1")
    for _ in range(3):
        channel.send("leaving")
        members.journal.write(lambda c: leases.stop_worker(c, "w1")).result()
        time.sleep(LEASE_SECONDS / 4)
    assert members.given_up.empty()


def test_tokens_wait_for_a_redis_that_is_slow_and_none_is_left_out() -> None:
    may_send, sent = threading.Event(), []

    class Slow(Announcer):
        def _send(self, target: str, names: list[str]) -> None:
            may_send.wait()
            sent.extend(names)

    announcer = Slow("redis://127.0.0.1:1")  # which is not asked

    def pass_on() -> None:
        for number in range(4000):
            announcer.pass_on("api", "r", str(number))

    streaming = threading.Thread(target=pass_on)
    streaming.start()
    time.sleep(0.1)
    assert streaming.is_alive(), "there is no room for so many"
    may_send.set()
    streaming.join(20)
    announcer.close()
    assert sent == [f"r:{number}" for number in range(4000)]
