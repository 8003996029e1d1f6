"""An exception at the n-th moment of a call, as a signal handler raises it."""

import dis
import itertools
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any

_LOOKS = ("RESUME", "CALL", "CALL_FUNCTION_EX", "CALL_KW", "JUMP_BACKWARD")
"""After these CPython looks whether a signal came."""


class Interruption(BaseException):
    """What the handler raises."""


def interrupted(
    act: Callable[[], object],
    moment: int,
    files: tuple[str, ...],
    *,
    everywhere: bool,
    error: BaseException | None = None,
) -> bool:
    """Call a function and raise an exception in this thread before the n-th instruction of it.

    Args:
        act: What is called.
        moment: Counted from 1.
        files: Where instructions count: beginnings of their files' names.
        everywhere: Count every instruction; else those at which CPython may run a handler.
        error: What is raised.

    Returns:
        Whether there were so many instructions.
    """
    error = error or Interruption()
    seen = 0
    last: dict[FrameType, int] = {}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(files):
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            before, last[frame] = last.get(frame), frame.f_lasti
            seen += everywhere or (before is not None and _may_come(frame, before))
            if seen == moment:
                sys.settrace(None)
                raise error
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        act()
    except BaseException as raised:
        # `Condition.wait`, interrupted when it has released its lock, fails to release it once more
        if raised is not error and raised.__context__ is not error:
            raise
    finally:
        sys.settrace(before)
    return seen >= moment


def moments(stride: int = 1) -> Iterator[int]:
    """Numbers of moments."""
    return itertools.count(1, stride)


def _may_come(frame: FrameType, before: int) -> bool:
    """Whether a signal's handler may run between two instructions, where `with` is not a question.

    One that runs after a call raises at the call. Where the next instruction is in another block,
    an exception there would be another thing.
    """
    code = frame.f_code
    if dis.opname[code.co_code[before]] not in _LOOKS:
        return False
    return _block(code, before) == _block(code, frame.f_lasti)


def _block(code: CodeType, at: int) -> object:
    parse: Any = dis._parse_exception_table  # type: ignore[attr-defined]
    return next((e.target for e in parse(code) if e.start <= at < e.end), None)
