"""The journal's tables. SQLite in the embedded form, PostgreSQL in the distributed one.

Times are seconds since the epoch (float). Ids that grant anything are random.
"""

import sqlalchemy as sa

metadata = sa.MetaData()

tenants = sa.Table(
    "tenants",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("created_at", sa.Float, nullable=False),
    # Its share of a worker that others want too, and what it may have at once (NULL: the service's default).
    sa.Column("weight", sa.Float, nullable=False, server_default="1"),
    sa.Column("max_runs", sa.Integer),
    sa.Column("max_queued", sa.Integer),
    sa.Column("max_queued_bytes", sa.BigInteger),
    # What its adapters may fill of each worker's memory (NULL: no limit); others wait in the object store.
    sa.Column("max_page_bytes", sa.BigInteger),
    # Who has a higher one is served first, whatever its share.
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    # Tokens it may use in all; NULL: as many as it likes.
    sa.Column("token_budget", sa.BigInteger),
)

# People (or programs) of a tenant. What each may do is its role.
members = sa.Table(
    "members",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("name", sa.String, nullable=False),  # an address of e-mail, say
    sa.Column("role", sa.String, nullable=False),  # admin, member, viewer
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("removed_at", sa.Float),
    sa.UniqueConstraint("tenant_id", "name"),
)

projects = sa.Table(
    "projects",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("token_budget", sa.BigInteger),
    sa.UniqueConstraint("tenant_id", "name"),
)

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("name", sa.String, nullable=False),
    # SHA-256 is enough for a key of 256 random bits: there is nothing to guess.
    sa.Column("sha256", sa.String, nullable=False, unique=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
    sa.Column("member_id", sa.String),
    # Limits of its own; NULL: none.
    sa.Column("requests_per_minute", sa.Integer),
    sa.Column("concurrent_samples", sa.Integer),
    sa.Column("tokens_per_day", sa.BigInteger),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False, index=True),
    sa.Column("project_id", sa.String),
    sa.Column("display_name", sa.String),
    sa.Column("tags", sa.JSON, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("sdk_version", sa.String),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("heartbeat_at", sa.Float, nullable=False),
    sa.Column("finished_at", sa.Float),
    sa.Column("finish_reason", sa.String),  # success, errored, interrupted; cancelled: the client was gone
    sa.Column("finish_detail", sa.String),
    sa.Column("member_id", sa.String),
)

workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("base_model", sa.String, nullable=False, index=True),
    sa.Column("facts", sa.JSON, nullable=False),
    sa.Column("started_at", sa.Float, nullable=False),
    sa.Column("heartbeat_at", sa.Float, nullable=False),
    sa.Column("ready_at", sa.Float),  # its base model is loaded
    sa.Column("draining_at", sa.Float),  # it was asked to leave and gets no more runs
    sa.Column("stopped_at", sa.Float),
    sa.Column("died", sa.Boolean, nullable=False, server_default=sa.false()),  # it did not leave by itself
)

runs = sa.Table(
    "runs",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False, index=True),
    sa.Column("session_id", sa.ForeignKey("sessions.id"), nullable=False, index=True),
    sa.Column("base_model", sa.String, nullable=False, index=True),
    sa.Column("lora", sa.JSON, nullable=False),  # rank, seed, train_attn, train_mlp, train_unembed
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("optimizer", sa.String, nullable=False, server_default="adamw"),  # its family, for good
    sa.Column("created_at", sa.Float, nullable=False),
    # The lease: where the run is placed, and who may write for it. A finish under an older epoch is refused.
    sa.Column("worker_id", sa.String, index=True),
    sa.Column("epoch", sa.Integer, nullable=False),
    # How many workers in a row died holding it, with none of its operations finished in between.
    sa.Column("deaths", sa.Integer, nullable=False, server_default="0"),
    # After two deaths only the run whose operation is being executed can have caused the next.
    sa.Column("is_suspect", sa.Boolean, nullable=False, server_default=sa.false()),
    # The snapshot: the state after every operation up to snapshot_seq, -1 before the first.
    sa.Column("snapshot_seq", sa.Integer, nullable=False),
    sa.Column("snapshot_key", sa.String),
)

