"""What has to be done now and then: expiring, reaping, sweeping, pruning, counting.

The embedded service does it itself; a fleet's beat says when, and any of its job processes does it. Every
job may run twice, or at the same time as itself.
"""

import functools
import logging
import threading
import time
import uuid

import sqlalchemy as sa

from tinsmith_api import exports
from tinsmith_api.journal import artifacts, checkpoints, identities, leases, metrics, signing, usage
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.objects import Damaged, ObjectStore
from tinsmith_api.journal.store import Statement, Store, Unavailable
from tinsmith_api.journal.tables import copies, sampled_sequences
from tinsmith_api.settings import Settings

log = logging.getLogger("tinsmith")

PERIODS = {
    "sweep": 5.0,
    "expire_checkpoints": 60.0,
    "reap_sessions": 60.0,
    "collect_garbage": 60.0,
    "prune_journal": 60.0,
    "tidy": 3600.0,
    "make_artifacts": 2.0,
    "measure_storage": 600.0,
}
"""The chores, methods of House, and the seconds between two runs of each."""

_DAY_SECONDS = 86400.0
# Longer than anything takes to be written.
_TIDY_SECONDS = 6 * 3600.0
_WEEK_SECONDS = 7 * _DAY_SECONDS
# What is deleted in one transaction: everybody else's writes wait for it.
_PIECE = 500
# A trace of more operations than this is more than a browser takes: it is of the newest.
_TRACED = 100_000


