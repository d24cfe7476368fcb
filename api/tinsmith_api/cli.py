"""The console script `tinsmith`."""

import argparse
import os
import sys
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="tinsmith", description="A self-hosted training service.")
    commands = parser.add_subparsers(dest="command", required=True)

    serve = commands.add_parser("serve", help="run everything on this machine")
    serve.add_argument("--host")
    serve.add_argument("--port", type=int, help="default 8000; 0 takes a free one")
    serve.add_argument("--data-dir", type=Path, help="default ~/.tinsmith")
    serve.add_argument(
        "--model",
        action="append",
        metavar="NAME[=PATH_OR_HUB_ID]",
        help="serve this base model under NAME; may be repeated. Default: a tiny one made on first use",
    )
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML with the same settings")
    serve.add_argument("--engine", choices=["torch", "null"], help="null answers without computing")
    serve.add_argument(
        "--deterministic",
        action="store_true",
        default=None,
        help="a run's numbers do not depend on who shares its passes, to the last bit",
    )

    keys = commands.add_parser("admin", help="keys").add_subparsers(dest="noun", required=True)
    verbs = keys.add_parser("keys").add_subparsers(dest="verb", required=True)
    create = verbs.add_parser("create", help="a new key, printed once")
    create.add_argument("tenant", help="who it is for; created if new")
    revoke = verbs.add_parser("revoke")
    revoke.add_argument("id", type=int)
    listing = verbs.add_parser("list")
    for verb in (create, revoke, listing):
        verb.add_argument("--data-dir", type=Path, default=Path("~/.tinsmith"))

    for command, module in (("worker", "tinsmith_worker"), ("demo", "tinsmith_cookbook.demo")):
        commands.add_parser(command, help=f"python -m {module}", add_help=False)

    given, rest = parser.parse_known_args()
    if given.command in ("worker", "demo"):
        module = {"worker": "tinsmith_worker", "demo": "tinsmith_cookbook.demo"}[given.command]
        os.execv(sys.executable, [sys.executable, "-m", module, *rest])
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        _serve(given) if given.command == "serve" else _keys(given)
    except ModuleNotFoundError as error:
        sys.exit(f"tinsmith: {error.name} is missing: pip install 'tinsmith[api,worker]'")


def _serve(given: argparse.Namespace) -> None:
    from pydantic import ValidationError

    from tinsmith_api.bodies import sentence
    from tinsmith_api.serve import serve
    from tinsmith_api.settings import read_settings

    models = None
    if given.model:
        models = {name: path or name for name, _, path in (m.partition("=") for m in given.model)}
    try:
        settings = read_settings(
            given.config,
            host=given.host,
            port=given.port,
            data_dir=given.data_dir,
            models=models,
            engine=given.engine,
            deterministic=given.deterministic,
        )
    except ValidationError as error:
        sys.exit(f"tinsmith: {sentence(error)}")
    except (OSError, ValueError) as error:
        sys.exit(f"tinsmith: {given.config}: {error}")
    serve(settings)


def _keys(given: argparse.Namespace) -> None:
    from tinsmith_api.journal import identities
    from tinsmith_api.journal.store import Store

    folder = given.data_dir.expanduser()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    journal = Store(f"sqlite:///{folder / 'journal.db'}")
    if given.verb == "create":
        print(journal.write(lambda c: identities.create_key(c, given.tenant)).result())
    elif given.verb == "revoke":
        if not journal.write(lambda c: identities.revoke_key(c, given.id)).result():
            sys.exit(f"tinsmith: no key {given.id} in force")
    else:
        for row in journal.read(identities.list_keys).result():
            print(row.id, row.tenant, row.name, "revoked" if row.revoked_at else "in force")
    journal.close()


if __name__ == "__main__":
    main()
