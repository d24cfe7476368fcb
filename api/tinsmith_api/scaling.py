"""`tinsmith admin workers scale`: have so many workers of a base model.

`scale_command` says how where something else starts processes (Kubernetes: deploy/). Without it, workers are
processes of this machine: new ones are started here, and the ones that hold least are asked to leave.
"""

import shlex
import subprocess
import sys

from tinsmith_api.journal import leases
from tinsmith_api.journal.store import Store
from tinsmith_api.settings import Settings


def scale(settings: Settings, journal: Store, pool: str, count: int) -> str:
    """What was done, as a sentence. Exits with one if it cannot be done."""
    if not 0 <= count <= 1000:
        sys.exit("tinsmith: the count must be from 0 to 1000")
    if settings.scale_command:
        return _by_command(settings.scale_command, pool, count)
    rows = [r for r in journal.read(leases.list_workers).result() if r.base_model == pool]
    staying = sorted((r for r in rows if r.draining_at is None), key=lambda r: r.runs)
    for row in staying[: max(0, len(staying) - count)]:
        journal.write(lambda c, worker_id=row.id: leases.drain_worker(c, worker_id)).result()  # type: ignore[misc]
    missing = max(0, count - len(staying))
    if missing:
        settings.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for _ in range(missing):
        with open(settings.folder / "workers.log", "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "tinsmith_api.cli", "worker", "--pool", pool],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    leaving = max(0, len(staying) - count)
    where = f"; their lines are in {settings.folder / 'workers.log'}" if missing else ""
    return f"{pool}: {len(staying)} workers; {missing} started, {leaving} asked to leave{where}"


def _by_command(template: str, pool: str, count: int) -> str:
    # Split first: a pool's name is one word, whatever is in it.
    command = [word.format(pool=pool, count=count) for word in shlex.split(template)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tinsmith: {shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip() or f"{pool}: {count} workers asked for"
