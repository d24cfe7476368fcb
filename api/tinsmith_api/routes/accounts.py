"""Accounts: keys and the tokens given for them, the audit log, bills."""

import datetime
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Query, Response
from pydantic import AwareDatetime

from tinsmith.errors import AuthenticationError, InvalidInput, NotFound
from tinsmith_api.bodies import reply
from tinsmith_api.journal import audit, identities, usage
from tinsmith_api.journal.tables import members, tenants
from tinsmith_api.owner import Mine, MineToAdminister, Owner, urn_of
from tinsmith_api.routes.records import texts, timestamp
from tinsmith_api.settings import Settings
from tinsmith_api.signer import ACCOUNT

router = APIRouter(prefix="/api/v1")

Json = dict[str, Any]

_TOKEN_SECONDS = 3600
_HOUR = datetime.timedelta(hours=1)
_MAX_DAYS = 14
_GIGABYTE = 1e9
_HOURS_OF_A_MONTH = 720
# What a day of the audit log is answered with at most; the newest are left out beyond it.
_MAX_ENTRIES = 10_000
# Nor is a bill longer than a client can take at once.
_MAX_EVENTS = 50_000


@router.post("/auth/token")
async def exchange_key(mine: Mine) -> Response:
    """A token of an hour that stands for this key, and says whose it is."""
    if not mine.service.settings.jwt_auth:
        raise NotFound("this service gives no tokens: send your key in the header X-API-Key")
    if mine.by_token:
        raise AuthenticationError("a token is given for a key, not for another token: send the key")
    caller = mine.caller
    claims: Json = {"sub": urn_of(caller.member_id), "org_id": caller.tenant_id, "key": caller.key_id}
    if "@" in caller.member:
        claims["email"] = caller.member
    return reply({"jwt": await mine.service.signer.sign(ACCOUNT, claims, _TOKEN_SECONDS)})


@router.get("/auth/apikey/me")
async def get_own_key(mine: Mine) -> Response:
    statement = sa.select(tenants.c.name).where(tenants.c.id == mine.tenant_id)
    organization = await mine.service.read(lambda c: c.execute(statement).scalar_one())
    return reply(
        {
            "key_id": mine.caller.key_id,
            "name": mine.caller.key_name,
            "note": f"{mine.caller.role} of {organization}",
            "details": {
                "org_details": {"name": organization},
                "user_details": {"email": mine.caller.member},
            },
        }
    )


@router.delete("/auth/apikey/me", status_code=204)
async def revoke_own_key(mine: Mine) -> Response:
    """In force at once in this process, after at most ten seconds in the others."""
    key_id = mine.caller.key_id
    await mine.service.write(lambda c: identities.revoke_key(c, key_id, by=mine.caller.member))
    mine.forget_caller()
    return Response(status_code=204)


@router.get("/audit")
async def get_audit_log(
    mine: MineToAdminister,
    event_type: Literal["all", "checkpoints", "projects", "teams", "organizations"] = "all",
    day: datetime.date | None = None,
) -> Response:
    """Of one day (UTC), oldest first; today's if none is named."""
    day = day or datetime.datetime.now(datetime.UTC).date()
    since = datetime.datetime.combine(day, datetime.time(), datetime.UTC).timestamp()
    rows = await mine.service.read_apart(
        lambda c: audit.entries(
            c,
            mine.tenant_id,
            category=None if event_type == "all" else event_type,
            since=since,
            before=since + 86400,
            limit=_MAX_ENTRIES,
        )
    )
    return reply({"entries": [_entry(row) for row in rows]})


