"""Functions of one number: the engine's kernel where it has one for the width, a table elsewhere.

Every function is a line of data: what it computes, which numbers it takes, where it has values. On
LUNA platforms ``sigmoid`` and ``tanh`` with 8-bit results are the engine's own piecewise linear
kernels, and so are ``gelu`` and ``silu`` on venusA; a square is the engine's multiplication, and a
leaky ReLU multiplies negative codes by a constant. All else is a table over codes
(:mod:`lightning_linger.ops.table`).

Where a function has no value, its table continues it: a pole saturates, as the infinity would, and
the logarithm and the roots of a negative number are what they are at zero. No gradient flows there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_linger.core.config import QuantConfig
from lightning_linger.core.fake_quantize import Scalar
from lightning_linger.core.integer import code_limits, integer_op, is_power_of_two, payload_dtype
from lightning_linger.core.payload import integer_codes, step_of
from lightning_linger.core.platform import Platform, arithmetic_of
from lightning_linger.core.registry import register
from lightning_linger.core.sites import Site
from lightning_linger.core.tags import tag_held_by, tag_of
from lightning_linger.ops import luna, tflite_curves
from lightning_linger.ops.kernel import KernelOp, Target
from lightning_linger.ops.mul import integer_mul
from lightning_linger.ops.pairs import Factor, as_factor, factor_codes
from lightning_linger.ops.results import minimum_step
from lightning_linger.ops.slopes import finest_of_slopes, integer_prelu
from lightning_linger.ops.table import ENTRY_BITS, Tabulated, Tabulation, find_table, table_of

Number = float | int | bool | str

# Width of results of the engines' own sigmoid and tanh, and of the operands that all take.
ENGINE_BITS = 8
# Fraction bits of the operand and the result of the engine's gelu and silu.
_GELU_FRACTION = 27


# --- functions as data ------------------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """Where a function has values.

    Args:
        inside: ``inside(x)`` is true there.
        limit: What takes the place of a value elsewhere.
    """

    inside: Callable[[Tensor], Tensor]
    limit: float


def _above_zero(x: Tensor) -> Tensor:
    return x > 0


def _not_zero(x: Tensor) -> Tensor:
    return x != 0


def _above_minus_one(x: Tensor) -> Tensor:
    return x > -1


@dataclass(frozen=True)
class Curve:
    """A function of one number.

    Args:
        function: ``function(x, *numbers)``, in the dtype of ``x``.
        numbers: Names of its further arguments and their defaults, None where there is none.
        spellings: Names under which torch has it; its kind if empty.
        range: Absolute maximum of its values, if they are bounded.
        domain: Where it has values, given its numbers; None for everywhere.
    """

    function: Callable[..., Tensor]
    numbers: tuple[tuple[str, Number | None], ...] = ()
    spellings: tuple[str, ...] = ()
    range: float | None = None
    domain: Callable[..., Domain | None] | None = None


def _fixed(domain: Domain) -> Callable[..., Domain]:
    return lambda *numbers: domain


def _softplus(x: Tensor, beta: float, threshold: float) -> Tensor:
    return F.softplus(x, beta, threshold)


def _threshold(x: Tensor, threshold: float, value: float) -> Tensor:
    return F.threshold(x, threshold, value)


CURVES: dict[str, Curve] = {
    "sigmoid": Curve(torch.sigmoid, range=1.0),
    "tanh": Curve(torch.tanh, range=1.0),
    "gelu": Curve(
        lambda x, approximate: F.gelu(x, approximate=approximate),
        numbers=(("approximate", "none"),),
    ),
    "silu": Curve(F.silu),
    "mish": Curve(F.mish),
    "hardswish": Curve(F.hardswish),
    "hardsigmoid": Curve(F.hardsigmoid, range=1.0),
    "leaky_relu": Curve(F.leaky_relu, numbers=(("negative_slope", 0.01),)),
    "elu": Curve(F.elu, numbers=(("alpha", 1.0),)),
    "selu": Curve(F.selu),
    "celu": Curve(F.celu, numbers=(("alpha", 1.0),)),
    "softplus": Curve(_softplus, numbers=(("beta", 1.0), ("threshold", 20.0))),
    "softsign": Curve(F.softsign, range=1.0),
    "logsigmoid": Curve(F.logsigmoid, spellings=("logsigmoid", "log_sigmoid")),
    "tanhshrink": Curve(F.tanhshrink),
    "softshrink": Curve(F.softshrink, numbers=(("lambd", 0.5),)),
    "hardshrink": Curve(F.hardshrink, numbers=(("lambd", 0.5),)),
    "threshold": Curve(_threshold, numbers=(("threshold", None), ("value", None))),
    "exp": Curve(torch.exp),
    "exp2": Curve(torch.exp2),
    "expm1": Curve(torch.expm1),
    "log": Curve(torch.log, domain=_fixed(Domain(_above_zero, -math.inf))),
    "log2": Curve(torch.log2, domain=_fixed(Domain(_above_zero, -math.inf))),
    "log10": Curve(torch.log10, domain=_fixed(Domain(_above_zero, -math.inf))),
    "log1p": Curve(torch.log1p, domain=_fixed(Domain(_above_minus_one, -math.inf))),
    "sqrt": Curve(torch.sqrt, domain=_fixed(Domain(_above_zero, 0.0))),
    "rsqrt": Curve(torch.rsqrt, domain=_fixed(Domain(_above_zero, math.inf))),
    "reciprocal": Curve(torch.reciprocal, domain=_fixed(Domain(_not_zero, math.inf))),
    "erf": Curve(torch.erf, range=1.0),
    "sin": Curve(torch.sin, range=1.0),
    "cos": Curve(torch.cos, range=1.0),
}


@dataclass(frozen=True)
class CurveFunction:
    """A curve with its numbers, continued outside its domain.

    Args:
        kind: Kind of the op.
        numbers: Its further arguments.
    """

    kind: str
    numbers: tuple[Number, ...] = ()

    @property
    def name(self) -> str:
        """What it computes, for messages."""
        return self.kind

    @property
    def curve(self) -> Curve:
        """The data of the kind."""
        return CURVES[self.kind]

    @property
    def domain(self) -> Domain | None:
        """Where it has values, None for everywhere."""
        rule = self.curve.domain
        return None if rule is None else rule(*self.numbers)

    def plain(self, x: Tensor) -> Tensor:
        """Return what torch returns."""
        return self.curve.function(x, *self.numbers)

    def __call__(self, x: Tensor) -> Tensor:
        """Return values everywhere; no gradient flows from outside the domain."""
        domain = self.domain
        if domain is None:
            return self.plain(x)
        inside = domain.inside(x)
        # One is in every domain.
        return torch.where(inside, self.plain(torch.where(inside, x, 1.0)), domain.limit)


# --- integer kernel ---------------------------------------------------------------------------


@integer_op("linger::curve")
def integer_curve(
    x: Tensor,
    function: str,
    scale_x: float,
    scale_o: float,
    bits_x: int,
    bits_o: int,
    low: int,
    high: int,
    platform: str,
) -> Tensor:
    """Run an engine's own kernel of ``sigmoid``, ``tanh``, ``gelu`` or ``silu``.

    Operands are brought to the kernel's fixed-point format with saturation, which for a 16-bit
    venus operand is beyond +-16, and for the 32-bit ones too.

    Args:
        x: Codes.
        function: Which one.
        scale_x: Step of ``x``, a power of two like the step of the result.
        scale_o: Step of the result; ``2^(1 - bits_o)`` for ``sigmoid`` and ``tanh``.
        bits_x: Width of ``x``.
        bits_o: Width of the result.
        low: Smallest code of the result.
        high: Largest code of the result.
        platform: Name of the target.
    """
    engine = arithmetic_of(platform)
    curves = "" if engine is None else engine.curves
    many = x.numel() > 1 << bits_x
    operands = torch.arange(*_span(bits_x), device=x.device) if many else x.long()
    if function in _SMOOTH:
        y = _smooth(operands, function, scale_x, scale_o, bits_o)
    else:
        y = _bounded(operands, function, curves, scale_x, scale_o)
    codes = y.clamp(low, high).to(payload_dtype(bits_o))
    if not many:
        return codes
    # Each code is computed once.
    index = x.reshape(-1).to(torch.int32) + (1 << (bits_x - 1))
    return torch.index_select(codes, 0, index).reshape(x.shape)


def _span(bits: int) -> tuple[int, int]:
    low, high = code_limits(bits)
    return low, high + 1


def _smooth(x: Tensor, function: str, scale_x: float, scale_o: float, bits_o: int) -> Tensor:
    aligned = luna.align(x, fraction_of(scale_x), _GELU_FRACTION, 32)
    return luna.align(_SMOOTH[function](aligned), _GELU_FRACTION, fraction_of(scale_o), bits_o)


def _bounded(x: Tensor, function: str, curves: str, scale_x: float, scale_o: float) -> Tensor:
    formats = luna.curves_of(curves)
    aligned = luna.align(x, fraction_of(scale_x), formats.input_fraction, formats.input_bits)
    return luna.to_fraction(_BOUNDED[function](aligned, curves), curves, fraction_of(scale_o))


@integer_curve.register_fake
def _(
    x: Tensor, function: str, scale_x: float, scale_o: float, bits_x: int, bits_o: int, *_: object
) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits_o))


_BOUNDED: dict[str, Callable[[Tensor, str], Tensor]] = {
    "sigmoid": luna.sigmoid,
    "tanh": luna.tanh,
}
_SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {"gelu": luna.gelu, "silu": luna.silu}


def fraction_of(step: float) -> int:
    """Return the fraction bits of a power-of-two step."""
    return 1 - math.frexp(step)[1]


def engine_computes(
    function: CurveFunction, platform: Platform, rounding: str, bits_x: int, target: Target
) -> bool:
    """Whether the engine has a kernel of its own for these widths.

    Args:
        function: The function.
        platform: The target.
        rounding: How the site rounds; engines round half up.
        bits_x: Width of the operand. venus takes 16 bits, the others 8.
        target: What is to be produced.
    """
    if platform.curves not in luna.CURVES or rounding != "half_up":
        return False
    if function.kind in _SMOOTH:
        exact = function.numbers in ((), ("none",))
        return platform.curves == "venusa" and exact and is_power_of_two(target.scale)
    if function.kind not in _BOUNDED:
        return False
    # Their range is known: the scale follows from the width.
    narrow = bits_x <= ENGINE_BITS or platform.curves == "venus"
    return narrow and target.bits == ENGINE_BITS


# --- ops --------------------------------------------------------------------------------------


class CurveCall(NamedTuple):
    """Bound arguments of a function of one number."""

    input: Tensor
    function: CurveFunction
    unsupported: str | None = None


class CurveOp(KernelOp):
    """A function of one number.

    Args:
        kind: Canonical op name, a key of :data:`CURVES`.
    """

    def bind(self, input: Tensor, *args: Any, **kwargs: Any) -> CurveCall:
        """Bind the arguments of the torch function; ``inplace`` does not matter."""
        declared = CURVES[self.kind].numbers
        names = [name for name, _ in declared]
        given = {**dict(declared), **dict(zip(names, args, strict=False)), **kwargs}
        given.pop("inplace", None)
        numbers = tuple(given.pop(name) for name in names)
        unsupported = None
        if not all(isinstance(value, Number) for value in numbers):
            unsupported = f"{' and '.join(names)} must be numbers"
        elif any(value is not None for value in given.values()):
            unsupported = f"`{next(iter(given))}=` has no integer form"
        return CurveCall(input, CurveFunction(self.kind, numbers), unsupported)

    def obstacle(self, call: CurveCall) -> str | None:
        """Numbers are part of the table."""
        return call.unsupported

    def output_range(
        self, call: CurveCall, config: QuantConfig, platform: Platform
    ) -> float | tuple[float, float] | None:
        """Return the bound of the function."""
        fixed = tflite_curves.fixed_range(self.kind, config, platform)
        return CURVES[self.kind].range if fixed is None else fixed

    def real(self, site: Site, call: CurveCall) -> Tensor:
        """Run the function; quantized, it is continued outside its domain."""
        function = call.function if site.output is not None else call.function.plain
        return function(call.input)

    def observed(self, site: Site, call: CurveCall, real: Tensor) -> Tensor:
        """A pole is no value that the range has to cover."""
        domain = call.function.domain
        if domain is None or math.isfinite(domain.limit):
            return real
        return torch.where(domain.inside(call.input), real, 0.0)

    def can_run(self, site: Site, call: CurveCall, target: Target) -> bool:
        """A capture finds its table, or computes without."""
        if self._on_engine(site, call, target):
            return True
        asked = _asked(site, call.input, target)
        function = _tabulated(site, call.function, asked)
        return find_table(site, "", function, asked, call.input.device) is not None

    def kernel(self, site: Site, call: CurveCall, target: Target) -> Tensor:
        """Call ``linger::curve``, or read the table."""
        codes = integer_codes(call.input)
        tag = tag_held_by(call.input)
        if not self._on_engine(site, call, target):
            asked = _asked(site, call.input, target)
            function = _tabulated(site, call.function, asked)
            table = table_of(site, "", function, asked, codes.device)
            return table(codes, site.platform_name)
        return integer_curve(
            codes,
            self.kind,
            float(tag.step),
            target.scale,
            tag.bits,
            target.bits,
            target.low,
            target.high,
            site.platform_name,
        )

    def _on_engine(self, site: Site, call: CurveCall, target: Target) -> bool:
        tag = tag_of(call.input)
        return (
            site.platform is not None
            and tag is not None
            and engine_computes(call.function, site.platform, site.rounding, tag.bits, target)
        )


def _asked(site: Site, x: Tensor, target: Target) -> Tabulation:
    tag = tag_held_by(x)
    return Tabulation(
        step_x=float(tag.step),
        bits_x=tag.bits,
        step_o=target.scale,
        bits_o=target.bits,
        low=target.low,
        high=target.high,
        rounding=site.rounding,
        entry_bits=tag.bits if tag.affine else ENTRY_BITS,
    )


def _tabulated(site: Site, function: CurveFunction, asked: Tabulation) -> Tabulated:
    """Return what the table holds: the function, or an engine's kernel of it."""
    own = tflite_curves.kernel_of(function.kind, function.numbers, site.platform, asked)
    return function if own is None else own


