"""Who samples next: requests between the intake and the sampler, with a sampler that grows a token a step."""

import base64
import threading
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from tests.servers import wait_until
from tinsmith.wire import tinsmith_pb2 as pb
from tinsmith_api.journal import operations as ops
from tinsmith_api.journal.operations import Operation
from tinsmith_worker.contract import (
    AdapterState,
    Failure,
    LoraSpec,
    SampledPiece,
    SampledSequence,
    SampleInput,
    SampleOutput,
    TopK,
)
from tinsmith_worker.intake import Intake, SampleArrived, WeightsRead
from tinsmith_worker.outbox import Outbox
from tinsmith_worker.sampling import Sampling
from tinsmith_worker.streaming import PIECES_AT_MOST, Streaming

TOKENS = 10


class Growing:
    """At most 256 sequences at once, the others in the order of their arrival; each takes TOKENS steps."""

    def __init__(self) -> None:
        self.waiting: list[SampleInput] = []
        self.most_sequences = 256
        self.growing: dict[str, tuple[SampleInput, int]] = {}
        self.held: dict[str, AdapterState] = {}

    def hold(self, sampler_id: str, state: AdapterState) -> None:
        self.held[sampler_id] = state

    def holds(self, sampler_id: str) -> bool:
        return sampler_id in self.held

    def release(self, sampler_id: str) -> None:
        assert all(g.sampler_id != sampler_id for g, _ in self.growing.values())
        del self.held[sampler_id]

    def add(self, given: SampleInput) -> None:
        assert not given.sampler_id or given.sampler_id in self.held
        self.waiting.append(given)

    def cancel(self, request_id: str) -> None:
        self.growing.pop(request_id, None)

    def pieces(self) -> list[SampledPiece]:
        nothing = SampledSequence(np.zeros(0, np.int32), np.zeros(0, np.float32), stopped=False)
        return [
            SampledPiece(request_id, 0, TOKENS - left, nothing, ends=False)
            for request_id, (given, left) in self.growing.items()
            if given.is_streamed
        ]

    def step(self) -> list[SampleOutput | tuple[str, Failure]]:
        while self.waiting and sum(g.num_samples for g, _ in self.growing.values()) < 256:
            given = self.waiting.pop(0)
            # As if they had begun at different times.
            self.growing[given.request_id] = (given, TOKENS - len(self.growing) % TOKENS)
        done: list[SampleOutput | tuple[str, Failure]] = []
        for request_id, (given, left) in list(self.growing.items()):
            self.growing[request_id] = (given, left - 1)
            if left == 1:
                del self.growing[request_id]
                sequence = SampledSequence(np.zeros(1, np.int32), np.zeros(1, np.float32), stopped=False)
                done.append(SampleOutput(request_id, [sequence] * given.num_samples))
        return done

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.growing)


class Ends:
    """What is around it: the intake that reads weights when told to, and the outbox."""

    def __init__(self) -> None:
        self.sampling: set[str] = set()
        self.asked: list[str] = []
        self.finished: list[str] = []
        self.suspected: list[str] = []
        self.busy_with: Callable[[], bool] = lambda: False
        self.failed: dict[str, str] = {}

    def read_weights(self, object_prefix: str) -> None:
        self.asked.append(object_prefix)

    def result(self, operation: Operation, body: Callable[[], bytes], **_: object) -> None:
        self.finished.append(operation.request_id)

    def failure(self, operation: Operation, failure: Failure) -> None:
        self.failed[operation.request_id] = failure.message

    def announce(self, operation: Operation) -> None: ...

    def suspect(self, operation: Operation) -> bool:
        assert not self.busy_with(), "it is tried alone"
        self.suspected.append(operation.request_id)
        return operation.request_id != "moved"


