"""Looks at every state that a model can reach, breadth first, so that the way to a bad one is a shortest way.

    explore(model)      returns the number of states, or raises Counterexample

Two kinds of wrong are found: what a step itself refuses to do (it raises Violation), and states from which no way leads to an
end by steps that the model must take, which are all but its mishaps.
"""

from __future__ import annotations

import copy
import dataclasses
from array import array
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

S = TypeVar("S", bound=Hashable)
M = TypeVar("M")


class Violation(Exception):
    """A step that must be impossible. `label` names it."""

    def __init__(self, label: str, problem: str) -> None:
        super().__init__(problem)
        self.label = label


class Counterexample(Exception):
    def __init__(self, problem: str, trace: list[str]) -> None:
        super().__init__("\n".join([problem, *(f"{number:4}. {label}" for number, label in enumerate(trace, 1))]))
        self.problem = problem
        self.trace = trace


class Model(Protocol[S]):
    def start(self) -> S: ...

    def steps(self, state: S) -> Iterable[tuple[str, S, bool]]:
        """(label, next state, whether it is a mishap): what may happen in `state`. Raises Violation."""

    def is_end(self, state: S) -> bool:
        """Everything has come to its end, as it should."""


def explore(model: Model[S]) -> int:
    """The number of states, all of them good. Raises Counterexample."""
    states = [model.start()]
    number_of = {states[0]: 0}
    parents = array("l", [-1])
    # Steps that are no mishaps, as pairs of numbers.
    sources, targets = array("l"), array("l")
    number = 0
    while number < len(states):
        try:
            for _, state, is_mishap in model.steps(states[number]):
                target = number_of.setdefault(state, len(states))
                if target == len(states):
                    states.append(state)
                    parents.append(number)
                if not is_mishap:
                    sources.append(number)
                    targets.append(target)
        except Violation as violation:
            raise Counterexample(str(violation), [*_trace(model, states, parents, number), violation.label]) from None
        number += 1
    stuck = _first_stuck([model.is_end(state) for state in states], sources, targets)
    if stuck is not None:
        raise Counterexample("from here on, nothing leads to the end", _trace(model, states, parents, stuck))
    return len(states)


def _first_stuck(is_good: list[bool], sources: array[int], targets: array[int]) -> int | None:
    """The first state without a way to an end. `is_good` starts as the ends, and is changed."""
    before: list[list[int]] = [[] for _ in is_good]
    for source, target in zip(sources, targets, strict=True):
        before[target].append(source)
    todo = [number for number, good in enumerate(is_good) if good]
    while todo:
        for number in before[todo.pop()]:
            if not is_good[number]:
                is_good[number] = True
                todo.append(number)
    return next((number for number, good in enumerate(is_good) if not good), None)


def _trace(model: Model[S], states: list[S], parents: array[int], number: int) -> list[str]:
    """The labels of the way to a state."""
    labels: list[str] = []
    while (parent := parents[number]) >= 0:
        labels.append(next(label for label, state, _ in model.steps(states[parent]) if state == states[number]))
        number = parent
    return labels[::-1]


class Numbered(Generic[M]):
    """Objects known by numbers, equal ones by the same, so that states made of them are small and quickly compared.

    `key` says what an object consists of. Objects that were numbered must not be changed.
    """

    def __init__(self, key: Callable[[M], Hashable]) -> None:
        self._key = key
        self._numbers: dict[Hashable, int] = {}
        self._objects: list[M] = []
        self._steps: dict[Hashable, tuple[int, Any]] = {}

    def number(self, item: M) -> int:
        number = self._numbers.setdefault(self._key(item), len(self._objects))
        if number == len(self._objects):
            self._objects.append(item)
        return number

    def __getitem__(self, number: int) -> M:
        return self._objects[number]

    def __iter__(self) -> Iterator[M]:
        return iter(self._objects)

    def step(self, number: int, action: Callable[..., Any], *arguments: Hashable) -> tuple[int, Any]:
        """`action` on a copy of the object: what becomes of it, and what is returned. Really run once, then remembered."""
        known = self._steps.get((number, action, arguments))
        if known is None:
            changed = copy.deepcopy(self._objects[number])
            result = action(changed, *arguments)
            known = self._steps[number, action, arguments] = (self.number(changed), result)
        return known


def content_of(item: object, leaf: Callable[[object], Hashable | None] = lambda _: None) -> Hashable:
    """A dataclass's fields, or a container's items, all the way down to where `leaf` has an answer."""
    if (answer := leaf(item)) is not None:
        return answer
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return tuple(content_of(getattr(item, part.name), leaf) for part in dataclasses.fields(item))
    if isinstance(item, dict):
        return tuple((content_of(key, leaf), content_of(value, leaf)) for key, value in item.items())
    if isinstance(item, list | tuple):
        return tuple(content_of(part, leaf) for part in item)
    assert isinstance(item, Hashable)
    return item
