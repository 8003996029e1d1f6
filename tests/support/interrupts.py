"""An exception at the n-th moment of a call, as a signal handler raises it."""

import dis
import itertools
import sys
import threading
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
    """Call a function in a thread and raise an exception before the n-th instruction of it.

    The thread is there for this alone: an exception that is raised where CPython itself never
    raises one, at the first instruction of a handler, may stay the one that its thread handles, and
    be the context of every later one.

    Args:
        act: What is called.
        moment: Counted from 1.
        files: Where instructions count: beginnings of their files' names.
        everywhere: Count every instruction; else those at which CPython may run a handler.
        error: What is raised.

    Returns:
        Whether there were so many instructions.
    """
    outcome: list[bool | BaseException] = []

    def body() -> None:
        try:
            outcome.append(_interrupted(act, moment, files, everywhere, error or Interruption()))
        except BaseException as raised:  # noqa: BLE001 - raised again where it was called
            outcome.append(raised)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _interrupted(
    act: Callable[[], object],
    moment: int,
    files: tuple[str, ...],
    everywhere: bool,  # noqa: FBT001 - as `interrupted` was told
    error: BaseException,
) -> bool:
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
