"""How a checkpoint knows inputs, and the work that is done on them, in every process that comes to it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, cast

from langchain_core.messages.base import TextAccessor
from langchain_core.runnables.base import (
    Runnable,
    RunnableBindingBase,
    RunnableGenerator,
    RunnableLambda,
    RunnableParallel,
    RunnableSequence,
)
from pydantic import BaseModel

from asyncify.forks import PROGRAM

__all__ = ["fingerprint", "work_of"]

_DIGEST_LENGTH = 32

# LangChain's text of a message, which is what StrOutputParser returns, is a string that says so when it is called.
_WRITTEN_AS_THEY_ARE = frozenset((str, TextAccessor, float, bool, bytes, type(None)))
_LONG_BITS = 2000  # Python may refuse to write longer ones in decimal digits
_SHORT_INT = 10**18


def fingerprint(value: object) -> str:
    """Return a text that is the same for equal inputs, in every process: a short input as it is written, or a digest.

    Raises:
        TypeError: the input is not made of strings, numbers, bools, None, bytes, lists, tuples and dicts.
    """
    if type(value) is int and -_SHORT_INT < value < _SHORT_INT:  # what `_canonical` would do, without a call
        return repr(value)
    written = _canonical(value)
    if len(written) < _DIGEST_LENGTH:
        return written
    return hashlib.blake2b(written.encode(), digest_size=_DIGEST_LENGTH // 2).hexdigest()


def _canonical(value: object) -> str:
    """Write a value so that two of different type or content never look alike."""
    kind = type(value)
    if kind is int:
        number = cast("int", value)
        return repr(number) if number.bit_length() < _LONG_BITS else hex(number)
    if kind in _WRITTEN_AS_THEY_ARE:
        return ascii(value)  # `repr` depends on the characters that a version of Python knows
    if kind is list or kind is tuple:
        parts = ",".join(map(_canonical, cast("Sequence[object]", value)))
        return f"[{parts}]" if kind is list else f"({parts})"
    if kind is dict:
        parts = ",".join(
            sorted(f"{_canonical(key)}:{_canonical(item)}" for key, item in cast("dict[object, object]", value).items())
        )
        return f"{{{parts}}}"
    raise TypeError(
        f"an input of type {kind.__name__} has no digest that is the same in every process; give key=, a function "
        "that returns a string for an input, as in key=lambda document: document.id"
    )


def work_of(runnable: object) -> str:
    """Name the work that a runnable does, so that a checkpoint can tell it from other work: all its parts, by name.

    A function's name is that of its module and class as well, as another may have a function of this name.

    A binding looks like what it binds, whose attributes it hands on: so its class is asked, not its attributes.
    """
    its: Any = runnable
    if isinstance(runnable, RunnableBindingBase):
        return work_of(its.bound) + _digests({**its.config.get("configurable", {}), **its.kwargs})
    if isinstance(runnable, RunnableSequence):
        return " | ".join(map(work_of, its.steps))
    if isinstance(runnable, RunnableParallel):
        return "{" + ", ".join(f"{name}: {work_of(branch)}" for name, branch in its.steps__.items()) + "}"
    name: str = its.get_name()
    if isinstance(runnable, RunnableLambda):
        fn = its.func if hasattr(its, "func") else its.afunc
        name = _place_of(getattr(its, "__wrapped__", fn)) + name + _digests(_fixed_in(fn))
    elif isinstance(runnable, RunnableGenerator):
        name = _place_of(its._transform if hasattr(its, "_transform") else its._atransform) + name
    parts = ", ".join(map(work_of, _parts_of(its)))
    return f"{name}({parts})" if parts else name


def _place_of(fn: object) -> str:
    """Return the module and the class that a function is written in, with a dot behind each.

    Of a partial, or an object that is called, also its own name: the runnable that is made of it does not have that.
    """
    has_name = hasattr(fn, "__name__")
    while isinstance(fn, partial):
        fn = fn.func
    written: Any = fn if hasattr(fn, "__qualname__") else type(fn)
    name = str(written.__qualname__)
    parts = (getattr(written, "__module__", None), name.rpartition(".")[0] if has_name else name)
    return "".join(f"{part}." for part in parts if part and part not in PROGRAM)


def _fixed_in(fn: object) -> dict[str, object]:
    """Return what a function has been given already: the arguments of a `partial`, the fields of a method's instance.

    Other instances than of dataclasses and pydantic models do not say which of their attributes they are known by.
    """
    if isinstance(fn, partial):
        given = {**{str(place): value for place, value in enumerate(fn.args)}, **fn.keywords}
        return {**_fixed_in(fn.func), **given}
    instance = getattr(fn, "__self__", None)
    if isinstance(instance, BaseModel):
        return dict(instance)
    if is_dataclass(instance) and not isinstance(instance, type):
        return {known.name: getattr(instance, known.name, None) for known in fields(instance)}
    return {}


def _digests(given: Mapping[str, object]) -> str:
    """Write arguments by their digests."""
    written = ", ".join(f"{name}={_digest(value)}" for name, value in sorted(given.items()))
    return f"({written})" if written else ""


def _parts_of(runnable: object) -> Iterator[Any]:
    """Yield the runnables in the fields of another one: what is mapped, the fallbacks, the branches."""
    kind: Any = type(runnable)
    found: list[Any] = [getattr(runnable, field, None) for field in getattr(kind, "model_fields", ())]
    found.reverse()  # the next is the last
    seen: set[int] = set()  # containers: one may hold itself
    while found:
        value = found.pop()
        if isinstance(value, Runnable):
            yield value
        elif (inside := _inside(value)) and id(value) not in seen:
            seen.add(id(value))
            found.extend(reversed(inside))


def _inside(value: Any) -> list[Any]:
    """Return what a container holds; of anything else nothing."""
    held: list[Any] = []
    if isinstance(value, dict):
        held[:] = value.values()
    elif isinstance(value, (list, tuple)):
        held[:] = cast("Sequence[Any]", value)
    return held


def _digest(value: object) -> str:
    """Return a digest of an argument, which may be a secret and is not to stand in a file; or else its type."""
    try:
        written = fingerprint(value)
    except (TypeError, RecursionError):
        return type(value).__name__
    return hashlib.blake2b(written.encode(), digest_size=8).hexdigest()
