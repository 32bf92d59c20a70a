"""A call that leaves the process: its function goes by name, its error comes back in a form that survives pickling.

Any `concurrent.futures.Executor` may run it. Executors can't be given the plain function: `pickle` refuses a function
whose name now leads to the pair made from it, an error whose constructor needs more than its `args` breaks a
`ProcessPoolExecutor` for good, and Dask takes keyword arguments like `key` and `retries` for its own.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import traceback
import uuid
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from asyncify.errors import BridgeError, PairError
from asyncify.sides import SYNC_SIDE
from asyncify.signatures import Shape, describe

__all__ = [
    "Outcome",
    "Parcel",
    "check_sendable",
    "goes_as_code",
    "is_process_pool",
    "portable_config",
    "refusal",
    "ticket_for",
]

Function = Callable[..., Any]

_PORTABLE = ("tags", "metadata", "configurable", "recursion_limit", "max_concurrency")

_WAYS = ("", f".{SYNC_SIDE}", ".__wrapped__")
"""The attribute paths from a name to the function itself: the name's object, a pair's side, or a wrapper's function."""


def is_process_pool(executor: Executor) -> bool:
    """Tell whether an executor is a `ProcessPoolExecutor`, whose module is imported if there is one.

    It is not imported here, as it brings in much of `multiprocessing`, and can't be while the program ends.
    """
    module = sys.modules.get("concurrent.futures.process")
    return isinstance(executor, getattr(module, "ProcessPoolExecutor", ()))


def check_sendable(fn: Function, shape: Shape, executor: Executor) -> None:
    """Check, before any call, that an executor can run this function.

    Raises:
        PairError: the function is a generator, takes a run manager, or has no name that another process could import.
    """
    target = type(executor).__name__
    if shape.is_generator:
        raise PairError(f"{describe(fn)} is a generator, and {target} can't hand on its chunks; drop bridge=")
    if shape.takes_run_manager:
        raise PairError(
            f"{describe(fn)} takes run_manager, whose handlers can't leave the process; take config, or drop bridge="
        )
    if is_process_pool(executor) and "<" in getattr(fn, "__qualname__", ""):
        raise PairError(
            f"{describe(fn)} is a lambda or is defined inside a function, so the processes of a ProcessPoolExecutor "
            "can't import it; define it at the top level of a module, or use loky.get_reusable_executor() or Dask, "
            "which send the code itself"
        )


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a config that can leave the process: no callbacks, and no entries private to a framework."""
    portable = {key: config[key] for key in _PORTABLE if key in config}
    if "configurable" in portable:
        portable["configurable"] = {
            key: value for key, value in portable["configurable"].items() if not key.startswith("__")
        }
    return portable


@dataclass(frozen=True, slots=True)
class Ticket:
    """The module and the attribute path by which another process finds a function."""

    module: str
    path: str

    def redeem(self) -> Any:
        """Return the function, and import its module if need be; None if there is no such name."""
        found: Any = sys.modules.get(self.module) or importlib.import_module(self.module)
        for name in self.path.split("."):
            found = inspect.getattr_static(found, _attribute(found, name), None)
            if isinstance(found, (classmethod, staticmethod)):
                found = cast("staticmethod[..., Any]", found).__func__
        return found


def _attribute(owner: object, name: str) -> str:
    """Return the attribute name that `name` has in its owner: Python mangles a private name in a class."""
    prefix = owner.__name__.lstrip("_") if isinstance(owner, type) else ""
    return f"_{prefix}{name}" if prefix and name.startswith("__") and not name.endswith("__") else name


def ticket_for(fn: Function, executor: Executor) -> Ticket | None:
    """Return the ticket by which another process finds a function; None if the executor must send the function itself.

    Only in the processes of a `ProcessPoolExecutor` is it certain that `__main__` is this program's.
    """
    module, qualname = getattr(fn, "__module__", None), getattr(fn, "__qualname__", None)
    if not module or not qualname or (module == "__main__" and not is_process_pool(executor)):
        return None
    tickets = (Ticket(module, qualname + way) for way in _WAYS)
    return next((ticket for ticket in tickets if ticket.redeem() is fn), None)


_is_code: ContextVar[bool] = ContextVar("asyncify_is_code", default=False)


def goes_as_code() -> bool:
    """Tell whether a function is being pickled or unpickled by its code, for a process with another `__main__`."""
    return _is_code.get()


def _as_code(pickler: Callable[[Any], Any], value: Any) -> Any:
    token = _is_code.set(True)
    try:
        return pickler(value)
    finally:
        _is_code.reset(token)


class Parcel:
    """A packed call, ready to be sent to another process, which makes the call by calling the parcel.

    The arguments are pickled here, and the code of a function without a ticket is when the parcel is. Only the call
    itself unpickles both, so an error there fails this call alone; an executor that met it would be broken for good.

    Args:
        fn: the function, or its ticket.
        args, kwargs: the arguments of the call.
        by_code: whether the executor sends the code of a function that has no ticket.

    Raises:
        PicklingError: the arguments can't be pickled.
    """

    def __init__(self, fn: Function | Ticket, args: tuple[Any, ...], kwargs: dict[str, Any], *, by_code: bool) -> None:
        self.__name__: str = fn.path if isinstance(fn, Ticket) else getattr(fn, "__name__", "call")
        self._fn: Function | Ticket | None = fn
        self._code: bytes | None = None
        self._by_code = by_code and not isinstance(fn, Ticket)
        is_of_main = isinstance(fn, Ticket) and fn.module == "__main__"  # there its classes have that name, too
        try:
            self._arguments = (pickle.dumps if is_of_main else _dumps)((args, kwargs))
        except Exception as error:
            raise pickle.PicklingError(f"{type(error).__name__}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle: with the code in place of the function if cloudpickle is there to pickle it."""
        state = dict(vars(self))
        if self._by_code and self._fn is not None and "cloudpickle" in sys.modules:
            state.update(_fn=None, _code=_packed_code(cast("Function", self._fn)))
        return state

    def __call__(self) -> Outcome:
        """Make the call, and return its outcome; an error that it raises is part of that."""
        try:
            fn, args, kwargs = self._unpacked()
            return Outcome(_packed_result(fn, fn(*args, **kwargs)))
        except BaseException as error:  # noqa: BLE001  (raised where the call is awaited; it would end Dask's worker)
            said = "".join(traceback.format_exception_only(error)).strip()
            return Outcome(_packed_error(error), "".join(traceback.format_exception(error)), said)

    def _unpacked(self) -> tuple[Function, tuple[Any, ...], dict[str, Any]]:
        fn: Any = self._fn.redeem() if isinstance(self._fn, Ticket) else self._fn
        title = self.__name__ if fn is None else describe(fn)
        try:
            if self._code is not None:
                fn = _as_code(pickle.loads, self._code)
            args, kwargs = pickle.loads(self._arguments)  # noqa: S301  (packed by ourselves)
        except Exception as error:
            what = "its arguments" if self._code is None else "its code or its arguments"
            raise BridgeError(
                f"{title}: {what} can't be read in its process ({type(error).__name__}: {error}); give it plain data"
            ) from error
        return cast("Function", fn), args, kwargs

    def __dask_tokenize__(self) -> str:
        """Return a unique token, as Dask would run calls with equal tokens only once."""
        return uuid.uuid4().hex