class PowOp(CurveOp):
    """``pow`` with a number as exponent or as base, and ``square``.

    A square is a multiplication, which every engine has.
    """

    def bind(self, input: Any, exponent: Any = 2, **kwargs: Any) -> CurveCall:
        """Bind ``(input, exponent)``."""
        reversed_ = isinstance(input, int | float)
        x, number = (exponent, input) if reversed_ else (input, exponent)
        unsupported = None
        if not isinstance(number, int | float):
            unsupported = "base and exponent are both computed"
        elif reversed_ and number <= 0:
            unsupported = f"powers of {number} have no integer form"
        elif any(value is not None for value in kwargs.values()):
            unsupported = f"`{next(iter(kwargs))}=` has no integer form"
        numbers = (number, reversed_) if unsupported is None else (1.0, False)
        return CurveCall(x, CurveFunction("pow", numbers), unsupported)

    def finest_step(self, site: Site, call: CurveCall) -> Scalar | None:
        """A product is only shifted right."""
        if not _is_square(call):
            return None
        step = step_of(call.input)
        return minimum_step(site, step * step)

    def can_run(self, site: Site, call: CurveCall, target: Target) -> bool:
        """A square needs no table."""
        return _is_square(call) or super().can_run(site, call, target)

    def kernel(self, site: Site, call: CurveCall, target: Target) -> Tensor:
        """Call ``linger::mul``, or read the table."""
        if not _is_square(call):
            return super().kernel(site, call, target)
        codes, step = integer_codes(call.input), float(step_of(call.input))
        return integer_mul(
            codes,
            codes,
            step,
            step,
            target.scale,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )


class LeakyReLUOp(CurveOp):
    """``leaky_relu``: on platforms that shift, a slope of the output's width for negative codes."""

    def finest_step(self, site: Site, call: CurveCall) -> Scalar | None:
        """A positive code is only shifted right."""
        if not _shifts(site):
            return None
        return finest_of_slopes(step_of(call.input), _slope(site, call).step)

    def can_run(self, site: Site, call: CurveCall, target: Target) -> bool:
        """A slope needs no table."""
        return _shifts(site) or super().can_run(site, call, target)

    def kernel(self, site: Site, call: CurveCall, target: Target) -> Tensor:
        """Call ``linger::prelu``, or read the table."""
        if not _shifts(site):
            return super().kernel(site, call, target)
        tag, slope = tag_held_by(call.input), _slope(site, call)
        codes = integer_codes(call.input)
        return integer_prelu(
            codes,
            factor_codes(slope, codes).reshape(1),
            float(tag.step),
            slope.step,
            target.scale,
            tag.bits,
            slope.bits,
            target.bits,
            target.low,
            target.high,
            site.rounding,
            site.platform_name,
        )


def _shifts(site: Site) -> bool:
    return site.platform is not None and site.platform.right_shift_only


def _slope(site: Site, call: CurveCall) -> Factor:
    assert site.output is not None  # it has a range of its own
    slope: Factor = as_factor(call.function.numbers[0], site.output)
    return slope


def _is_square(call: CurveCall) -> bool:
    return call.function.numbers == (2, False)


def _pow(x: Tensor, number: float, is_base: bool) -> Tensor:
    return torch.pow(number, x) if is_base else torch.pow(x, number)


def _pow_domain(number: float, is_base: bool) -> Domain | None:
    if is_base or (number >= 0 and number == int(number)):
        return None
    if number == int(number):
        return Domain(_not_zero, math.inf)
    return Domain(_above_zero, 0.0 if number > 0 else math.inf)


CURVES["pow"] = Curve(_pow, spellings=("pow", "__pow__"), domain=_pow_domain)
CURVES["square"] = Curve(_pow, domain=_pow_domain)

_SPECIAL = {"pow": PowOp, "square": PowOp, "leaky_relu": LeakyReLUOp}

for _kind, _curve in CURVES.items():
    register(_SPECIAL.get(_kind, CurveOp)(_kind), *_curve.spellings)
