"""Attributes that hold something else for a while are given back exactly."""

from __future__ import annotations

import copy
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tmm.core.replacement import Replacement, Substitutes


class Base:
    inherited = "of the base"


class Guarded(Base):
    """Refuses what does not go past ``__setattr__``."""

    shown = "of the class"

    def __setattr__(self, name: str, value: object) -> None:
        raise AssertionError(name)


def owners() -> dict[str, object]:
    held = Guarded()
    vars(held)["shown"] = "own"
    module = types.ModuleType("owner")
    vars(module)["shown"] = "own"
    return {
        "instance without it": Guarded(),
        "instance with it": held,
        "class": type("Derived", (Base,), {"shown": "own"}),
        "module": module,
    }


@pytest.fixture(params=owners())
def owner(request: pytest.FixtureRequest) -> object:
    return owners()[request.param]


@pytest.mark.parametrize("name", ["shown", "inherited", "unknown"])
def test_what_was_there_is_given_back(owner: object, name: str) -> None:
    before = dict(vars(owner))
    for value in (1, None, before.get(name)):
        with Replacement(owner, name, value) as replacement:
            assert getattr(owner, name) is value
            assert vars(owner)[name] is value is replacement.current()
            assert replacement.stands
        assert dict(vars(owner)) == before
        assert list(vars(owner)) == list(before)


def test_it_is_given_back_after_an_exception(owner: object) -> None:
    before = dict(vars(owner))
    with pytest.raises(ZeroDivisionError), Replacement(owner, "shown", 1):
        _ = 1 / 0
    assert dict(vars(owner)) == before


def test_an_own_none_is_not_absence() -> None:
    owner = types.SimpleNamespace(call=None)
    replacement = Replacement(owner, "call", 1)
    replacement.restore()
    assert vars(owner) == {"call": None}
    with Replacement(owner, "other", None):
        assert vars(owner) == {"call": None, "other": None}
    assert vars(owner) == {"call": None}


def test_nothing_is_put_before_it_is_asked_for(owner: object) -> None:
    before = dict(vars(owner))
    replacement = Replacement(owner, "unknown")
    assert replacement.stands
    assert dict(vars(owner)) == before
    for value in "abc":
        replacement.put(value)
        assert vars(owner)["unknown"] == value
    replacement.restore()
    replacement.restore()
    assert dict(vars(owner)) == before


def test_what_came_in_the_place_since_is_told(owner: object) -> None:
    before = dict(vars(owner))
    replacement = Replacement(owner, "shown", 1)
    later = Replacement(owner, "shown", 2)
    assert not replacement.stands
    assert not replacement.restore_if_it_stands()
    assert vars(owner)["shown"] == 2
    later.restore()
    assert replacement.stands
    assert replacement.restore_if_it_stands()
    assert dict(vars(owner)) == before


def test_what_was_deleted_since_stays_deleted_unless_it_is_given_back() -> None:
    owner = types.SimpleNamespace(call="own")
    replacement = Replacement(owner, "call", 1)
    del owner.call
    assert replacement.current("nothing") == "nothing"
    assert not replacement.restore_if_it_stands()
    assert vars(owner) == {}
    replacement.restore()
    assert vars(owner) == {"call": "own"}
    replacement = Replacement(owner, "other", 1)
    del owner.other
    replacement.restore()
    assert vars(owner) == {"call": "own"}


def test_a_copy_gives_back_the_same_absence() -> None:
    owner = types.SimpleNamespace()
    copied = copy.deepcopy(Replacement(owner, "call", 1))
    copied.restore()
    assert copied.current("nothing") == "nothing"
    assert vars(owner) == {"call": 1}


_NAMES = ("shown", "inherited", "unknown")
_VALUES = st.sampled_from([None, 0, "x", "own"])


@given(st.sampled_from(sorted(owners())), st.lists(st.tuples(st.sampled_from(_NAMES), _VALUES)))
def test_any_nesting_is_undone_from_the_inside(kind: str, nested: list[tuple[str, object]]) -> None:
    owner = owners()[kind]
    states, replacements = [dict(vars(owner))], []
    for name, value in nested:
        replacements.append(Replacement(owner, name, value))
        assert vars(owner)[name] is value
        states.append(dict(vars(owner)))
    while replacements:
        assert dict(vars(owner)) == states.pop()
        assert replacements.pop().restore_if_it_stands()
    assert dict(vars(owner)) == states.pop()


_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("replace"), st.integers(0, 9)),
        st.tuples(st.just("put"), st.integers(0, 9)),
        st.tuples(st.just("take"), st.integers(0, 9)),
        st.tuples(st.just("restore"), st.integers(0, 9)),
        st.tuples(st.just("restore if it stands"), st.integers(0, 9)),
    ),
    max_size=30,
)


@given(st.sampled_from(sorted(owners())), _STEPS)
def test_any_order_does_what_is_said(kind: str, steps: list[tuple[str, int]]) -> None:
    """Against a model: each one knows what it found and what it put; nobody guesses."""
    owner, absent = owners()[kind], object()
    now: object = vars(owner).get("shown", absent)
    replacements: list[Replacement] = []
    known: list[list[object]] = []  # what each found, and what it put
    for step, number in steps:
        value = object()
        if step == "replace":
            replacements.append(Replacement(owner, "shown", value))
            known.append([now, value])
            now = value
        elif step == "take":  # by somebody else
            if isinstance(owner, type):
                owner.shown = value  # type: ignore[attr-defined]
            else:
                vars(owner)["shown"] = value
            now = value
        elif replacements:
            index = number % len(replacements)
            found, put = known[index]
            if step == "put":
                replacements[index].put(value)
                known[index][1] = now = value
            else:
                assert replacements[index].stands == (put is now)
                if step == "restore":
                    replacements[index].restore()
                    known[index][1] = now = found
                elif replacements[index].restore_if_it_stands():
                    assert put is now
                    known[index][1] = now = found
                else:
                    assert put is not now
        assert vars(owner).get("shown", absent) is now


def test_substitutes_come_and_go_together() -> None:
    first, second = types.SimpleNamespace(a=1), types.SimpleNamespace()
    substitutes = Substitutes()
    substitutes.add(first, "a", 2)
    substitutes.add(second, "b", 3)
    substitutes.add(first, "a", 4)
    for _ in range(2):
        substitutes.install()
        substitutes.install()
        assert (vars(first), vars(second)) == ({"a": 4}, {"b": 3})
        substitutes.remove()
        substitutes.remove()
        assert (vars(first), vars(second)) == ({"a": 1}, {})
