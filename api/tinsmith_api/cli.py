"""The console script `tinsmith`."""

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from tinsmith_api.journal.store import Store
    from tinsmith_api.settings import Settings


_ROLES = ("viewer", "member", "admin")


def main() -> None:
    given = parser().parse_args()
    try:
        given.run(given)
    except ModuleNotFoundError as error:
        sys.exit(f"tinsmith: {error.name} is missing: pip install 'tinsmith[api,worker,fleet]'")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="tinsmith",
        description="A self-hosted training service. Every setting can also come from the environment "
        "(TINSMITH_<NAME>) or from a TOML file.",
    )
    commands = top.add_subparsers(dest="command", required=True)

    serve = commands.add_parser("serve", help="run everything on this machine")
    serve.set_defaults(run=_serve)
    api = commands.add_parser("api", help="one of a fleet's API processes")
    api.set_defaults(run=_api)
    for command in (serve, api):
        command.add_argument("--host")
        command.add_argument("--port", type=int, help="default 8000; 0 takes a free one")
    serve.add_argument(
        "--model",
        action="append",
        metavar="NAME[=PATH_OR_HUB_ID]",
        help="serve this base model under NAME; may be repeated. Default: the tiny one that comes with it",
    )
    worker = commands.add_parser("worker", help="one of a fleet's workers")
    worker.set_defaults(run=_worker)
    worker.add_argument(
        "--pool",
        required=True,
        metavar="NAME[=PATH_OR_HUB_ID]",
        help="the base model it serves; the path may come from the setting `models`",
    )
    worker.add_argument(
        "--role",
        choices=["train", "sample", "both"],
        default="both",
        help="what it is given to do: a pool may have workers of its own for either",
    )
    for command in (serve, worker):
        command.add_argument("--engine", choices=["torch", "null"], help="null answers without computing")
        command.add_argument(
            "--deterministic",
            action="store_true",
            default=None,
            help="a run's numbers do not depend on who shares its passes, to the last bit",
        )
        command.add_argument(
            "--exact-logprobs",
            action="store_true",
            default=None,
            help="what is sampled is scored by the trainer's forward, too",
        )
        command.add_argument(
            "--sampler", choices=["tinsmith", "vllm"], help="what samples: the workers, or vLLM beside them"
        )
        command.add_argument(
            "--nproc", type=int, help="processes of a worker, one a GPU; started by torchrun it is told by it"
        )
        command.add_argument(
            "--parallel",
            choices=["none", "fsdp2", "deepspeed"],
            help="how they hold the base: none, whole in each (the default), or each a part of it",
        )
        command.add_argument(
            "--offload",
            action="store_true",
            default=None,
            help="of a base in parts: its layers stay in host memory, and come to the GPU when they run",
        )
        command.add_argument(
            "--offload-folder",
            metavar="FOLDER",
            help="with deepspeed: they stay in files there, on a fast disk",
        )
        command.add_argument("--quantize", choices=["nf4"], help="keep the base's layers in four bits")
        command.add_argument(
            "--single-tenant",
            action="store_true",
            default=None,
            help="train one run at a time: all of the base's weights, cut among --nproc processes with "
            "--parallel fsdp2, or by another method than LoRA",
        )
    jobs = commands.add_parser("jobs", help="one of a fleet's processes for background jobs")
    jobs.set_defaults(run=_jobs)
    beat = commands.add_parser("beat", help="a fleet's clock: says when background jobs are due")
    beat.set_defaults(run=_beat)
    for command in (serve, api, worker, jobs, beat, *_admin(commands)):
        command.add_argument("--config", type=Path, metavar="FILE", help="TOML with settings")
        command.add_argument("--data-dir", type=Path, help="default ~/.tinsmith")

    demo = commands.add_parser("demo", help="fine-tune a small model through a service of your own")
    demo.set_defaults(run=_cookbook("demo"))
    train = commands.add_parser(
        "train", help="train from a YAML file: data, training, evaluation, export", add_help=False
    )
    train.set_defaults(run=_cookbook("train"))
    for command in (demo, train):
        command.add_argument("arguments", nargs=argparse.REMAINDER)
        command.prefix_chars = "\0"  # options are the program's own, wherever they stand
    return top


