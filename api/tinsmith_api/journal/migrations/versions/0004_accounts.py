"""accounts: members, roles, projects, limits; usage, audit, copies, artifacts"""

import time
import uuid

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "signing_keys",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "artifacts",
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("object_prefix", sa.String(), nullable=True),
        sa.Column("error", sa.String(), nullable=True),
        sa.Column("changed_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("kind", "subject"),
    )
    with op.batch_alter_table("artifacts", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_artifacts_state"), ["state"], unique=False)

    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("at", sa.Float(), nullable=False),
        sa.Column("category", sa.String(), nullable=False),
        sa.Column("event", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    with op.batch_alter_table("audit", schema=None) as batch_op:
        batch_op.create_index("audit_of_tenant", ["tenant_id", "at"], unique=False)

    op.create_table(
        "copies",
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=False),
        sa.Column("asked", sa.JSON(), nullable=False),
        sa.Column("path", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("tenant_id", "idempotency_key"),
    )
    with op.batch_alter_table("copies", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_copies_created_at"), ["created_at"], unique=False)

    op.create_table(
        "members",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("removed_at", sa.Float(), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("tenant_id", "name"),
    )
    op.create_table(
        "projects",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("token_budget", sa.BigInteger(), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("tenant_id", "name"),
    )
    op.create_table(
        "usage",
        sa.Column("hour", sa.Integer(), nullable=False),
        sa.Column("subject", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("key_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("worker_id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=True),
        sa.Column("base_model", sa.String(), nullable=True),
        sa.Column("amount", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("hour", "subject", "kind", "key_id", "worker_id"),
    )
    with op.batch_alter_table("usage", schema=None) as batch_op:
        batch_op.create_index("usage_of_key", ["key_id", "hour"], unique=False)
        batch_op.create_index("usage_of_session", ["session_id"], unique=False)
        batch_op.create_index("usage_of_subject", ["subject"], unique=False)
        batch_op.create_index("usage_of_tenant", ["tenant_id", "hour"], unique=False)

    with op.batch_alter_table("checkpoints", schema=None) as batch_op:
        batch_op.add_column(sa.Column("published_at", sa.Float(), nullable=True))
        batch_op.create_index(batch_op.f("ix_checkpoints_object_prefix"), ["object_prefix"], unique=False)

    with op.batch_alter_table("keys", schema=None) as batch_op:
        batch_op.add_column(sa.Column("member_id", sa.String(), nullable=True))
        batch_op.add_column(sa.Column("requests_per_minute", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("concurrent_samples", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("tokens_per_day", sa.BigInteger(), nullable=True))

    with op.batch_alter_table("operations", schema=None) as batch_op:
        batch_op.add_column(sa.Column("key_id", sa.Integer(), nullable=True))
        batch_op.add_column(sa.Column("started_at", sa.Float(), nullable=True))
        batch_op.add_column(sa.Column("retrieved_at", sa.Float(), nullable=True))
        batch_op.add_column(sa.Column("metrics", sa.JSON(none_as_null=True), nullable=True))

    with op.batch_alter_table("sessions", schema=None) as batch_op:
        batch_op.add_column(sa.Column("member_id", sa.String(), nullable=True))

    with op.batch_alter_table("tenants", schema=None) as batch_op:
        batch_op.add_column(sa.Column("token_budget", sa.BigInteger(), nullable=True))

    _give_every_tenant_an_owner_and_a_project(op.get_bind())
    _keep_the_audit_log()


def _give_every_tenant_an_owner_and_a_project(connection: sa.Connection) -> None:
    """Until now whoever had a key of a tenant could do everything."""
    for (tenant_id,) in connection.execute(sa.text("SELECT id FROM tenants")).all():
        new = {
            "tenant": tenant_id,
            "member": uuid.uuid4().hex,
            "project": uuid.uuid4().hex,
            "now": time.time(),
        }
        for statement in (
            "INSERT INTO members (id, tenant_id, name, role, created_at) "
            "VALUES (:member, :tenant, 'owner', 'admin', :now)",
            "INSERT INTO projects (id, tenant_id, name, created_at) "
            "VALUES (:project, :tenant, 'default', :now)",
            "UPDATE keys SET member_id = :member WHERE tenant_id = :tenant",
            "UPDATE sessions SET member_id = :member WHERE tenant_id = :tenant",
            "UPDATE sessions SET project_id = :project WHERE tenant_id = :tenant AND project_id IS NULL",
        ):
            connection.execute(sa.text(statement), new)


def _keep_the_audit_log() -> None:
    if op.get_bind().dialect.name == "sqlite":
        for verb in ("UPDATE", "DELETE"):
            op.execute(
                f"CREATE TRIGGER audit_no_{verb.lower()} BEFORE {verb} ON audit "
                "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
            )
        return
    op.execute(
        "CREATE FUNCTION audit_is_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$"
    )
    op.execute(
        "CREATE TRIGGER audit_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit "
        "FOR EACH STATEMENT EXECUTE FUNCTION audit_is_append_only()"
    )


def downgrade() -> None:
    if op.get_bind().dialect.name != "sqlite":
        op.execute("DROP FUNCTION audit_is_append_only CASCADE")
    with op.batch_alter_table("tenants", schema=None) as batch_op:
        batch_op.drop_column("token_budget")

    with op.batch_alter_table("sessions", schema=None) as batch_op:
        batch_op.drop_column("member_id")

    with op.batch_alter_table("operations", schema=None) as batch_op:
        batch_op.drop_column("metrics")
        batch_op.drop_column("retrieved_at")
        batch_op.drop_column("started_at")
        batch_op.drop_column("key_id")

    with op.batch_alter_table("keys", schema=None) as batch_op:
        batch_op.drop_column("tokens_per_day")
        batch_op.drop_column("concurrent_samples")
        batch_op.drop_column("requests_per_minute")
        batch_op.drop_column("member_id")

    with op.batch_alter_table("checkpoints", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_checkpoints_object_prefix"))
        batch_op.drop_column("published_at")

    with op.batch_alter_table("usage", schema=None) as batch_op:
        batch_op.drop_index("usage_of_tenant")
        batch_op.drop_index("usage_of_subject")
        batch_op.drop_index("usage_of_session")
        batch_op.drop_index("usage_of_key")

    op.drop_table("usage")
    op.drop_table("projects")
    op.drop_table("members")
    with op.batch_alter_table("copies", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_copies_created_at"))

    op.drop_table("copies")
    with op.batch_alter_table("audit", schema=None) as batch_op:
        batch_op.drop_index("audit_of_tenant")

    op.drop_table("audit")
    with op.batch_alter_table("artifacts", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_artifacts_state"))

    op.drop_table("artifacts")
    op.drop_table("signing_keys")
