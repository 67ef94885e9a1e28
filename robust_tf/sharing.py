"""Objects that the jobs of one process share, such as a loaded source or a traced function.

A single job needs nothing of this: without `sharing()` every object is made anew. A program that runs many similar jobs
in one process, such as a study, saves most of their time by it. What a job computes is the same either way.
"""

import collections
import contextlib
import contextvars
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar

Shared = TypeVar("Shared")

# Number of trainers, and of functions traced for their classifiers, that a process keeps. Each holds a whole network.
MOST_TRAINERS = 2

_current: contextvars.ContextVar["collections.OrderedDict[tuple[Hashable, ...], Any] | None"] = contextvars.ContextVar(
    "shared_objects", default=None
)
_most: contextvars.ContextVar[int] = contextvars.ContextVar("most_shared_objects", default=0)


@contextlib.contextmanager
def sharing(
    most: int = 32, *, objects: "collections.OrderedDict[tuple[Hashable, ...], Any] | None" = None
) -> Iterator[None]:
    """Returns a context in which `shared` keeps the objects that it makes.

    Args:
        most: Number of objects that are kept. The least recently used ones are dropped.
        objects: Dictionary for the objects, for a caller that opens several such contexts one after another. With None
            the objects are dropped at the end of the context.

    Example:
        >>> made = []
        >>> with sharing():
        ...     one = shared(("list",), lambda: made.append(1) or [])
        ...     other = shared(("list",), lambda: made.append(1) or [])
        >>> one is other, len(made)
        (True, 1)
    """
    current = _current.set(collections.OrderedDict() if objects is None else objects)
    number = _most.set(most)
    try:
        yield
    finally:
        _current.reset(current)
        _most.reset(number)


def is_sharing() -> bool:
    """Returns whether `shared` keeps objects now."""
    return _current.get() is not None


def shared(key: tuple[Hashable, ...], make: Callable[[], Shared], *, most: int | None = None) -> Shared:
    """Returns the object of a key, which an earlier job of this process may have made. Nobody may change it.

    Args:
        key: The kind of the object, then everything on which the object depends.
        make: Function that makes the object.
        most: Number of objects of this kind that are kept, for a kind that takes much memory. None means no limit of
            its own.
    """
    objects = _current.get()
    if objects is None:
        return make()
    if key not in objects:
        objects[key] = make()
        same_kind = [other for other in objects if other[0] == key[0]]
        for oldest in same_kind[:-most] if most else []:
            del objects[oldest]
        if len(objects) > _most.get():
            objects.popitem(last=False)
    objects.move_to_end(key)
    value: Shared = objects[key]
    return value
