"""Run by alembic on the connection that Store hands over, or on `-x url=` when a change is drafted."""

import sqlalchemy as sa
from alembic import context

from tinsmith_api.journal.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    connection = sa.create_engine(context.get_x_argument(as_dictionary=True)["url"]).connect()
context.configure(connection=connection, target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
