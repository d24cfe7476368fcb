"""The tokenizers of the base models, so that a client needs no account at a hub."""

import asyncio
import gzip

from fastapi import APIRouter, Request, Response
from pydantic_core import to_json

from tinsmith.errors import NotFound
from tinsmith_api.journal.objects import ObjectStore
from tinsmith_api.owner import Mine

router = APIRouter(prefix="/api/v1")


@router.get("/tokenizers/{base_model:path}", responses={304: {"description": "It has not changed"}})
async def get_tokenizer(mine: Mine, base_model: str, request: Request) -> Response:
    """`{"files": {name: text}}`: tokenizer.json, tokenizer_config.json, chat_template.jinja. The ETag changes
    when they do."""
    service = mine.service
    where = (await service.facts(base_model)).tokenizer_files
    if not where:
        raise NotFound(f"{base_model} has no tokenizer here")
    etag = f'"{where.rpartition("/")[2]}"'
    headers = {"ETag": etag, "Cache-Control": "private, no-cache", "Vary": "Accept-Encoding"}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    packed = service.tokenizers.get(where)
    if packed is None:
        packed = service.tokenizers.put(where, await asyncio.to_thread(_pack, service.objects, where))
    if "gzip" not in request.headers.get("accept-encoding", ""):
        packed = await asyncio.to_thread(gzip.decompress, packed)
    else:
        headers["Content-Encoding"] = "gzip"
    return Response(packed, headers=headers, media_type="application/json")


def _pack(objects: ObjectStore, where: str) -> bytes:
    texts = {name: body.decode() for name, body in objects.get(where).items()}
    return gzip.compress(to_json({"files": texts}), 6)
