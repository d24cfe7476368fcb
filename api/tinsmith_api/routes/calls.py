"""Calls of a run, as the routes submit them: each is accepted at once, or refused and its number consumed."""

import json
from typing import Annotated, Any

import sqlalchemy as sa
from pydantic import Field

from tinsmith.errors import InvalidInput
from tinsmith_api.bodies import Model, Readable, parse, parse_any
from tinsmith_api.journal.operations import Operation
from tinsmith_api.journal.store import Statement
from tinsmith_api.journal.tables import operations
from tinsmith_api.owner import Owner

Json = dict[str, Any]

SeqId = Annotated[int, Field(ge=1, le=2**31 - 1)]

# How far ahead of its run's highest number a call may be. Everything between is waited for, and entered
# as missing in the end.
_MAX_AHEAD = 10_000


async def parse_call(mine: Owner, model: type[Model], raw: Readable) -> Model:
    """As `parse`; but a call of a run that is refused here still counts as that run's number, or every
    later call of the run would wait for it."""
    try:
        return parse(model, raw)
    except InvalidInput as error:
        given = parse_any(raw)
        if isinstance(given, dict):
            await consume(mine, given.get("model_id"), given.get("seq_id"), error)
        raise


async def consume(mine: Owner, run_id: object, seq_id: object, error: Exception) -> None:
    if isinstance(run_id, str) and isinstance(seq_id, int) and 1 <= seq_id < 2**31:
        await refuse(mine, await mine.run(run_id), seq_id, "refused", error)


async def refuse(mine: Owner, run: Any, seq_id: int, kind: str, error: Exception) -> Json:
    """Accept the call and fail it: its number is consumed, its future says what was wrong."""
    return await submit(
        mine,
        Operation(
            run.id,
            seq_id,
            kind,
            mine.tenant_id,
            run.base_model,
            error={"error": str(error), "category": "user"},
        ),
    )


async def call(mine: Owner, run: Any, seq_id: int, kind: str, payload: Json) -> Json:
    await mine.open_session(run.session_id)
    operation = Operation(
        run.id, seq_id, kind, mine.tenant_id, run.base_model, payload=json.dumps(payload).encode()
    )
    return await submit(mine, operation)


async def submit(mine: Owner, operation: Operation, also: Statement[Json | None] = lambda _: None) -> Json:
    """Submit a call of a run; InvalidInput, and nothing is consumed, if its number is far from the others."""
    if operation.seq_id > _MAX_AHEAD:  # rare, and else not worth a look into the journal
        highest = await mine.service.read(lambda c: _highest(c, operation.subject))
        if operation.seq_id > highest + _MAX_AHEAD:
            raise InvalidInput(
                f"seq_id {operation.seq_id} is more than {_MAX_AHEAD} above this run's highest, {highest}: "
                "number the calls of a run one by one"
            )
    return await mine.submit(operation, also)


def _highest(connection: sa.Connection, run_id: str) -> int:
    statement = sa.select(sa.func.max(operations.c.seq_id)).where(operations.c.subject == run_id)
    highest: int | None = connection.execute(statement).scalar_one()
    return highest or 0
