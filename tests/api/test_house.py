"""The chores, by themselves on a journal and a directory."""

from pathlib import Path

import sqlalchemy as sa

from tinsmith_api.house import House
from tinsmith_api.journal import artifacts, identities
from tinsmith_api.journal.objects import DirectoryStore
from tinsmith_api.journal.store import Store
from tinsmith_api.journal.tables import tenants
from tinsmith_api.settings import Settings


def test_what_cannot_be_made_holds_up_nobody_else_s(tmp_path: Path) -> None:
    journal, objects = Store(f"sqlite:///{tmp_path / 'journal.db'}"), DirectoryStore(tmp_path / "objects")
    objects.put("t/checkpoints/good", {"adapter_config.json": b"{}"})

    def ask(c: sa.Connection) -> None:
        identities.create_key(c, "t")
        tenant_id = c.execute(sa.select(tenants.c.id)).scalar_one()
        artifacts.want(c, "unheard of", "x", tenant_id)
        for subject in ("t/checkpoints/gone", "t/checkpoints/good"):
            artifacts.want(c, artifacts.ARCHIVE, subject, tenant_id)

    journal.write(ask).result()
    House(Settings(data_dir=tmp_path), journal, objects).do("make_artifacts")
    rows = journal.read(lambda c: c.execute(sa.select(artifacts.artifacts)).all()).result()
    made = {row.subject: (row.state, row.error) for row in rows}
    journal.close()
    assert made["t/checkpoints/good"] == (artifacts.READY, None)
    assert made["x"] == (artifacts.FAILED, "it cannot be made, see the service's log")
    assert "gone or damaged" in made["t/checkpoints/gone"][1]
