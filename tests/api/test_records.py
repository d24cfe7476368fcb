"""Lists, totals and archives that grow without an end: nothing is left out, and nothing is read as a whole."""

import asyncio
import tarfile
import time
import tracemalloc
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from tinsmith_api import exports
from tinsmith_api.app import make_app
from tinsmith_api.journal import identities, usage
from tinsmith_api.journal.objects import Damaged, DirectoryStore
from tinsmith_api.journal.tables import checkpoints, runs
from tinsmith_api.journal.tables import usage as used
from tinsmith_api.journal.usage import Budget, Spent
from tinsmith_api.service import Service
from tinsmith_api.settings import Settings

KEYS = {"ann": "tml-key-of-ann", "bob": "tml-key-of-bob"}


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """The control plane on a journal of its own; no worker."""
    running = Service(Settings(data_dir=tmp_path, models={}))
    for member, key in KEYS.items():
        running.journal.write(
            lambda c, m=member, k=key: identities.create_key(c, "lab", member=m, key=k)
        ).result()
    yield running
    running.journal.close()


@pytest.fixture
def session(service: Service) -> str:
    """One of Ann's."""

    def create(connection: sa.Connection) -> str:
        ann = identities.caller(connection, hashed=identities.sha256(KEYS["ann"]))
        assert ann is not None
        values = {"tags": [], "user_metadata": {}, "member_id": ann.member_id}
        return identities.create_session(connection, ann.tenant_id, values)

    return service.journal.write(create).result()


def get(service: Service, path: str, member: str = "ann", **query: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.get(f"/api/v1{path}", params=query, headers={"x-api-key": KEYS[member]})

    return asyncio.run(ask())


def test_a_run_s_checkpoints_are_all_listed_or_page_by_page(service: Service, session: str) -> None:
    run, count = f"{session}:train:0", 2500
    names = [f"step-{number:05d}" for number in range(count)]

    def fill(connection: sa.Connection) -> None:
        tenant = connection.execute(sa.text("select id from tenants")).scalar_one()
        common = {"tenant_id": tenant, "lora": {"rank": 4}, "user_metadata": {}}
        given = {"id": run, "session_id": session, "base_model": "m", "epoch": 0, "snapshot_seq": -1}
        connection.execute(sa.insert(runs).values(**common, **given, created_at=0.0))
        rows = [
            {
                **common,
                **{"path": f"tinker://{run}/weights/{name}", "run_id": run, "kind": "weights", "name": name},
                **{
                    "request_id": name,
                    "listed": True,
                    "object_prefix": name,
                    "size_bytes": 1,
                    "ready_at": 1.0,
                },
                "created_at": float(number // 3),  # some at the same time
            }
            for number, name in enumerate(names)
        ]
        connection.execute(sa.insert(checkpoints), rows)

    service.journal.write(fill).result()
    path = f"/training_runs/{run}/checkpoints"
    everything = get(service, path).json()
    listed = [one["checkpoint_id"].removeprefix("weights/") for one in everything["checkpoints"]]
    assert sorted(listed) == names
    assert len(listed) == everything["cursor"]["total_count"] == count
    pages = [get(service, path, limit=1000, offset=offset).json() for offset in range(0, count, 1000)]
    assert [one for page in pages for one in page["checkpoints"]] == everything["checkpoints"]
    assert pages[1]["cursor"] == {"offset": 1000, "limit": 1000, "total_count": count}


def test_a_session_is_its_member_s_unless_the_organization_s_are_asked_for(
    service: Service, session: str
) -> None:
    path = f"/sessions/{session}"
    assert get(service, path).status_code == 200
    assert get(service, path, "bob").status_code == 404
    assert get(service, path, "bob", access_scope="accessible").status_code == 200


def test_a_budget_reads_old_hours_once(service: Service, session: str) -> None:
    now = int(time.time() // 3600)
    tenant = service.journal.read(
        lambda c: c.execute(sa.text("select id from tenants")).scalar_one()
    ).result()

    def count(hour: int, amount: int, kind: str = usage.TRAINING) -> None:
        row = {"subject": f"{session}:train:0", "key_id": 0, "worker_id": "w", "session_id": session}
        row |= {"hour": hour, "kind": kind, "tenant_id": tenant, "amount": amount}
        service.journal.write(lambda c: c.execute(sa.insert(used).values(row))).result()

    def spent(budget: Budget, before: Spent) -> Spent:
        return service.journal.read(lambda c: usage.spent(c, budget, before)).result()

    whole = Budget("the organization", 10**9, tenant)
    for hour in range(now - 1000, now + 1):
        count(hour, 7)
    count(now, 10**6, usage.CHECKPOINT)
    first = spent(whole, Spent())
    assert (first.settled, first.recent) == (7 * 999, 7 * 2)
    read: list[str] = []
    sa.event.listen(sa.engine.Engine, "before_cursor_execute", lambda *a: read.append(str(a[3])))
    again = spent(whole, first)
    assert again == first
    assert all(str(now - 1) in asked for asked in read if "hour" in asked), "old hours were read again"
    count(now - 1, 5, usage.SAMPLED)  # by a worker that finished a little late
    assert spent(whole, first).settled + spent(whole, first).recent == 7 * 1001 + 5


def test_an_archive_is_made_piece_by_piece(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    adapter = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": bytes(64 << 20),
        "optimizer.safetensors": b"x",
    }
    store.put("adapter", adapter)
    tracemalloc.start()
    size = store.put_stream("made", {"archive.tar": lambda: exports.archive(store, "adapter")})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 64 << 20
    assert peak < 8 << 20, f"{peak:,} bytes at once"
    with tarfile.open(fileobj=BytesIO(store.get("made")["archive.tar"])) as tar:
        found = {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    assert found == {name: adapter[name] for name in ("adapter_config.json", "adapter_model.safetensors")}


def test_an_archive_of_a_spoiled_adapter_is_not_made(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"})
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"weighty")
    with pytest.raises(Damaged, match="checksum"):
        store.put_stream("made", {"archive.tar": lambda: exports.archive(store, "adapter")})
    assert not (tmp_path / "made").exists()
    assert not list(tmp_path.glob(".writing-*"))