@dataclass(frozen=True)
class Outcome:
    """The pickled end of a call in another process: its result, or its error and the text of the traceback."""

    packed: bytes
    traceback: str = ""
    said: str = ""
    """The error's class and text, for when it can't be rebuilt."""

    @property
    def result(self) -> Any:
        """What the call returned."""
        return pickle.loads(self.packed)  # noqa: S301  (it comes from our own worker)

    @cached_property
    def error(self) -> BaseException | None:
        """The error that the call raised, caused by its traceback in the other process; None if it raised none."""
        if not self.traceback:
            return None
        try:
            error = _unpacked_error(self.packed)
        except Exception:  # noqa: BLE001  (its class is not here, say)
            error = BridgeError(f"the call failed in its process with {self.said}")
        error.__cause__ = _RemoteTracebackError(self.traceback)
        return error


class _RemoteTracebackError(Exception):
    """The traceback of an error in the process where it was raised."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass(frozen=True, slots=True)
class _Bare:
    """An error to rebuild without its constructor, which may need more than the `args` of `pickle`, or change them."""

    kind: type[BaseException]
    args: tuple[Any, ...]
    attributes: dict[str, Any]
    errors: tuple[bytes, ...] = ()
    """The errors of an exception group, each packed by itself."""
    of_system: tuple[Any, ...] = ()
    """What Python's own constructor of an OSError sets errno and filename by: no attribute holds them."""

    def rebuild(self) -> BaseException:
        if self.errors:
            make: Any = BaseExceptionGroup.__new__
            error: BaseException = make(self.kind, *self.args, list(map(_unpacked_error, self.errors)))
        else:
            error = self.kind.__new__(self.kind, *self.args)
            if self.of_system:
                OSError.__init__(cast("OSError", error), *self.of_system)
            error.args = self.args
        error.__dict__.update(self.attributes)
        return error