def sampling(**settings: Any) -> tuple[Sampling, Growing, Ends]:
    sampler, ends = Growing(), Ends()
    ends.busy_with = lambda: sampler.busy
    settings = {"suspect": ends.suspect, "stream": lambda *_: None, "samplers_held": 2, **settings}
    made = Sampling(sampler, cast(Intake, ends), cast(Outbox, ends), **settings)
    return made, sampler, ends


def arrived(
    request_id: str,
    tenant: str,
    *,
    prefix: str = "",
    num_samples: int = 1,
    deaths: int = 0,
    stream_to: str = "",
) -> SampleArrived:
    task = pb.SampleTask(object_prefix=prefix, num_samples=num_samples, stream_to=stream_to)
    given = SampleInput(
        request_id, prefix, np.zeros(1, np.int32), num_samples, TOKENS, 1, is_streamed=bool(stream_to)
    )
    operation = Operation("s", 1, ops.SAMPLE, tenant, "m", request_id=request_id, deaths=deaths)
    return SampleArrived(operation, task, given)


def step(made: Sampling) -> None:
    made.decode(until=0.0)


WEIGHTS = AdapterState(LoraSpec(1, 1), (), np.zeros(1, np.float32))


def test_tokens_go_to_whoever_reads_them_until_the_sample_is_given_up() -> None:
    sent: list[tuple[str, str, int]] = []
    made, _, ends = sampling(stream=lambda to, request_id, pieces: sent.append((to, request_id, len(pieces))))
    for request_id, to in (("a", "one"), ("b", "two"), ("c", "")):
        made.begin(arrived(request_id, "t", stream_to=to))
    step(made)
    assert sent == [("one", "a", 1), ("two", "b", 1)]
    made.cancel("b")
    sent.clear()
    step(made)
    assert sent == [("one", "a", 1)]
    while made.busy:
        step(made)
    assert sorted(ends.finished) == ["a", "c"]


def streamed(sent: Sequence[tuple[str, ...]]) -> list[pb.SampledPiece]:
    return [p for words in list(sent) for p in pb.SampledPieces.FromString(base64.b64decode(words[3])).pieces]


def test_tokens_that_nobody_takes_keep_nobody_waiting_and_are_left_out() -> None:
    may_send, sent = threading.Event(), []

    def send(*words: str) -> None:
        may_send.wait()
        sent.append(words)

    streaming = Streaming(send)
    token = SampledSequence(np.full(1, 7, np.int32), np.zeros(1, np.float32), stopped=False)
    for number in range(2 * PIECES_AT_MOST):
        streaming.send("api", "r", [SampledPiece("r", 0, number, token, ends=False)])
    may_send.set()
    wait_until(lambda: len(streamed(sent)) == PIECES_AT_MOST, 20)
    assert {words[:3] for words in sent} == {("piece", "api", "r")}
    found = streamed(sent)
    assert [piece.start for piece in found] == list(range(len(found))), "the last ones are left out"
    assert (found[0].sequence.tokens, found[0].ends) == (token.tokens.tobytes(), False)


def test_a_moment_in_which_no_tokens_are_taken_leaves_no_gap() -> None:
    """A reader passes over all that comes after one."""
    may_send, sent = threading.Event(), []

    def send(*words: str) -> None:
        may_send.wait()
        sent.append(words)

    streaming = Streaming(send)
    token = SampledSequence(np.full(1, 7, np.int32), np.zeros(1, np.float32), stopped=False)
    for number in range(50):  # steps, of a hundred streams
        for request in range(100):
            name = f"r{request}"
            streaming.send("api", name, [SampledPiece(name, 0, number, token, ends=False)])
    may_send.set()
    wait_until(lambda: len(streamed(sent)) == 5000, 20)
    for request in range(100):
        of_request = streamed([words for words in sent if words[2] == f"r{request}"])
        assert [piece.start for piece in of_request] == list(range(50))


