"""Limits and budgets, by themselves on a journal."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tinsmith_api.journal import identities
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.store import Store
from tinsmith_api.limits import BudgetSpent, Limits, LocalCalls
from tinsmith_api.settings import Settings


@pytest.mark.parametrize("of", ["tenant", "project"])
def test_sessions_share_their_budget_also_within_a_second(tmp_path: Path, of: str) -> None:
    journal = Store(f"sqlite:///{tmp_path / 'journal.db'}")

    def fill(c: Any) -> tuple[str, list[str]]:
        identities.create_key(c, "lab")
        tenant_id = identities.tenant(c, "lab")
        assert tenant_id
        if of == "tenant":
            identities.change_tenant(c, "lab", {"token_budget": 100})
        else:
            identities.change_project(c, "lab", "default", 100)
        blank = {"tags": [], "user_metadata": {}}
        return tenant_id, [identities.create_session(c, tenant_id, dict(blank)) for _ in range(2)]

    tenant_id, session_ids = journal.write(fill).result()

    async def read(statement: Any) -> Any:
        return await asyncio.wrap_future(journal.read(statement))

    async def use() -> None:
        limits = Limits(Settings(data_dir=tmp_path), read, LocalCalls())

        async def call(session_id: str, tokens: int) -> None:
            subject = f"{session_id}:train:0"
            await limits.check(
                Operation(subject, 1, ops.FORWARD_BACKWARD, tenant_id, "m", tokens=tokens), None
            )

        for session_id in session_ids:
            await call(session_id, 5)
        await call(session_ids[0], 50)
        with pytest.raises(
            BudgetSpent, match=f"of the {'organization lab' if of == 'tenant' else 'project'}"
        ):
            await call(session_ids[1], 50)
        await call(session_ids[1], 40)

    asyncio.run(use())
    journal.close()
