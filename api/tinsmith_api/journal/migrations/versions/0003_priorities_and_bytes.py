"""priorities, limits on bytes"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table("tenants", schema=None) as batch_op:
        batch_op.add_column(sa.Column("max_queued_bytes", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("max_page_bytes", sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column("priority", sa.Integer(), server_default="0", nullable=False))


def downgrade() -> None:
    with op.batch_alter_table("tenants", schema=None) as batch_op:
        batch_op.drop_column("priority")
        batch_op.drop_column("max_page_bytes")
        batch_op.drop_column("max_queued_bytes")
