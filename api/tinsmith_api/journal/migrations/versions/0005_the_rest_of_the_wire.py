"""custom losses, optimizers, the order in which samples were finished, clones of samplers"""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "custom_losses",
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("tenant_id", sa.String(), nullable=False),
        sa.Column("session_id", sa.String(), nullable=False),
        sa.Column("seq_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("graph", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["session_id"], ["sessions.id"]),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("session_id", "seq_id"),
    )
    with op.batch_alter_table("operations", schema=None) as batch_op:
        batch_op.add_column(sa.Column("completion", sa.BigInteger(), nullable=True))
        batch_op.create_index("operations_completed", ["subject", "completion"], unique=False)
    with op.batch_alter_table("sampling_sessions", schema=None) as batch_op:
        batch_op.add_column(sa.Column("completions", sa.BigInteger(), server_default="0", nullable=False))
        batch_op.add_column(sa.Column("clones", sa.Integer(), server_default="0", nullable=False))
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.add_column(sa.Column("optimizer", sa.String(), server_default="adamw", nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.drop_column("optimizer")
    with op.batch_alter_table("sampling_sessions", schema=None) as batch_op:
        batch_op.drop_column("clones")
        batch_op.drop_column("completions")
    with op.batch_alter_table("operations", schema=None) as batch_op:
        batch_op.drop_index("operations_completed")
        batch_op.drop_column("completion")
    op.drop_table("custom_losses")
