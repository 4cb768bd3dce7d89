"""What torch says while it records, in words for the user of this library."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence

from torch import Tensor

from lightning_linger.core.errors import LingerError, UnsupportedError
from lightning_linger.core.locations import raised_at
from lightning_linger.export.inputs import Inputs


class FailingForwardError(UnsupportedError):
    """The model does not run on inputs of these sizes.

    Args:
        shapes: Of the inputs, by name.
        location: The line of the model.
        reason: What torch says.
    """

    def __init__(self, shapes: str, location: str, reason: str) -> None:
        super().__init__(
            f"the forward fails on {shapes}, at {location}: {reason} Where a size of other inputs "
            "is written into the model, as in `view(32, -1)`, write `x.shape[0]` or -1 in its "
            "place."
        )
        self.shapes = shapes
        self.location = location
        self.reason = reason


@contextlib.contextmanager
def located(inputs: Inputs, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Name the line of the model that an error of torch comes from, and the sizes of the inputs."""
    try:
        yield
    except LingerError:
        raise
    except (RuntimeError, IndexError, ValueError) as error:
        pairs = zip(inputs.names, tensors, strict=True)
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in pairs)
        reason = str(error).strip().partition("\n")[0].rstrip(".") + "."
        raise FailingForwardError(shapes, raised_at(error), reason) from error


@contextlib.contextmanager
def readable_errors(what: str) -> Iterator[None]:
    """Say in one sentence why a forward cannot be recorded or translated.

    Args:
        what: What cannot be done, e.g. ``recorded``.

    Raises:
        UnsupportedError: In the place of any error that is not the library's own.
    """
    try:
        yield
    except LingerError:
        raise
    except Exception as error:
        reason = str(_root_cause(error)).strip().partition("\n")[0]
        msg = (
            f"the forward cannot be {what}: {reason} Rewrite that part with plain tensor "
            "operations, or move it out of the model."
        )
        raise UnsupportedError(msg) from error


def _root_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextlib.contextmanager
def quiet_about_flat_weights() -> Iterator[None]:
    """Keep torch from warning about the weights of recurrent layers."""
    # `nn.LSTM` and its relatives keep a list of their weights, which torch.export takes for loose
    # tensors that the forward assigns.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The tensor attributes? .*\b_flat_weights\[")
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's exporter from talking about itself."""
    # What torch's exporter says about its own internals is not for the user of this library.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, message=".*LeafSpec.*")
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(torch|onnx).*")
            yield
    finally:
        logger.setLevel(level)
