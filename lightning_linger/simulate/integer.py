"""Running a prepared model in integers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from lightning_linger.core.errors import NotReadyError, UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of


@contextlib.contextmanager
def integer(model: nn.Module) -> Iterator[nn.Module]:
    """Run the model's forwards in integers while the context is open.

    Sites that are quantized and know their ranges compute on int8, int16 and int32 tensors; calls
    return real float values, equal bit for bit to those of the fake-quant evaluation forward on
    power-of-two platforms. No state changes. Re-entrant.

    Args:
        model: A quantized model in evaluation mode.

    Raises:
        NotReadyError: If the quantize stage is off, or the model is in training mode.
        UnsupportedError: If a part of a quantized site is left in float.
    """
    with number_system(model, "integer"):
        yield model


@contextlib.contextmanager
def number_system(model: nn.Module, system: str) -> Iterator[None]:
    """Run quantized sites as ``float``, ``fake`` or ``integer`` while the context is open."""
    switches = instrumentation_of(model).switches
    if not switches.quantize:
        msg = (
            "the quantize stage is off, there is no integer model yet. Call `linger.quantize` or "
            "train past the epoch at which QuantizeCallback switches it on."
        )
        raise NotReadyError(msg)
    if model.training:
        msg = "the model is in training mode. Call `model.eval()` first."
        raise NotReadyError(msg)
    if system == "integer":
        _require_integers(model)
    before = switches.system
    switches.system = system
    try:
        yield
    finally:
        switches.system = before


def _require_integers(model: nn.Module) -> None:
    for site in instrumentation_of(model).sites:
        if site.float_operands and site.quantized:
            parts = ", ".join(sorted(site.float_operands))
            msg = (
                f"`{site.key}`: its {parts} are left in float, so there are no integers. "
                "Round them again: `nics_fix.set_fix_method(model, FIX_AUTO)`."
            )
            raise UnsupportedError(msg)
