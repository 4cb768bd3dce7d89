"""What an op must say about itself, and the table of ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lightning_linger.core.functions import (
    Canonical,
    forget_functions,
    name_function_objects,
    name_functions,
)
from lightning_linger.core.movement import move
from lightning_linger.core.tags import takes_activations

if TYPE_CHECKING:
    from lightning_linger.core.config import QuantConfig
    from lightning_linger.core.platform import Platform
    from lightning_linger.core.sites import Site

# Where the scale of a result comes from: its own range, its inputs' scales, or nowhere (movement).
OutputScale = Literal["observed", "inputs"]


class Call(Protocol):
    """The bound arguments of one call: a NamedTuple with the torch function's argument names."""

    def _replace(self, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class Part:
    """A quantizer inside an op, beside those of its operands and its result.

    Args:
        bits: Width; None takes the site's ``activation_bits``.
        range: A known absolute maximum; None observes the range.
    """

    bits: int | None = None
    range: float | None = None


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
        learns_weight_ranges: Whether the range of its weight can be learned.
        has_parameters: Whether it quantizes weights of the model: sites get a weight grid, range
            limits apply. So do the calls of any other op that have :meth:`parameters`.
        commutative: Whether the order of its operands does not matter.
        takes_window: Whether an activation that follows may narrow the quantizer of the result; not
            where the op reads its own result again.
        learns_ranges: Whether its quantizers can learn their ranges; those that round step by step
            through time stay with their estimators.
        rounds_parts_apart: Whether its fake-quant form can leave its parameters, or its result, in
            float (:attr:`Site.floating`).
        groups_weights: Whether its weight ``[O, I, ...]`` can have scales of groups of inputs.
        exact_with_free_scales: Whether fake-quant and integers are equal bit for bit where scales
            are no powers of two; without, they may differ next to rounding ties.
    """

    has_site: bool = True
    output_scale: OutputScale = "observed"
    needs_quantized_operand: bool = True
    has_parameters: bool = False
    learns_weight_ranges: bool = False
    commutative: bool = False
    takes_window: bool = True
    learns_ranges: bool = True
    rounds_parts_apart: bool = False
    groups_weights: bool = False
    exact_with_free_scales: bool = False

    # Ops without sites have no `bind`, `run_fake` and `run_integer`, and ops that learn no range of
    # a weight no `weight_channels`: these raise NotImplementedError and are not abstract.

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __deepcopy__(self, memo: Any) -> Op:
        """Return itself: an op has no state, and copies of a model have the same ops."""
        return self

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Say whether a call works on activations; others are neither counted nor quantized."""
        return takes_activations(args, kwargs)

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """Bind the arguments of the torch function to a NamedTuple."""
        raise NotImplementedError

    def operands(self, call: Any) -> list[Any]:
        """Return the activation operands of a bound call, in order."""
        return [call[0]]

    def parameters(self, call: Any) -> list[Any]:
        """Return the weights of a bound call, which must be parameters of the model."""
        return []

    def weight_channels(self, call: Any) -> int:
        """Return how many output channels the weight has, where its range can be learned."""
        raise NotImplementedError

    def learned_weights(self, call: Any) -> Mapping[str, int | None]:
        """Name the weights of a recorded call whose ranges can be learned.

        Returns:
            For each how many output channels it has, None where it has one scale always.
        """
        return {"weight": self.weight_channels(call)} if self.learns_weight_ranges else {}

    def parts(self, call: Any, config: QuantConfig, platform: Platform) -> Mapping[str, Part]:
        """Name the quantizers inside the op: ``site.parts[name]``."""
        return {}

    def operand_bits(
        self, position: int, call: Any, config: QuantConfig, platform: Platform
    ) -> int:
        """Return the width that an operand must have."""
        return config.activation_bits

    def output_range(
        self, call: Any, config: QuantConfig, platform: Platform
    ) -> float | tuple[float, float] | None:
        """Return the absolute maximum of results where it is known (1 for a sigmoid).

        Two numbers are the ends of a range that the platform fixes, and nobody may change.
        """
        return None

    def scale_source(self, platform: Platform) -> OutputScale:
        """Return ``output_scale``, where it depends on the platform."""
        return self.output_scale

    def quantized_results(self, results: Sequence[Any]) -> Sequence[Any]:
        """Return those of the results that other ops can take as codes, in order."""
        return results

    def variant(self, call: Any) -> str:
        """Return the name under which platforms list this call where they cannot run it."""
        return self.kind

    def obstacle(self, call: Any) -> str | None:
        """Say why this call (tensors may be :class:`TensorSpec`) has no integer form, if so."""
        return None

    def move(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function of an op without sites; its result is on the grid of its operand."""
        return move(func, args, kwargs)

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


def register(
    op: Op,
    *spellings: str,
    properties: Sequence[str] = (),
    functions: Sequence[Callable[..., Any]] = (),
) -> None:
    """Add an op to the table.

    Args:
        op: The op.
        spellings: Names under which torch has it, its kind if neither they nor ``functions`` are
            given; see :func:`lightning_linger.core.functions.name_functions`.
        properties: Names of tensor properties that mean it.
        functions: Functions that mean it: made visible by
            :func:`lightning_linger.core.functions.operator`, or custom ops of ``torch.ops``.

    Raises:
        ValueError: If the kind, or one of the functions, is taken.
    """
    if op.kind in _OPS:
        msg = f"the op {op.kind!r} is registered already."
        raise ValueError(msg)
    if spellings or not functions:
        name_functions(op.kind, spellings or (op.kind,), properties, op.commutative)
    name_function_objects(op.kind, dict.fromkeys(functions, Canonical(op.kind)))
    _OPS[op.kind] = op


def unregister(kind: str) -> None:
    """Take an op out of the table again, e.g. at the end of a test.

    Raises:
        KeyError: If there is none of this kind.
    """
    del _OPS[kind]
    forget_functions(kind)


def op_of(kind: str) -> Op | None:
    """Return the op of a canonical name, None if the library has none."""
    return _OPS.get(kind)


def all_ops() -> list[Op]:
    """Return all ops by kind, those that only move values included."""
    return [_OPS[kind] for kind in sorted(_OPS)]


def supported_kinds() -> list[str]:
    """Return the canonical names of all ops that have sites."""
    return sorted(kind for kind, op in _OPS.items() if op.has_site)