class House:
    def __init__(self, settings: Settings, journal: Store, objects: ObjectStore) -> None:
        self.settings = settings
        self.journal = journal
        self.objects = objects
        self._doing = {chore: threading.Lock() for chore in PERIODS}

    def do(self, chore: str) -> None:
        """One of PERIODS; nothing if this process is still at it. What goes wrong is logged, and tried again
        when it is due again."""
        if not self._doing[chore].acquire(blocking=False):
            return
        try:
            getattr(self, chore)()
        except Exception:
            log.exception("%s failed; it is tried again in %g s", chore, PERIODS[chore])
        finally:
            self._doing[chore].release()

    def sweep(self) -> None:
        """See to pools whose workers are all gone, and count what waits. Workers see to each other sooner."""
        # Wide: workers of the same pool are closer to each other than this process is to them.
        patience = 5 * self.settings.lease_seconds if self.settings.is_fleet else None
        if patience is not None:
            silent = functools.partial(leases.somebody_is_silent, dead_after_seconds=patience)
            if self.journal.read(silent).result():
                # So is everybody after the database was gone. Within a lease, those that live have beaten.
                time.sleep(self.settings.lease_seconds)
        counts = self.journal.read(ops.queued_counts).result()
        for name, pool in self._pools().items():
            self.journal.write(
                functools.partial(leases.sweep, base_model=name, dead_after_seconds=patience)
            ).result()
            metrics.QUEUED.labels(name).set(counts.get(name, 0))
            for state, number in (
                ("ready", len(pool.ready)),
                ("starting", pool.starting),
                ("draining", pool.draining),
            ):
                metrics.WORKERS.labels(name, state).set(number)

    def expire_checkpoints(self) -> None:
        self._repeat(functools.partial(checkpoints.expire, at_most=_PIECE))
        unnamed = functools.partial(checkpoints.unnamed_left, at_most=_PIECE)
        while paths := self.journal.read_apart(unnamed).result():
            self.journal.write(functools.partial(checkpoints.delete_all, paths=paths)).result()

    def reap_sessions(self) -> None:
        """Finish the sessions of clients that are gone. Their runs stay: a worker has snapshotted and let go
        of those that nobody called."""
        silent_since = time.time() - self.settings.session_seconds
        self._repeat(functools.partial(identities.reap_sessions, silent_since=silent_since, at_most=_PIECE))

    def collect_garbage(self) -> None:
        for prefix in self.journal.read_apart(checkpoints.due_garbage).result():
            try:
                self.objects.delete(prefix)
            except OSError as error:
                log.warning("%s stays for now: %s", prefix, error)
                continue
            self.journal.write(functools.partial(checkpoints.forget_garbage, object_prefix=prefix)).result()

    def make_artifacts(self) -> None:
        """What somebody waits for. One that cannot be made says why and is asked for anew, or not."""
        for row in self.journal.read_apart(artifacts.wanted).result():
            prefix = f"{row.tenant_id}/artifacts/{uuid.uuid4().hex}"
            # Garbage until it is entered: this process may be killed in between.
            announce = functools.partial(
                checkpoints.discard_objects, object_prefix=prefix, after_seconds=_TIDY_SECONDS
            )
            self.journal.write(announce).result()
            try:
                self._make(row.kind, row.subject, prefix)
                finish = functools.partial(artifacts.finish, object_prefix=prefix)
            except OSError as error:
                log.warning("%s of %s is not made for now: %s", row.kind, row.subject, error)
                continue
            except Damaged as error:
                finish = functools.partial(artifacts.finish, error=f"its files are gone or damaged: {error}")
            except Unavailable:
                raise
            except Exception:  # or everybody else's would wait behind it for ever
                log.exception("%s of %s cannot be made", row.kind, row.subject)
                finish = functools.partial(artifacts.finish, error="it cannot be made, see the service's log")
            self.journal.write(functools.partial(finish, kind=row.kind, subject=row.subject)).result()

    def _make(self, kind: str, subject: str, prefix: str) -> None:
        if kind == artifacts.ARCHIVE:
            self.objects.put_stream(prefix, {"archive.tar": lambda: exports.archive(self.objects, subject)})
            return
        assert kind == artifacts.TRACE, kind
        find = functools.partial(ops.of_session, session_id=subject, at_most=_TRACED)
        trace = exports.trace(self.journal.read_apart(find).result())
        self.objects.put(prefix, {f"{subject}.json": trace})

    def measure_storage(self) -> None:
        self.journal.write(usage.measure_storage).result()

    def tidy(self) -> None:
        """What processes that were killed left in the object store, and in Redis."""
        self.objects.tidy(older_than_seconds=_TIDY_SECONDS)
        if self.settings.is_fleet:
            from tinsmith_api.journal.bell import forget_queues

            gone = self.journal.read_apart(leases.gone_workers).result()
            forget_queues(self.settings.redis.get_secret_value(), gone)

    def prune_journal(self) -> None:
        """Forget results nobody fetched for a day, artifacts and copies likewise, workers gone for a week."""
        day_ago = time.time() - _DAY_SECONDS
        self._repeat(functools.partial(ops.purge_results, finished_before=day_ago, at_most=_PIECE))
        self._repeat(functools.partial(_purge_sampled, created_before=day_ago))
        losses = functools.partial(identities.forget_losses, finished_before=day_ago, at_most=_PIECE)
        self._repeat(losses)
        self._repeat(functools.partial(artifacts.expire, made_before=day_ago, at_most=_PIECE))
        self.journal.write(functools.partial(_purge_copies, created_before=day_ago)).result()
        self.journal.write(signing.forget).result()
        week_ago = time.time() - _WEEK_SECONDS
        self.journal.write(functools.partial(leases.forget_workers, stopped_before=week_ago)).result()

    def _pools(self) -> dict[str, leases.Pool]:
        heard = 2 * self.settings.lease_seconds if self.settings.is_fleet else None
        return self.journal.read(lambda c: leases.pools(c, heard_within_seconds=heard)).result()

    def _repeat(self, purge: Statement[int]) -> None:
        """One piece after the other until nothing is left."""
        while self.journal.write(purge).result():
            pass


def _purge_copies(connection: sa.Connection, created_before: float) -> None:
    connection.execute(sa.delete(copies).where(copies.c.created_at < created_before))


def _purge_sampled(connection: sa.Connection, created_before: float) -> int:
    old = (
        sa.select(sampled_sequences.c.id).where(sampled_sequences.c.created_at < created_before).limit(_PIECE)
    )
    return connection.execute(sa.delete(sampled_sequences).where(sampled_sequences.c.id.in_(old))).rowcount
