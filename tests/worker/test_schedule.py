"""The scheduler alone: order within a run, fairness between tenants, gaps."""

import random

from tinsmith_worker.schedule import FORWARD, FORWARD_BACKWARD, OTHER, Item, Schedule


def schedule(pass_tokens: int = 100) -> Schedule:
    return Schedule(pass_tokens=pass_tokens, gap_seconds=10.0)


def item(run: str, seq: int, group: str = FORWARD_BACKWARD, tokens: int = 10, **more: object) -> Item:
    return Item(f"{run}-{seq}", run, seq, group, tokens if group != OTHER else 0, **more)  # type: ignore[arg-type]


def names(batch: list[Item]) -> list[str]:
    return [i.request_id for i in batch]


def test_operations_of_a_run_come_in_order_whatever_order_they_arrive_in() -> None:
    random_order = random.Random(0)
    for _ in range(50):
        plan = schedule()
        plan.open_run("a", "t", 1)
        groups = [random_order.choice([FORWARD, FORWARD_BACKWARD, OTHER]) for _ in range(12)]
        arriving = [item("a", seq, group) for seq, group in enumerate(groups, 1)]
        random_order.shuffle(arriving)
        seen: list[int] = []
        for one in arriving:
            plan.add(one, 0.0)
            if random_order.random() < 0.5:
                seen += [i.seq_id for i in plan.next_batch(0.0)]
        while batch := plan.next_batch(0.0):
            seen += [i.seq_id for i in batch]
        assert seen == list(range(1, 13))


def test_a_pass_takes_consecutive_forward_backwards_up_to_the_barrier() -> None:
    plan = schedule()
    plan.open_run("a", "t", 1)
    for one in (item("a", 1), item("a", 2), item("a", 3, OTHER), item("a", 4)):
        plan.add(one, 0.0)
    assert names(plan.next_batch(0.0)) == ["a-1", "a-2"]
    assert names(plan.next_batch(0.0)) == ["a-3"]
    assert names(plan.next_batch(0.0)) == ["a-4"]
    assert plan.next_batch(0.0) == []


def test_forwards_and_forward_backwards_do_not_share_a_pass() -> None:
    plan = schedule()
    for run, group in (("a", FORWARD), ("b", FORWARD_BACKWARD), ("c", FORWARD)):
        plan.open_run(run, f"tenant of {run}", 1)
        plan.add(item(run, 1, group), 0.0)
    assert names(plan.next_batch(0.0)) == ["a-1", "c-1"]
    assert names(plan.next_batch(0.0)) == ["b-1"]


def test_a_pass_holds_at_most_its_tokens_unless_one_operation_has_more() -> None:
    plan = schedule(pass_tokens=100)
    for run, tokens in (("a", 60), ("b", 60), ("c", 30), ("d", 500)):
        plan.open_run(run, f"tenant of {run}", 1)
        plan.add(item(run, 1, tokens=tokens), 0.0)
    assert names(plan.next_batch(0.0)) == ["a-1", "c-1"]
    assert names(plan.next_batch(0.0)) == ["b-1"]
    assert names(plan.next_batch(0.0)) == ["d-1"]


def test_what_must_be_alone_is_alone() -> None:
    plan = schedule()
    for run in "abc":
        plan.open_run(run, f"tenant of {run}", 1)
        plan.add(item(run, 1, alone=run == "b"), 0.0)
    assert names(plan.next_batch(0.0)) == ["a-1", "c-1"]
    assert names(plan.next_batch(0.0)) == ["b-1"]


def test_a_flooding_tenant_does_not_keep_another_waiting() -> None:
    plan = schedule(pass_tokens=100)
    plan.open_run("flood", "flooder", 1)
    for seq in range(1, 1001):
        plan.add(item("flood", seq, tokens=50), 0.0)
    for _ in range(20):
        plan.next_batch(0.0)
    plan.open_run("late", "newcomer", 1)
    plan.add(item("late", 1, tokens=50), 0.0)
    assert "late-1" in names(plan.next_batch(0.0))


def test_tokens_are_shared_evenly_between_tenants_of_unequal_appetite() -> None:
    plan = schedule(pass_tokens=100)
    served = {"big": 0, "small": 0}
    for tenant, runs in (("big", 5), ("small", 1)):
        for r in range(runs):
            plan.open_run(f"{tenant}{r}", tenant, 1)
            for seq in range(1, 101):
                plan.add(item(f"{tenant}{r}", seq, tokens=50), 0.0)
    for _ in range(50):
        for one in plan.next_batch(0.0):
            served[one.run_id[:-1]] += one.tokens
    assert served["small"] == served["big"]


def test_idleness_earns_no_credit() -> None:
    plan = schedule(pass_tokens=50)
    plan.open_run("a", "busy", 1)
    plan.open_run("b", "idle", 1)
    for seq in range(1, 200):
        plan.add(item("a", seq, tokens=50), 0.0)
    for _ in range(100):
        plan.next_batch(0.0)
    for seq in range(1, 100):
        plan.add(item("b", seq, tokens=50), 0.0)
    first = [one.run_id for _ in range(20) for one in plan.next_batch(0.0)]
    assert 9 <= first.count("a") <= 11


