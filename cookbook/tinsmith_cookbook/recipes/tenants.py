"""Many tenants at once get, bit for bit, what each gets alone; and it takes less time.

Every tenant has a run with a rank, a learning rate and data of their own. First they train one after another,
each with the service to themselves; then all at once, packed into the same passes. On a deterministic service
(`tinsmith serve --deterministic`) every loss and every logprob at the end is the same to the last bit.
Without a service in the environment it starts one, and makes a key for each tenant.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from tinsmith_cookbook import data, options, schedules, service, toys, tracking
from tinsmith_cookbook.data import Batches
from tinsmith_cookbook.renderers import Renderer
from tinsmith_cookbook.sdk import tinker

STEPS = options.Steps(full=30, short=12)
TENANTS, BATCH, ROWS = 8, 2, 40
RANKS, RATES = (4, 8, 16, 32), (1e-3, 2e-3)


@dataclass(frozen=True)
class Trained:
    losses: list[float]
    logprobs: list[Any]

    def has_the_bits_of(self, other: "Trained") -> bool:
        pairs = zip(self.logprobs, other.logprobs, strict=True)
        return self.losses == other.losses and all(np.array_equal(a, b) for a, b in pairs)


def train(client: tinker.ServiceClient, settings: argparse.Namespace, tenant: int) -> Trained:
    """One tenant's run: it knows nothing of the others."""
    rank, peak = RANKS[tenant % len(RANKS)], RATES[tenant % len(RATES)]
    training = client.create_lora_training_client(
        settings.base, rank=rank, seed=settings.seed + tenant
    ).result()
    file = toys.write(
        settings.out / f"tenant-{tenant}.jsonl", toys.json_alpaca(toys.sums(ROWS, settings.seed + tenant))
    )
    examples = data.examples(data.read(file), Renderer.of(training))
    losses = []
    for step, batch in enumerate(Batches(examples, BATCH, settings.steps, settings.seed)):
        datums = [data.datum(example) for example in batch]
        forward_backward = training.forward_backward(datums, "cross_entropy")
        optim_step = training.optim_step(
            tinker.AdamParams(learning_rate=schedules.learning_rate(step, settings.steps, peak))
        )
        losses.append(forward_backward.result().metrics["loss:sum"] / data.counted(datums))
        optim_step.result()
    end = training.forward([data.datum(example) for example in examples[:BATCH]], "cross_entropy").result()
    return Trained(losses, [output["logprobs"].to_numpy() for output in end.loss_fn_outputs])


@contextmanager
def clients(settings: argparse.Namespace) -> Iterator[list[tinker.ServiceClient]]:
    """One for each tenant."""
    if address := service.in_environment():
        yield [tinker.ServiceClient(base_url=address[0], api_key=address[1]) for _ in range(settings.tenants)]
        return
    with service.embedded(settings.out, "--deterministic") as (url, _):
        keys = [service.new_key(settings.out, f"tenant-{n}") for n in range(settings.tenants)]
        yield [tinker.ServiceClient(base_url=url, api_key=key) for key in keys]


def parser() -> argparse.ArgumentParser:
    made = options.parser("tenants", __doc__, STEPS)
    made.add_argument("--tenants", type=int, default=TENANTS)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    settings = options.read(parser(), argv)
    numbers = range(settings.tenants)
    with clients(settings) as tenants, tracking.Tracker(settings.out, also=settings.track) as tracker:
        train(tenants[0], argparse.Namespace(**{**vars(settings), "steps": 1}), 0)  # the first call is slow
        started = time.perf_counter()
        alone = [train(tenants[n], settings, n) for n in numbers]
        between = time.perf_counter()
        with ThreadPoolExecutor(settings.tenants) as pool:
            together = list(pool.map(lambda n: train(tenants[n], settings, n), numbers))
        ended = time.perf_counter()
        for step in range(settings.steps):
            tracker.log(step, {f"tenant {n}": together[n].losses[step] for n in numbers})

    table = [
        {
            "tenant": n,
            "rank": RANKS[n % len(RANKS)],
            "loss first": together[n].losses[0],
            "loss last": together[n].losses[-1],
            "same bits": together[n].has_the_bits_of(alone[n]),
        }
        for n in numbers
    ]
    lines = {f"tenant {n}": tracker.line(f"tenant {n}") for n in numbers}
    title = f"{settings.tenants} tenants at once, {settings.base}"
    tracking.draw(settings.out / "curve.png", title, lines, xlabel="step", ylabel="loss per token")
    result = {
        "tenants_with_the_same_bits": sum(row["same bits"] for row in table),
        "tenants": settings.tenants,
        "seconds_alone": between - started,
        "seconds_together": ended - between,
        "times_as_fast": (between - started) / (ended - between),
    }
    tracking.write_result(settings.out, result, table)


if __name__ == "__main__":
    main()
