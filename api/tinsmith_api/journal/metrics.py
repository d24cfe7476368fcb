"""What every process counts, for Prometheus. `serve` publishes it on a port of its own."""

from prometheus_client import Counter, Gauge, Histogram, start_http_server

# From one call on an idle machine to a pass over a long batch; waiting may take as long as a pool is down.
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)

# -- API processes
SUBMITTED = Counter("tinsmith_submitted", "Operations entered in the journal", ["kind", "base_model"])
HTTP_SECONDS = Histogram("tinsmith_http_seconds", "Requests answered", ["route", "status"], buckets=_SECONDS)
PARKED_POLLS = Gauge("tinsmith_parked_polls", "Clients waiting for a result in this process")

# -- workers
QUEUE_WAIT = Histogram(
    "tinsmith_queue_wait_seconds", "From submission to the start of execution", ["kind"], buckets=_SECONDS
)
COMPUTE = Histogram(
    "tinsmith_compute_seconds", "A pass, or a call that takes none", ["kind"], buckets=_SECONDS
)
TOKENS = Counter("tinsmith_tokens", "Tokens executed", ["kind"])
SLOTS = Gauge("tinsmith_slots", "Adapters held", ["tier"])
SLOT_BYTES = Gauge("tinsmith_slot_bytes", "Bytes of the adapters held", ["tier"])
PAGE_INS = Counter("tinsmith_page_ins", "Adapters brought back to the device", ["tier"])
PAGE_OUTS = Counter("tinsmith_page_outs", "Adapters moved out to that tier", ["tier"])
REPLAYED = Counter("tinsmith_replayed", "Operations executed again to bring a run back")
LEASE_LOSSES = Counter("tinsmith_lease_losses", "Leases that went to another worker")
SNAPSHOTS = Counter("tinsmith_snapshots", "Snapshots recorded")
SNAPSHOT_SECONDS = Histogram(
    "tinsmith_snapshot_seconds", "Writing and recording a snapshot", buckets=_SECONDS
)

# -- the process that keeps house, read from the journal
QUEUED = Gauge("tinsmith_queued", "Operations waiting for execution", ["base_model"])
WORKERS = Gauge("tinsmith_workers", "Workers alive", ["base_model", "state"])


def serve(port: int) -> None:
    """Publish on `port` from a thread of its own; 0: do not."""
    if port:
        start_http_server(port)