def test_who_had_the_worker_alone_owes_nothing_to_who_comes_after() -> None:
    plan = schedule(pass_tokens=100)
    for name in "ab":
        plan.open_run(name, f"tenant of {name}", 1)
    for seq in range(1, 51):
        plan.add(item("a", seq, tokens=100), 0.0)
    while plan.next_batch(0.0):
        pass
    for seq in range(1, 11):
        plan.add(item("b", seq, tokens=100), 0.0)
    assert names(plan.next_batch(0.0)) == ["b-1"]
    for seq in range(51, 61):
        plan.add(item("a", seq, tokens=100), 0.0)
    order = "".join(names(plan.next_batch(0.0))[0][0] for _ in range(10))
    assert order in ("ab" * 5, "ba" * 5)


def test_a_consumed_number_is_stepped_over() -> None:
    plan = schedule()
    plan.open_run("a", "t", 1)
    plan.add(item("a", 3), 0.0)
    plan.consume("a", 2, 0.0)
    assert plan.next_batch(0.0) == []
    plan.consume("a", 1, 0.0)
    assert names(plan.next_batch(0.0)) == ["a-3"]


def test_a_number_comes_only_once() -> None:
    plan = schedule()
    plan.open_run("a", "t", 1)
    assert plan.add(item("a", 1), 0.0)
    plan.next_batch(0.0)
    assert not plan.add(item("a", 1), 0.0)
    assert plan.next_batch(0.0) == []


def test_a_gap_is_given_up_after_its_time_and_not_before() -> None:
    plan = schedule()
    plan.open_run("a", "t", 1)
    plan.consume("a", 3, 0.0)
    plan.add(item("a", 4), 5.0)
    plan.add(item("a", 6), 6.0)
    assert plan.next_deadline() == 7.0
    assert (plan.stuck(6.9), plan.stuck(7.0), plan.stuck(8.0)) == ([], [("a", 1)], []), "looked for once"
    assert plan.next_deadline() == 15.0
    assert plan.overdue(14.9) == []
    assert plan.overdue(15.0) == [("a", [1, 2, 5], [4, 6])]
    assert plan.next_deadline() is None
    assert not plan.add(item("a", 2), 16.0)
    plan.add(item("a", 7), 17.0)
    assert names(plan.next_batch(17.0)) == ["a-7"]


def test_a_gap_that_closes_in_time_is_forgotten() -> None:
    plan = schedule()
    plan.open_run("a", "t", 1)
    plan.add(item("a", 2), 0.0)
    plan.add(item("a", 1), 9.0)
    assert plan.next_deadline() is None
    assert names(plan.next_batch(9.0)) == ["a-1", "a-2"]
    assert plan.overdue(100.0) == []


def test_a_flood_of_calls_without_a_pass_keeps_no_pass_waiting() -> None:
    schedule = Schedule(pass_tokens=100, gap_seconds=600)
    for number in range(300):
        schedule.open_run(f"a{number}", "flooding", 1)
        schedule.add(Item(f"a{number}", f"a{number}", 1, OTHER), 0.0)
    schedule.open_run("b", "other", 1)
    schedule.add(Item("b1", "b", 1, FORWARD_BACKWARD, 10), 0.0)
    first = schedule.next_batch(0.0)
    assert 0 < len(first) <= 8
    assert [item.run_id for item in schedule.next_batch(0.0)] == ["b"]
    left = 300 - len(first)
    while batch := schedule.next_batch(1.0):
        left -= len(batch)
    assert left == 0


def test_a_higher_priority_is_served_first_whatever_the_shares() -> None:
    schedule = Schedule(pass_tokens=10, gap_seconds=600)
    schedule.open_run("low", "l", 1, weight=1000.0)
    schedule.open_run("high", "h", 1, priority=1)
    for seq_id in range(1, 6):
        schedule.add(Item(f"l{seq_id}", "low", seq_id, FORWARD_BACKWARD, 10), 0.0)
        schedule.add(Item(f"h{seq_id}", "high", seq_id, FORWARD_BACKWARD, 10), 0.0)
    served = [schedule.next_batch(0.0)[0].run_id for _ in range(10)]
    assert served == ["high"] * 5 + ["low"] * 5


def test_what_leaves_a_copy_waits_while_the_archive_is_full_and_holds_up_no_other_run() -> None:
    schedule = Schedule(pass_tokens=10, gap_seconds=600)
    for run_id in ("a", "b"):
        schedule.open_run(run_id, "t", 1)
        schedule.add(Item(f"{run_id}1", run_id, 1, OTHER, copies=True), 0.0)
    schedule.open_run("c", "t", 1)
    schedule.add(Item("c1", "c", 1, FORWARD_BACKWARD, 10), 0.0)
    schedule.archive_is_full = True
    assert [item.run_id for item in schedule.next_batch(0.0)] == ["c"]
    assert not schedule.ready()
    schedule.archive_is_full = False
    assert [len(schedule.next_batch(0.0)) for _ in range(3)] == [1, 1, 0], "one copy, then look again"
