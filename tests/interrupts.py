"""What a signal's handler may do, at every place where Python runs one: one place after the other."""

import dis
import sys
from collections.abc import Callable, Collection
from functools import cache
from itertools import pairwise
from types import CodeType, FrameType, TracebackType
from typing import Any, Self


class At:
    """Calls `act` at the n-th such place that this thread comes to in some modules, within a `with` block.

    Python runs the handlers of signals behind calls, behind jumps back, and where a frame begins or is gone on with.
    """

    def __init__(self, number: int, modules: Collection[str], act: Callable[[], object]) -> None:
        self.left = number
        self.modules = modules
        self.act = act

    def has_acted(self) -> bool:
        """Whether there have been so many places."""
        return self.left <= 0

    def __enter__(self) -> Self:
        self._before = sys.gettrace()  # that of coverage, say
        sys.settrace(self._trace)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_globals.get("__name__") not in self.modules or self.has_acted():
            return None
        frame.f_trace_opcodes = True
        if event == "call" or (event == "opcode" and frame.f_lasti in _places(frame.f_code)):
            self.left -= 1
            if self.has_acted():
                self.act()
        return self._trace


def interrupt() -> None:
    """Do what Python's own handler of Ctrl-C does."""
    raise KeyboardInterrupt


@cache
def _places(code: CodeType) -> set[int]:
    instructions = [each for each in dis.get_instructions(code) if each.opname != "CACHE"]
    behind = {after.offset for before, after in pairwise(instructions) if before.opname.startswith(("CALL", "RESUME"))}
    return behind | {each.argval for each in instructions if each.opname.startswith("JUMP_BACKWARD")}