operations = sa.Table(
    "operations",
    metadata,
    sa.Column("request_id", sa.String, primary_key=True),
    # The run an operation belongs to, or the sampling session.
    sa.Column("subject", sa.String, nullable=False),
    sa.Column("seq_id", sa.BigInteger, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("base_model", sa.String, nullable=False),
    # Who is to execute it, for an operation that belongs to no run (sample).
    sa.Column("worker_id", sa.String),
    sa.Column("state", sa.String, nullable=False),  # queued, done, failed
    sa.Column("tokens", sa.Integer, nullable=False),
    sa.Column("submitted_at", sa.Float, nullable=False),
    sa.Column("finished_at", sa.Float),
    sa.Column("answer", sa.JSON(none_as_null=True)),  # what the submission answered beside request_id
    sa.Column("error", sa.JSON(none_as_null=True)),  # {"error": sentence, "category": "user" | "server"}
    sa.Column("key_id", sa.Integer),  # of who submitted it
    sa.Column("started_at", sa.Float),
    sa.Column("retrieved_at", sa.Float),
    # What its result said of the training: the body is forgotten after a day, the curve is not.
    sa.Column("metrics", sa.JSON(none_as_null=True)),
    # Of a sample: how many workers died that were to execute it, and whether the next death counts as well.
    sa.Column("deaths", sa.Integer),
    sa.Column("is_suspect", sa.Boolean),
    # Of a sample: it was the so-manieth of its sampling session to be finished.
    sa.Column("completion", sa.BigInteger),
    sa.UniqueConstraint("subject", "seq_id"),
    sa.Index("operations_open", "base_model", "state"),
    sa.Index("operations_completed", "subject", "completion"),
    sa.Index("operations_of_tenant", "tenant_id", "state"),
)

# Bodies are kept apart from the rows that queues scan, so that those stay small.
payloads = sa.Table(
    "payloads",
    metadata,
    sa.Column("request_id", sa.String, primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

results = sa.Table(
    "results",
    metadata,
    sa.Column("request_id", sa.String, primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("finished_at", sa.Float, nullable=False, index=True),
)

sampling_sessions = sa.Table(
    "sampling_sessions",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False, index=True),
    sa.Column("session_id", sa.ForeignKey("sessions.id"), nullable=False, index=True),
    sa.Column("base_model", sa.String, nullable=False),
    sa.Column("model_path", sa.String),  # NULL: the base model itself
    # NULL as well for a sampler that follows its run: it has what lies at its model_path now.
    sa.Column("object_prefix", sa.String, index=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("completions", sa.BigInteger, nullable=False, server_default="0"),  # samples that are finished
    sa.Column("clones", sa.Integer, nullable=False, server_default="0"),  # clients that joined it
)

# Losses that clients described: what a forward_backward of their session is computed with.
custom_losses = sa.Table(
    "custom_losses",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("session_id", sa.ForeignKey("sessions.id"), nullable=False),
    sa.Column("seq_id", sa.Integer, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("graph", sa.LargeBinary, nullable=False),  # JSON (tinsmith.wire.loss_graph)
    sa.Column("created_at", sa.Float, nullable=False),
    sa.UniqueConstraint("session_id", "seq_id"),
)

checkpoints = sa.Table(
    "checkpoints",
    metadata,
    sa.Column("path", sa.String, primary_key=True),  # tinker://run/kind/name
    sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False, index=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False, index=True),
    sa.Column("kind", sa.String, nullable=False),  # weights, sampler_weights, external_weights
    sa.Column("name", sa.String, nullable=False),
    # A name is taken when its save is submitted; ready_at is set with the result, once the files are whole.
    sa.Column("request_id", sa.String, nullable=False, index=True),
    sa.Column("listed", sa.Boolean, nullable=False),  # unnamed samplers are not
    # Shared with its copies; the files go with the last of them.
    sa.Column("object_prefix", sa.String, nullable=False, index=True),
    sa.Column("lora", sa.JSON, nullable=False),
    sa.Column("user_metadata", sa.JSON, nullable=False),
    sa.Column("size_bytes", sa.BigInteger),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("ready_at", sa.Float),
    sa.Column("expires_at", sa.Float, index=True),
    sa.Column("published_at", sa.Float),  # since then everybody may read it
)

# Objects nothing refers to any more. They are deleted a while later, so that an operation that was
# submitted while they were alive can still be replayed.
garbage = sa.Table(
    "garbage",
    metadata,
    sa.Column("object_prefix", sa.String, primary_key=True),
    sa.Column("delete_after", sa.Float, nullable=False, index=True),
)

# What was sampled, kept a day for those who asked (record_stability_info).
sampled_sequences = sa.Table(
    "sampled_sequences",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("tokens", sa.LargeBinary, nullable=False),  # int32
    sa.Column("logprobs", sa.LargeBinary, nullable=False),  # float32
    sa.Column("created_at", sa.Float, nullable=False, index=True),
)

# What was used in each hour. Workers count in the transaction that finishes an operation, each in rows of its
# own, so that none waits for another.
usage = sa.Table(
    "usage",
    metadata,
    sa.Column("hour", sa.Integer, primary_key=True),  # since the epoch
    sa.Column("subject", sa.String, primary_key=True),  # a run or a sampling session; storage: a project
    # forward_backward, forward, prefill, prefill_cached, sample: tokens; checkpoint: saves; storage: bytes
    sa.Column("kind", sa.String, primary_key=True),
    sa.Column("key_id", sa.Integer, primary_key=True, autoincrement=False),  # 0: unknown
    sa.Column("worker_id", sa.String, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("session_id", sa.String),
    sa.Column("base_model", sa.String),
    sa.Column("amount", sa.BigInteger, nullable=False),
    sa.Index("usage_of_tenant", "tenant_id", "hour"),
    sa.Index("usage_of_key", "key_id", "hour"),
    sa.Index("usage_of_session", "session_id"),
    sa.Index("usage_of_subject", "subject"),
)

# Who did what. Rows are added only: the database itself refuses to change one.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("category", sa.String, nullable=False),  # checkpoints, projects, teams, organizations
    sa.Column("event", sa.String, nullable=False),
    sa.Column("details", sa.JSON, nullable=False),
    sa.Index("audit_of_tenant", "tenant_id", "at"),
)

# What copy_weights answered, so that it answers the same when it is asked again.
copies = sa.Table(
    "copies",
    metadata,
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), primary_key=True),
    sa.Column("idempotency_key", sa.String, primary_key=True),
    sa.Column("asked", sa.JSON, nullable=False),
    sa.Column("path", sa.String, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
)

# Files that are made when somebody asks for them, by whoever keeps house: archives of checkpoints, traces of
# sessions.
artifacts = sa.Table(
    "artifacts",
    metadata,
    sa.Column("kind", sa.String, primary_key=True),  # archive, trace
    sa.Column("subject", sa.String, primary_key=True),  # a checkpoint's object_prefix; a session
    sa.Column("tenant_id", sa.ForeignKey("tenants.id"), nullable=False),
    sa.Column("state", sa.String, nullable=False, index=True),  # wanted, ready, failed
    sa.Column("object_prefix", sa.String),
    sa.Column("error", sa.String),
    sa.Column("changed_at", sa.Float, nullable=False),
)

# What tokens and download addresses are signed with. The newest signs; the others are good for checking.
signing_keys = sa.Table(
    "signing_keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("secret", sa.LargeBinary, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
)