def _admin(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> list[argparse.ArgumentParser]:
    nouns = commands.add_parser("admin", help="tenants, members, projects, keys, workers").add_subparsers(
        dest="noun", required=True
    )
    keys = nouns.add_parser("keys").add_subparsers(dest="verb", required=True)
    create = keys.add_parser("create", help="a new key, printed once")
    create.add_argument("tenant", help="the organization it is for; created if new")
    create.add_argument("--member", default="owner", help="whose it is, an address say; created if new")
    create.add_argument("--role", choices=_ROLES, help="what this member may do; a new one is a member")
    create.add_argument("--name", default="default", help="what its list calls it")
    restrict = keys.add_parser("set", help="a key's limits")
    restrict.add_argument("id", type=int)
    for verb in (create, restrict):
        verb.add_argument("--requests-per-minute", type=_count, help="calls; 0: no limit")
        verb.add_argument("--concurrent-samples", type=_count, help="samples under way; 0: no limit")
        verb.add_argument("--tokens-per-day", type=_tokens, help="tokens in 24 hours; 0: no limit")
    revoke = keys.add_parser("revoke")
    revoke.add_argument("id", type=int)
    listing = keys.add_parser("list")
    for verb in (create, restrict, revoke, listing):
        verb.set_defaults(run=_keys)

    members = nouns.add_parser("members").add_subparsers(dest="verb", required=True)
    grant = members.add_parser("set", help="a member's role")
    grant.add_argument("tenant")
    grant.add_argument("member")
    grant.add_argument("role", choices=_ROLES)
    remove = members.add_parser("remove", help="a member, and its keys with it")
    remove.add_argument("tenant")
    remove.add_argument("member")
    people = members.add_parser("list")
    for verb in (grant, remove, people):
        verb.set_defaults(run=_members)

    projects = nouns.add_parser("projects").add_subparsers(dest="verb", required=True)
    found = projects.add_parser("create", help="a new project; prints its id")
    budget = projects.add_parser("set", help="a project's budget")
    for verb in (found, budget):
        verb.add_argument("tenant")
        verb.add_argument("project")
    budget.add_argument("--token-budget", type=_tokens, required=True, help="tokens in all; 0: no budget")
    ventures = projects.add_parser("list")
    for verb in (found, budget, ventures):
        verb.set_defaults(run=_projects)

    tenants = nouns.add_parser("tenants").add_subparsers(dest="verb", required=True)
    share = tenants.add_parser("set", help="a tenant's share and limits")
    share.add_argument("tenant")
    share.add_argument("--weight", type=float, help="its share of a busy worker; default 1")
    share.add_argument("--max-runs", type=int, help="how many runs it may have open; 0: the default")
    share.add_argument("--max-queued", type=int, help="how many calls of it may wait; 0: the default")
    share.add_argument("--max-queued-bytes", type=int, help="how large they may be in all; 0: the default")
    share.add_argument(
        "--max-page-bytes",
        type=int,
        help="what its adapters may fill of a worker's memory; 0: no limit. A change counts for the runs "
        "that come from then on",
    )
    share.add_argument("--priority", type=int, help="whose is higher is served first; default 0")
    share.add_argument("--token-budget", type=_tokens, help="tokens it may use in all; 0: no budget")
    everyone = tenants.add_parser("list")
    for verb in (share, everyone):
        verb.set_defaults(run=_tenants)

    workers = nouns.add_parser("workers").add_subparsers(dest="verb", required=True)
    alive = workers.add_parser("list", help="those that live, and what they hold")
    drain = workers.add_parser("drain", help="let one finish, hand over and leave")
    drain.add_argument("id")
    scale = workers.add_parser("scale", help="have so many workers of a base model")
    scale.add_argument("pool")
    scale.add_argument("count", type=int)
    for verb in (alive, drain, scale):
        verb.set_defaults(run=_workers)

    migrate = nouns.add_parser("migrate", help="bring the database's tables up to date")
    migrate.set_defaults(run=_migrate)
    bucket = nouns.add_parser("bucket", help="make the bucket of TINSMITH_OBJECTS, in a server of your own")
    bucket.set_defaults(run=_bucket)
    return [
        *(create, restrict, revoke, listing),
        *(grant, remove, people, found, budget, ventures),
        *(share, everyone, alive, drain, scale, migrate, bucket),
    ]


def _count(text: str, most: int = 2**31 - 1) -> int:
    number = int(text)
    if not 0 <= number <= most:
        raise argparse.ArgumentTypeError(f"must be from 0 to {most}")
    return number


def _tokens(text: str) -> int:
    return _count(text, 10**18)


# -- processes -------------------------------------------------------------------------------------------


def _serve(given: argparse.Namespace) -> None:
    from tinsmith_api.serve import serve

    models = dict(map(_name_and_path, given.model)) if given.model else None
    settings = _settings(given, models=models)
    _make(settings.folder)
    serve(settings)


def _api(given: argparse.Namespace) -> None:
    from tinsmith_api.journal.store import Unavailable
    from tinsmith_api.serve import serve_api

    try:
        serve_api(_of_fleet(_settings(given)))
    except Unavailable as error:
        sys.exit(f"tinsmith: {error}")


def _worker(given: argparse.Namespace) -> None:
    from tinsmith_api.settings import environment, worker_arguments

    settings = _of_fleet(_settings(given))
    name, _, path = given.pool.partition("=")
    path = path or settings.models.get(name) or name
    os.environ.update(environment(settings))
    arguments = [*worker_arguments(settings, name, path), "--role", given.role]
    if settings.metrics_port:
        arguments += ["--metrics-port", str(settings.metrics_port)]
    os.execv(sys.executable, [sys.executable, "-m", "tinsmith_worker", *arguments])


def _jobs(given: argparse.Namespace) -> None:
    from tinsmith_api.fleet import run_jobs

    run_jobs(_of_fleet(_settings(given)))


def _beat(given: argparse.Namespace) -> None:
    from tinsmith_api.fleet import run_beat

    run_beat(_of_fleet(_settings(given)))


def _cookbook(module: str) -> "Callable[[argparse.Namespace], None]":
    """The cookbook is a client: it runs as a program of its own, and nothing of it is imported here."""

    def run(given: argparse.Namespace) -> None:
        os.execv(sys.executable, [sys.executable, "-m", f"tinsmith_cookbook.{module}", *given.arguments])

    return run


def _name_and_path(model: str) -> tuple[str, str]:
    name, _, path = model.partition("=")
    return name, path or name


def _settings(given: argparse.Namespace, **more: object) -> "Settings":
    import logging

    from pydantic import ValidationError

    from tinsmith_api.bodies import sentence
    from tinsmith_api.settings import Settings, read_settings

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    said = {name: value for name, value in vars(given).items() if name in Settings.model_fields}
    try:
        return read_settings(given.config, **{**said, **more})
    except ValidationError as error:
        sys.exit(f"tinsmith: {sentence(error)}")
    except (OSError, ValueError) as error:
        sys.exit(f"tinsmith: {error}")


def _of_fleet(settings: "Settings") -> "Settings":
    missing = [name for name in ("database", "redis", "objects") if not getattr(settings, name)]
    if missing:
        names = ", ".join(f"TINSMITH_{name.upper()}" for name in missing)
        sys.exit(
            f"tinsmith: a fleet needs to know where its {' and '.join(missing)} are: set {names}. "
            "On one machine, `tinsmith serve` needs none of them"
        )
    return settings


# -- administration --------------------------------------------------------------------------------------


def _open_journal(given: argparse.Namespace) -> "Store":
    from tinsmith_api.journal.store import Store, Unavailable

    # A verb's own options, such as a tenant's limits, may be called as settings are.
    settings = _settings(argparse.Namespace(config=given.config, data_dir=given.data_dir))
    _make(settings.folder)
    try:
        return Store(settings.database_url)
    except Unavailable as error:
        sys.exit(f"tinsmith: {error}")


def _make(folder: Path) -> None:
    """The data directory, if there is none."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"tinsmith: {folder} cannot be made ({error.strerror}): choose another --data-dir")


def _migrate(given: argparse.Namespace) -> None:
    _open_journal(given).close()


def _bucket(given: argparse.Namespace) -> None:
    settings = _settings(given)
    if not settings.objects.startswith("s3://"):
        sys.exit("tinsmith: TINSMITH_OBJECTS is not in S3: set it to s3://BUCKET/PREFIX")
    from tinsmith_api.journal.s3 import make_bucket

    try:
        make_bucket(settings.objects, endpoint=settings.s3_endpoint, region=settings.s3_region)
    except OSError as error:
        sys.exit(f"tinsmith: {error}")


def _keys(given: argparse.Namespace) -> None:
    from tinsmith_api.journal import identities

    journal = _open_journal(given)
    names = ("requests_per_minute", "concurrent_samples", "tokens_per_day")
    limits = {name: value for name in names if (value := getattr(given, name, None)) is not None}
    if given.verb == "create":
        made = functools.partial(
            identities.create_key,
            tenant_name=given.tenant,
            name=given.name,
            member=given.member,
            role=given.role,
            limits={name: value for name, value in limits.items() if value},
        )
        print(journal.write(made).result())
    elif given.verb == "set":
        if not journal.write(lambda c: identities.change_key(c, given.id, limits)).result():
            sys.exit(f"tinsmith: no key {given.id}: `tinsmith admin keys list` shows them")
    elif given.verb == "revoke":
        if not journal.write(lambda c: identities.revoke_key(c, given.id)).result():
            sys.exit(f"tinsmith: no key {given.id} in force")
    else:
        for row in journal.read(identities.list_keys).result():
            state = "revoked" if row.revoked_at else "in force"
            own = [f"{name.replace('_', '-')} {row._mapping[name]}" for name in names if row._mapping[name]]
            print(row.id, row.tenant, row.name, state, f" {row.member} ({row.role})", *own)
    journal.close()


def _members(given: argparse.Namespace) -> None:
    from tinsmith_api.journal import identities

    journal = _open_journal(given)
    if given.verb == "list":
        for row in journal.read(identities.list_members).result():
            print(f"{row.tenant}  {row.name}  {row.role}")
    elif given.verb == "set":
        tenant_id = _tenant(journal, given.tenant)
        journal.write(lambda c: identities.set_member(c, tenant_id, given.member, given.role)).result()
    elif not journal.write(lambda c: identities.remove_member(c, given.tenant, given.member)).result():
        sys.exit(f"tinsmith: {given.tenant} has no member {given.member!r}")
    journal.close()


def _projects(given: argparse.Namespace) -> None:
    from tinsmith_api.journal import identities

    journal = _open_journal(given)
    if given.verb == "list":
        for row in journal.read(identities.list_projects).result():
            budget = f"token-budget {row.token_budget}" if row.token_budget else "no budget"
            print(f"{row.id}  {row.tenant}  {row.name}  {budget}")
    elif given.verb == "create":
        tenant_id = _tenant(journal, given.tenant)
        print(journal.write(lambda c: identities.create_project(c, tenant_id, given.project)).result())
    else:
        change = functools.partial(
            identities.change_project,
            tenant_name=given.tenant,
            name=given.project,
            token_budget=given.token_budget,
        )
        if not journal.write(change).result():
            sys.exit(f"tinsmith: {given.tenant} has no project {given.project!r}")
    journal.close()


def _tenant(journal: "Store", name: str) -> str:
    from tinsmith_api.journal import identities

    found = journal.read(lambda c: identities.tenant(c, name)).result()
    if found is None:
        sys.exit(f"tinsmith: no tenant {name!r}: `tinsmith admin tenants list` shows them")
    return found


def _tenants(given: argparse.Namespace) -> None:
    from tinsmith_api.journal import identities

    journal = _open_journal(given)
    if given.verb == "set":
        if given.weight is not None and not 0 < given.weight <= 1000:
            sys.exit("tinsmith: --weight must be above 0 and at most 1000")
        changes = {
            "weight": given.weight,
            "max_runs": given.max_runs,
            "max_queued": given.max_queued,
            "max_queued_bytes": given.max_queued_bytes,
            "max_page_bytes": given.max_page_bytes,
            "priority": given.priority,
            "token_budget": given.token_budget,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        if not journal.write(lambda c: identities.change_tenant(c, given.tenant, changes)).result():
            sys.exit(f"tinsmith: no tenant {given.tenant!r}: `tinsmith admin tenants list` shows them")
    else:
        for row in journal.read(identities.list_tenants).result():
            own = (row.max_runs, row.max_queued, row.max_queued_bytes)
            runs, queued, queued_bytes = (n if n else "default" for n in own)
            print(
                f"{row.name}  weight {row.weight:g}  priority {row.priority}  max-runs {runs}  "
                f"max-queued {queued}  max-queued-bytes {queued_bytes}  "
                f"max-page-bytes {row.max_page_bytes or 'none'}  token-budget {row.token_budget or 'none'}"
            )
    journal.close()


def _workers(given: argparse.Namespace) -> None:
    from tinsmith_api.journal import leases
    from tinsmith_api.scaling import scale

    journal = _open_journal(given)
    if given.verb == "drain":
        if not journal.write(lambda c: leases.drain_worker(c, given.id)).result():
            sys.exit(
                f"tinsmith: no worker {given.id} lives: `tinsmith admin workers list` shows those that do"
            )
    elif given.verb == "scale":
        print(scale(_of_fleet(_settings(given)), journal, given.pool, given.count))
    else:
        for row in journal.read(leases.list_workers).result():
            state = "draining" if row.draining_at else "ready" if row.ready_at else "starting"
            print(
                f"{row.id}  {row.base_model}  {state}  {row.runs} runs  heard {row.silent_seconds:.0f} s ago"
            )
    journal.close()


if __name__ == "__main__":
    main()
