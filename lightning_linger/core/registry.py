"""What an op must say about itself, and the table of ops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from lightning_linger.core.sites import Site

# Where the scale of a result comes from: its own range, its inputs' scales, or nowhere (movement).
OutputScale = Literal["observed", "inputs"]


class Call(Protocol):
    """The bound arguments of one call: a NamedTuple with the torch function's argument names."""

    def _replace(self, **kwargs: Any) -> Any: ...


class Op:
    """The meaning of one torch function in the three number systems.

    ``run_float``, ``run_fake`` and ``run_integer`` take the site and the bound call. They only
    read what was prepared, because a graph capture runs them too. Each may return
    ``NotImplemented`` for a call it has no meaning for; the torch function then runs on plain
    values.

    Attributes:
        kind: What users write in ``types=`` and what reports show, e.g. ``conv2d``.
        has_site: False for pure data movement, which carries the tag of its input along and has
            nothing to quantize.
        output_scale: ``observed`` if a result has a range and a quantizer of its own, ``inputs`` if
            its scale follows from the operands.
        needs_quantized_operand: True where an op on plain values stays plain (index arithmetic, an
            addition before the first layer); False for layers, which quantize their own input.
    """

    has_site: bool = True
    output_scale: OutputScale = "observed"
    needs_quantized_operand: bool = True

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Bind the arguments of the torch function to a NamedTuple."""
        raise NotImplementedError

    def operands(self, call: Any) -> list[Any]:
        """Return the activation operands of a bound call, in order."""
        return [call[0]]

    def obstacle(self, call: Any) -> str | None:
        """Say why this call (tensors may be :class:`TensorSpec`) has no integer form, if so."""
        return None

    def run_float(self, site: Site, call: Any) -> Any:
        """Run with BN folding and range limits, without quantization."""
        return NotImplemented

    def run_fake(self, site: Site, call: Any) -> Any:
        """Run on floats that lie on the integer grid."""
        raise NotImplementedError

    def run_integer(self, site: Site, call: Any) -> Any:
        """Run on the integers themselves."""
        raise NotImplementedError


_OPS: dict[str, Op] = {}


def register(*ops: Op) -> None:
    """Add ops to the table; a name is taken once."""
    for op in ops:
        if op.kind in _OPS:
            msg = f"the op {op.kind!r} is registered already."
            raise ValueError(msg)
        _OPS[op.kind] = op


def op_of(kind: str) -> Op | None:
    """Return the op of a canonical name, None if the library has none."""
    return _OPS.get(kind)


def supported_kinds() -> list[str]:
    """Return the canonical names of all ops that have sites."""
    return sorted(kind for kind, op in _OPS.items() if op.has_site)