@router.get("/billing/usage/events")
async def get_usage(
    mine: MineToAdminister, starting_on: AwareDatetime, ending_before: AwareDatetime
) -> Response:
    """What was used, by hour, session and kind."""
    for name, given in (("starting_on", starting_on), ("ending_before", ending_before)):
        if given.timestamp() % 3600:
            raise InvalidInput(f"{name} is {given.isoformat()}: it must be a full hour")
    # Not by adding to either, which may be the last day there is.
    if not datetime.timedelta(0) < ending_before - starting_on <= datetime.timedelta(days=_MAX_DAYS):
        raise InvalidInput(f"ending_before must be after starting_on, by {_MAX_DAYS} days at most")
    if starting_on > datetime.datetime.now(datetime.UTC):
        raise InvalidInput("starting_on lies in the future")
    first, end = (int(given.timestamp() // 3600) for given in (starting_on, ending_before))
    rows, names = await mine.service.read_apart(
        lambda c: (
            usage.by_hour(c, mine.tenant_id, first, end, at_most=_MAX_EVENTS + 1),
            _member_names(c, mine),
        )
    )
    if len(rows) > _MAX_EVENTS:
        raise InvalidInput(f"this is a bill of more than {_MAX_EVENTS} events: ask for a shorter time")
    settings = mine.service.settings
    return reply(
        {
            "data": [_event(row, names, settings) for row in rows],
            "sessions": {
                row.session_id: {"user_metadata": texts(row.user_metadata or {})}
                for row in rows
                if row.session_id is not None
            },
        }
    )


@router.get("/billing/usage/checkpoints/current")
async def get_current_storage(
    mine: MineToAdminister, project_id: Annotated[str | None, Query(max_length=1000)] = None
) -> Response:
    """What is stored now, by project and member."""
    only = None if project_id is None else (await mine.project(project_id)).id
    rows, names = await mine.service.read_apart(
        lambda c: (usage.stored(c, mine.tenant_id, only), _member_names(c, mine))
    )
    price = mine.service.settings.price_per_gigabyte_month
    return reply(
        {
            "data": [_stored(row, names, price) for row in rows],
            "effective_rate_usd_per_gigabyte_month": price,
        }
    )


def _member_names(connection: sa.Connection, mine: Owner) -> dict[str, str]:
    statement = sa.select(members.c.id, members.c.name).where(members.c.tenant_id == mine.tenant_id)
    return {row.id: row.name for row in connection.execute(statement)}


def _entry(row: Any) -> Json:
    entry = {"timestamp": timestamp(row.at), "event": row.event, "event_details": row.details}
    path = row.details.get("tinker_path")
    if path is not None:
        entry |= {"tinker_path": path, "model_id": path.removeprefix("tinker://").split("/")[0]}
    return {**entry, "purpose": row.details.get("purpose")}


def _stored(row: Any, names: dict[str, str], price: float | None) -> Json:
    gigabytes = row.size_bytes / _GIGABYTE
    return {
        "project_id": row.project_id,
        "org_user_urn": urn_of(row.member_id) if row.member_id else None,
        "user_email": names.get(row.member_id),
        "user_name": names.get(row.member_id),
        "checkpoint_count": row.checkpoint_count,
        "size_bytes": row.size_bytes,
        "size_gigabytes": gigabytes,
        "estimated_monthly_cost_usd": None if price is None else price * gigabytes,
    }


def _event(row: Any, names: dict[str, str], settings: Settings) -> Json:
    start = datetime.datetime.fromtimestamp(row.hour * 3600, datetime.UTC)
    event: Json = {
        "bucket_start": start.isoformat(),
        "bucket_end": (start + _HOUR).isoformat(),
        "base_model": row.base_model,
        "user_id": urn_of(row.member_id) if row.member_id else None,
        "user_name": names.get(row.member_id),
        "session_id": row.session_id,
        "project_id": row.project_id or None,
    }
    if row.kind == usage.STORAGE:
        price = settings.price_per_gigabyte_month
        hours = row.amount / _GIGABYTE
        event["event_info"] = {"type": "storage", "gigabyte_hours": hours}
        event["effective_rate_usd_per_gigabyte_month"] = price
        event["estimated_cost_usd"] = None if price is None else price * hours / _HOURS_OF_A_MONTH
    elif row.kind == usage.CHECKPOINT:
        event["event_info"] = {"type": "checkpoint", "count": row.amount}
    else:
        price = settings.price(row.base_model, row.kind)
        event["event_info"] = {**_TOKEN_EVENTS[row.kind], "token_count": row.amount}
        event["effective_rate_usd_per_million_tokens"] = price
        event["estimated_cost_usd"] = None if price is None else price * row.amount / 1e6
    return event


_TOKEN_EVENTS: dict[str, Json] = {
    usage.TRAINING: {"type": "training"},
    usage.PREFILL: {"type": "sampling_prefill", "cached": False},
    usage.PREFILL_CACHED: {"type": "sampling_prefill", "cached": True},
    usage.SAMPLED: {"type": "sampling_sample"},
}