def _packed_result(fn: Function, result: Any) -> bytes:
    # Dask loses a result that can't be pickled, and a process pool's error names no function: so pickle it here.
    try:
        return _dumps(result)
    except Exception as error:
        raise BridgeError(
            f"{describe(fn)}: its result, of type {type(result).__name__}, can't be pickled: {error}"
        ) from error


def _dumps(value: Any) -> bytes:
    pickler: Any = sys.modules.get("cloudpickle", pickle)  # loaded by loky and Dask
    return bytes(pickler.dumps(value))


def _packed_code(fn: Function) -> bytes:
    """Return the pickled code of a function, or else a pickled object that raises why; executors would hide it."""
    try:
        return bytes(_as_code(_dumps, fn))
    except Exception as error:  # noqa: BLE001  (anything at all may be raised by a class's own code)
        return pickle.dumps(_Unsent(f"{describe(fn)}: its code can't be pickled ({type(error).__name__}: {error})"))


@dataclass(frozen=True, slots=True)
class _Unsent:
    """Stands in for a function whose code could not be pickled."""

    why: str

    def __call__(self, *_args: Any, **_kwargs: Any) -> Any:
        """Raise an error that says why."""
        raise BridgeError(self.why)


def _packed_error(error: BaseException) -> bytes:
    its: Any = error
    if isinstance(error, BaseExceptionGroup):
        return _packed_bare(its, (its.message,), tuple(map(_packed_error, its.exceptions)))
    packed = _pickled(error)
    if packed is not None and _is_kept(error, packed):
        return packed
    bare = _packed_bare(error, error.args)
    return bare if packed is None or _comes_back(bare) else packed


def _comes_back(packed: bytes) -> bool:
    """Tell whether an error without its constructor can be made again: pydantic's own has no other way to be made."""
    try:
        _unpacked_error(packed)
    except Exception:  # noqa: BLE001  (anything at all may be raised by a class's own code)
        return False
    return True


def _packed_bare(error: BaseException, args: tuple[Any, ...], errors: tuple[bytes, ...] = ()) -> bytes:
    attributes = {name: _portable(value) for name, value in vars(error).items()}
    of_system: Any = OSError.__reduce__(error)[1] if isinstance(error, OSError) and error.errno is not None else ()
    bare = _Bare(type(error), tuple(map(_portable, args)), attributes, errors, tuple(map(_portable, of_system)))
    return _pickled(bare) or b""  # then only the traceback's text survives


def _is_kept(error: BaseException, packed: bytes) -> bool:
    """Tell whether an error is unpickled unchanged: its constructor gets its `args`, and may change them."""
    try:
        back = pickle.loads(packed)  # noqa: S301  (packed by `_pickled`)
        return bool(type(back) is type(error) and back.args == error.args and str(back) == str(error))
    except Exception:  # noqa: BLE001  (arrays, say, can't be compared for a single answer)
        return False


def _unpacked_error(packed: bytes) -> BaseException:
    unpacked: Any = pickle.loads(packed)  # noqa: S301  (it comes from our own worker)
    error: BaseException = unpacked.rebuild() if isinstance(unpacked, _Bare) else unpacked
    return error


def _portable(value: Any) -> Any:
    return repr(value) if _pickled(value) is None else value


def _pickled(value: Any) -> bytes | None:
    """Return a value pickled, or None if it can't be pickled and unpickled."""
    try:
        pickled = pickle.dumps(value)
        pickle.loads(pickled)  # noqa: S301  (made one line above)
    except Exception:  # noqa: BLE001  (anything at all may be raised by a class's own code)
        return None
    return pickled


def refusal(fn: Function, executor: Executor, error: Exception) -> BridgeError:
    """Return the error for a call that an executor could not take, run or give back."""
    what = f"{describe(fn)}: {type(executor).__name__} could not run it ({type(error).__name__}: {error})"
    if isinstance(error, BrokenExecutor):
        return BridgeError(f"{what}; a process of it has died, and it is of no use any more: make a new one")
    if isinstance(error, pickle.PicklingError) or any(word in str(error) for word in ("pickle", "serialize")):
        return BridgeError(
            f"{what}; the function or its arguments can't be pickled: define the function at the top level of a "
            'module and pass plain data, or keep it in this process with bridge="thread"'
        )
    return BridgeError(f"{what}; is it still running?")
