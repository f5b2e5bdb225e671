"""How ranks join their steps: in threads, with collectives that are counted."""

from __future__ import annotations

import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from tmm.core.metrics import FloatArray, builtin_reductions, finalize
from tmm.runtime.ranks.joined_rows import on_the_wire
from tmm.runtime.ranks.protocol import (
    CrossRank,
    Exchange,
    NotJoinedError,
    RanksDisagreeError,
    RanksLostError,
    Turn,
)

(RMS,) = builtin_reductions(("rms", "max"), is_complex=False)
(STD,) = builtin_reductions(("std",), is_complex=False)


class World:
    """Ranks in threads; a collective waits for all, and fails for all if they do not agree."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: Counter[str] = Counter()
        self._barrier = threading.Barrier(size, timeout=20)
        self._given: dict[int, tuple[str, Any]] = {}

    def call(self, rank: int, name: str, value: Any, join: Callable[[list[Any]], Any]) -> Any:
        self._given[rank] = (name, value)
        self._barrier.wait()
        names = {given for given, _ in self._given.values()}
        assert len(names) == 1, names
        values = [self._given[other][1] for other in range(self.size)]
        if isinstance(value, np.ndarray):
            assert len({len(other) for other in values}) == 1
        result = join(values)
        self._barrier.wait()
        if rank == 0:
            self.calls[name] += 1
        return result

    def wait_until_called(self) -> None:
        while not self._barrier.n_waiting:
            time.sleep(0.001)


@dataclass
class Member:
    world: World
    rank: int

    def maximum(self, values: FloatArray) -> FloatArray:
        assert not np.isnan(values).any()
        return self.world.call(self.rank, "maximum", values, lambda all_: np.max(all_, axis=0))

    def total(self, values: FloatArray) -> FloatArray:
        return self.world.call(self.rank, "total", values, lambda all_: np.sum(all_, axis=0))

    def everything(self, value: object) -> list[object]:
        return self.world.call(self.rank, "everything", value, list)

    def payloads(self, value: bytes, size: int) -> list[bytes]:
        padded = value + bytes(size - len(value))
        found = self.world.call(self.rank, "payloads", padded, list)
        return found if self.rank == 0 else []

    def close(self) -> None:
        pass


@dataclass
class Step:
    step: int
    values: dict[str, FloatArray] = field(default_factory=dict)
    payload: bytes = b""
    fails: bool = False
    reduction: Any = RMS

    def contribution(self) -> Exchange | None:
        if self.fails:
            return None
        rows = [_row(values, self.reduction) for values in self.values.values()]
        kinds = {}
        if rows:
            kinds = {on_the_wire(self.reduction): (tuple(self.values), np.stack(rows))}
        return Exchange(kinds, (self.payload,))


def _row(values: FloatArray, reduction: Any) -> FloatArray:
    deviation = values - values.mean()
    columns = {
        "count": len(values),
        "sum_squares": (values**2).sum(),
        "maximum": values.max(),
        "mean": values.mean(),
        "moment2": (deviation**2).sum(),
    }
    return np.array([columns[name] for name in reduction.columns])


def run(ranks: list[list[Step]]) -> tuple[World, list[list[Any]]]:
    """Join the steps of each rank; gives what came of each, or the exception."""
    world = World(len(ranks))
    results: list[list[Any]] = [[] for _ in ranks]

    def work(rank: int) -> None:
        joining = CrossRank(Member(world, rank), end_seconds=20)
        turns = [joining.submit(step) for step in ranks[rank]]
        joining.close()
        for turn in turns:
            try:
                results[rank].append(turn.wait())
            except NotJoinedError as error:
                results[rank].append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return world, results


def value(result: Any, site: str, reduction: Any = RMS) -> list[float]:
    sites, rows = result.rows[on_the_wire(reduction)]
    return finalize(reduction, rows[[sites.index(site)]])[0].tolist()


A, B = np.array([1.0, 2.0]), np.array([5.0])


def test_a_step_takes_a_maximum_and_a_sum() -> None:
    steps = [[Step(n, {"a": part}) for n in range(10)] for part in (A, B)]
    world, results = run(steps)
    for rank in (0, 1):
        for result in results[rank]:
            assert value(result, "a") == [pytest.approx(np.sqrt(10)), 5.0]
    # The first step agrees on the rows; the last maximum tells that all have ended.
    assert world.calls == {"maximum": 10 + 1 + 1, "total": 10, "everything": 1}


def test_central_moments_take_another_sum() -> None:
    steps = [[Step(n, {"a": part}, reduction=STD) for n in range(5)] for part in (A, B)]
    world, results = run(steps)
    expected = np.concatenate([A, B]).std(ddof=1)
    assert value(results[0][4], "a", STD) == [pytest.approx(expected)]
    assert world.calls["total"] == 10


def test_functions_that_need_all_values_take_a_gather() -> None:
    steps = [
        [Step(0, {"a": A}, payload=b"x"), Step(1)],
        [Step(0, {"a": B}, payload=b"yz"), Step(1)],
    ]
    world, results = run(steps)
    assert results[0][0].payloads == (b"x\0", b"yz")
    assert results[1][0].payloads == ()
    assert world.calls["payloads"] == 1


def test_ranks_that_skip_steps_or_end_earlier_keep_nobody_waiting() -> None:
    first = [Step(n, {"a": A}) for n in (0, 1, 2, 5, 6)]
    second = [Step(n, {"a": B}) for n in (0, 2, 3)]
    _, results = run([first, second, []])
    assert [value(result, "a")[1] for result in results[0]] == [5.0, 2.0, 5.0, 2.0, 2.0]
    assert [value(result, "a")[1] for result in results[1]] == [5.0, 5.0, 5.0]


def test_a_rank_that_never_closes_does_not_keep_the_others() -> None:
    world = World(2)
    first = CrossRank(Member(world, 0), linger_seconds=0.2)
    second = CrossRank(Member(world, 1), linger_seconds=0.2)
    turn, other = first.submit(Step(0, {"a": A})), second.submit(Step(0, {"a": B}))
    first.close()
    assert value(turn.wait(), "a") == value(other.wait(), "a")
    late = second.submit(Step(1, {"a": B}))  # the thread of the first takes part
    assert value(late.wait(), "a")[1] == 5.0
    second.close()


def test_rows_that_come_later_or_on_one_rank_only() -> None:
    first = [Step(0, {"a": A}), Step(1, {"a": A}), Step(2, {"b": A, "a": A})]
    second = [Step(0, {"a": B}), Step(1, {"c": B}), Step(2, {"a": B, "b": B})]
    _, results = run([first, second])
    last = results[1][2]
    assert value(last, "b") == value(last, "a") == value(results[0][0], "a")
    sites, rows = last.rows[on_the_wire(RMS)]
    assert rows[sites.index("c"), 0] == 0  # nothing of it in this step


def test_a_rank_that_fails_takes_the_step_from_all() -> None:
    first = [Step(0, {"a": A}), Step(1, {"a": A}), Step(2, {"a": A})]
    second = [Step(0, {"a": B}), Step(1, {"a": B}, fails=True), Step(2, {"a": B})]
    _, results = run([first, second])
    for rank in (0, 1):
        assert isinstance(results[rank][1], RanksDisagreeError)
        assert value(results[rank][2], "a")[1] == 5.0


def test_different_rows_are_named_on_all_ranks() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, results = run([[Step(0, {"a": A})], [Step(0, {"a": B}, reduction=STD)]])
    for rank in (0, 1):
        assert "rank 1 measures 'a' as std (joined), and other ranks as rms" in str(
            results[rank][0]
        )
    assert any("the training goes on" in str(item.message).lower() for item in caught)


def test_a_rank_that_dies_does_not_hang_the_others() -> None:
    class Lost(Member):
        def maximum(self, values: FloatArray) -> FloatArray:
            raise ConnectionError("connection reset by peer")

    joining = CrossRank(Lost(World(1), 0))
    with pytest.warns(RuntimeWarning, match="The training goes on"):
        turn = joining.submit(Step(0, {"a": A}))
        with pytest.raises(RanksLostError, match="connection reset"):
            turn.wait()
    later = joining.submit(Step(1, {"a": A}))
    with pytest.raises(RanksLostError, match="connection reset"):
        later.wait()
    joining.close()


def test_ranks_that_are_behind_cost_steps_their_rows_and_nobody_time() -> None:
    world = World(2)
    first = CrossRank(Member(world, 0), capacity=3, linger_seconds=0.1)
    turns = [first.submit(Step(0, {"a": A}))]
    world.wait_until_called()
    turns += [first.submit(Step(n, {"a": A})) for n in range(1, 8)]
    for turn in turns[:5]:
        with pytest.raises(RanksLostError, match="3 monitored steps behind"):
            turn.wait()
    assert first.behind == "the other ranks are 3 monitored steps behind"
    second = CrossRank(Member(world, 1))
    others = [second.submit(Step(n, {"a": B})) for n in range(8)]
    first.close()
    second.close()
    assert [value(turn.wait(), "a")[1] for turn in turns[5:]] == [5.0, 5.0, 5.0]
    # The first of them was under way; of the others that were given up, nothing is joined.
    assert [value(turn.wait(), "a")[1] for turn in others] == [5.0] * 8
    assert [turn.wait().rows[on_the_wire(RMS)][1][0, 0] for turn in others] == [
        *(3, 1, 1, 1, 1),
        *(3, 3, 3),
    ]


def test_a_step_is_given_up_when_others_are_late() -> None:
    joining = CrossRank(Member(World(2), 0), end_seconds=0.1)
    turn = joining.submit(Step(0, {"a": A}))
    with pytest.raises(RanksLostError, match="more than 0 s late"):
        turn.wait(0.05)
    with pytest.raises(RanksLostError, match="more than 0 s late"):
        turn.wait()  # what was said is not taken back
    assert "late" in joining.behind
    waiting = joining.submit(Step(1, {"a": A}))
    begun = time.monotonic()
    with pytest.warns(RuntimeWarning, match="rows of this rank alone, marked as partial"):
        joining.close()
    assert time.monotonic() - begun < 5
    with pytest.raises(RanksLostError, match="late"):
        waiting.wait()


def test_a_rank_whose_training_fails_does_not_wait_for_others() -> None:
    """They may be waiting for it, until its process ends."""
    joining = CrossRank(Member(World(2), 0), end_seconds=60, linger_seconds=0.1)
    turn = joining.submit(Step(0, {}))
    begun = time.monotonic()
    with pytest.warns(RuntimeWarning, match="cannot be joined any more"):
        joining.close(has_failed=True)
    assert time.monotonic() - begun < 10
    with pytest.raises(RanksLostError, match="the other ranks were 0 s late"):
        turn.wait()


def test_a_contribution_is_asked_for_once() -> None:
    asked = []

    class Counted(Step):
        def contribution(self) -> Exchange | None:
            asked.append(self.step)
            return super().contribution()

    turn = Turn(Counted(0, {"a": A}))
    threads = [threading.Thread(target=turn.contribution) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == [0]
