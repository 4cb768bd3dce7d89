"""Where in the user's code a call was made."""

import sys
from pathlib import Path
from types import FrameType

import torch

_OUTSIDE = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_CHECKPOINT = str(Path("torch", "utils", "checkpoint.py"))
_MODULE_CALL = "_call_impl"


def _frames() -> list[FrameType]:
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def caller_location() -> str:
    """Return ``file:line`` of the innermost frame outside torch and this library."""
    for frame in _frames():
        if not frame.f_code.co_filename.startswith(_OUTSIDE):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
    return "<unknown>"


def raised_at(error: BaseException) -> str:
    """Return ``file:line`` of the innermost frame outside torch and this library of an error."""
    found, trace = "<unknown>", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if not file.startswith(_OUTSIDE):
            found = f"{file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def directly_checkpointed() -> bool:
    """Whether the call runs in a checkpointed function without a module call between them.

    Such a call is run again during backward, when no module hook tells that the model is running.
    """
    for frame in _frames():
        name = frame.f_code.co_filename
        if name.endswith(_CHECKPOINT):
            return True
        if frame.f_code.co_name == _MODULE_CALL and name.startswith(_OUTSIDE[0]):
            return False
    return False


def checkpoint_region() -> FrameType | None:
    """Return the frame of the innermost running ``checkpoint`` call, None outside of any."""
    for frame in _frames():
        if frame.f_code.co_filename.endswith(_CHECKPOINT) and frame.f_code.co_name == "checkpoint":
            return frame
    return None