def test_no_line_of_tokens_is_longer_than_who_reads_it_takes() -> None:
    """While a worker trains, seconds of what another process samples gather."""
    sent: list[tuple[str, ...]] = []
    streaming = Streaming(lambda *words: sent.append(words))
    token = SampledSequence(
        np.full(1, 7, np.int32),
        np.zeros(1, np.float32),
        stopped=False,
        topk=TopK(np.zeros((1, 20), np.int32), np.zeros((1, 20), np.float32)),
    )
    many = [SampledPiece("r", n % 128, n // 128, token, ends=False) for n in range(128 * 64)]
    streaming.send("api", "r", many)
    wait_until(lambda: len(streamed(sent)) == len(many), 10)
    found = streamed(sent)
    assert [(p.index, p.start) for p in found] == [(p.index, p.start) for p in many]
    assert max(len(words[3]) for words in sent) <= 1 << 17


def test_a_thousand_requests_of_one_tenant_do_not_double_another_s_wait() -> None:
    made, _, ends = sampling()
    for number in range(1000):
        made.begin(arrived(f"a{number}", "flooding"))
    for _ in range(20):
        step(made)
    made.begin(arrived("b", "other"))
    steps = 0
    while "b" not in ends.finished:
        step(made)
        steps += 1
    assert steps < 2 * TOKENS, steps
    while made.busy:
        step(made)
    assert len(ends.finished) == 1001
    assert not made._sequences


def test_weights_are_read_once_for_all_that_wait_for_them_and_failures_are_theirs_alone() -> None:
    made, sampler, ends = sampling()
    for name in ("x", "y"):
        for number in range(3):
            made.begin(arrived(f"{name}{number}", "t", prefix=name))
    made.begin(arrived("base", "t"))
    assert ends.asked == ["x", "y"]
    step(made)
    made.weights_read(WeightsRead("x", WEIGHTS))
    made.weights_read(WeightsRead("y", None, Failure("gone")))
    while made.busy:
        step(made)
    assert sorted(ends.finished) == ["base", "x0", "x1", "x2"]
    assert ends.failed == dict.fromkeys(("y0", "y1", "y2"), "gone")
    assert list(sampler.held) == ["x"]


def test_weights_that_nobody_samples_are_let_go_of_and_read_again_when_somebody_does() -> None:
    made, sampler, ends = sampling(samplers_held=2)
    for name in ("x", "y", "z", "x"):
        made.begin(arrived(f"{name}{len(ends.asked)}", "t", prefix=name))
        made.weights_read(WeightsRead(name, WEIGHTS))
        while made.busy:
            step(made)
    assert ends.asked == ["x", "y", "z", "x"]
    assert list(sampler.held) == ["z", "x"]


def test_a_request_larger_than_all_places_is_let_in_alone() -> None:
    made, _, ends = sampling()
    made.begin(arrived("small", "t"))
    made.begin(arrived("large", "u", num_samples=1000))
    made.begin(arrived("next", "v"))
    while made.busy:
        step(made)
    assert sorted(ends.finished) == ["large", "next", "small"]


def test_a_request_whose_workers_died_is_tried_alone_and_on_record_and_given_up_at_the_fourth_death() -> None:
    made, sampler, ends = sampling()
    made.begin(arrived("before", "t"))
    made.begin(arrived("deadly", "t", deaths=4))
    made.begin(arrived("suspect", "t", deaths=2, num_samples=3))
    made.begin(arrived("moved", "t", deaths=3))
    made.begin(arrived("cancelled", "t", deaths=2))
    made.begin(arrived("after", "t"))
    made.cancel("cancelled")
    assert "4 worker processes ended" in ends.failed["deadly"]
    assert not ends.suspected, "somebody else is under way"
    while "before" not in ends.finished:
        step(made)
    # The step that ended it went on: no pass of training comes in between.
    assert ends.finished == ["before", "suspect"]
    assert [g.request_id for g in sampler.waiting] == ["after"]
    while made.busy:
        step(made)
    assert ends.suspected == ["suspect", "moved"]
    assert ends.finished == ["before", "suspect", "after"]
    assert not made._sequences
