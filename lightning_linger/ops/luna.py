"""The kernels that LUNA engines compute curves with, bit for bit, as pure functions on integers.

Every function takes and returns int64 tensors of fixed-point numbers; ``Qn`` means that the real
value is ``code * 2^-n``. Curves are piecewise linear, sixteen segments on ``|x|``. There are three
generations of engines, named by :attr:`lightning_linger.core.platform.Platform.curves`: ``venus``
with 16-bit operands, ``arcs`` (mars too) and ``venusa`` with 32-bit ones.

The constants are facts about the engines, found by tabulating their kernels.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_linger.core.errors import ConfigError

INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1


# --- fixed point ------------------------------------------------------------------------------


def rounding_shift(x: Tensor, shift: int | Tensor) -> Tensor:
    """Return ``floor(x / 2^shift + 0.5)``, for ``shift <= 0`` the exact product ``x * 2^-shift``.

    Args:
        x: int64 tensor; the result has to fit as well.
        shift: A number, or an int64 tensor that broadcasts with ``x``; 63 at most.
    """
    if isinstance(shift, int):
        if shift <= 0:
            return x << -shift
        return (x >> shift) + ((x >> (shift - 1)) & 1)
    right = shift.clamp(min=1)
    rounded = (x >> right) + ((x >> (right - 1)) & 1)
    return torch.where(shift > 0, rounded, x << (-shift).clamp(min=0))


def saturate(x: Tensor, bits: int) -> Tensor:
    """Clamp into the range of ``bits``."""
    return x.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def align(x: Tensor, fraction: int, wanted: int, bits: int) -> Tensor:
    """Bring numbers to another fraction, rounding half up, and saturate.

    Args:
        x: int64 tensor of numbers below 2^31 in magnitude.
        fraction: Their fraction bits; may be negative.
        wanted: Fraction bits of the result.
        bits: Width of the result, 32 at most.
    """
    if wanted - fraction > 32:  # everything but zero saturates
        return saturate(x.sign() << 32, bits)
    # Beyond 63 nothing but the rounding half of a negative number could be left, and it is not.
    return saturate(rounding_shift(x, min(fraction - wanted, 63)), bits)


def _bit_length(x: Tensor) -> Tensor:
    """Return the bit length of whole numbers from 0 to below 2^63."""
    high, low = x >> 32, x & 0xFFFFFFFF  # each is exact in float64
    _, of_high = torch.frexp(high.double())
    _, of_low = torch.frexp(low.double())
    return torch.where(high > 0, of_high + 32, of_low).long()


# --- sigmoid and tanh -------------------------------------------------------------------------


@dataclass(frozen=True)
class Curves:
    """What one generation of engines takes and gives.

    Args:
        input_fraction: Fraction bits of operands of :func:`sigmoid` and :func:`tanh`.
        input_bits: Width of those operands.
        output_fraction: Fraction bits of their results.
    """

    input_fraction: int
    input_bits: int
    output_fraction: int


CURVES: dict[str, Curves] = {
    "venus": Curves(input_fraction=11, input_bits=16, output_fraction=15),
    "arcs": Curves(input_fraction=27, input_bits=32, output_fraction=31),
    "venusa": Curves(input_fraction=27, input_bits=32, output_fraction=58),
}


def curves_of(name: str) -> Curves:
    """Return the formats of a generation.

    Raises:
        ConfigError: If there is none of this name.
    """
    if name not in CURVES:
        msg = f"no engine kernels are called {name!r}. Allowed: {sorted(CURVES)}."
        raise ConfigError(msg)
    return CURVES[name]


@dataclass(frozen=True)
class _Segments:
    """Straight lines on ``|x|``.

    Args:
        bands: The largest ``|x|`` of each segment.
        slopes: One per segment.
        offsets: Constant term of each segment for ``x >= 0``.
        mirrored: Constant terms for ``x < 0``, where the curve is not odd.
        shifts: How far each product is shifted right, where segments differ.
    """

    bands: tuple[int, ...]
    slopes: tuple[int, ...]
    offsets: tuple[int, ...]
    mirrored: tuple[int, ...] = ()
    shifts: tuple[int, ...] = ()


_VENUS_SIGMOID = _Segments(
    bands=(
        *(971, 1699, 2347, 2974, 3614, 4291, 5026, 5861),
        *(6831, 7864, 8987, 10375, 11594, 13168, 14730, 32768),
    ),
    slopes=(
        *(32316, 29471, 25891, 22068, 18225, 29057, 22206, 16113),
        *(10881, 27353, 16611, 9242, 4618, 20670, 8610, 693),
    ),
    offsets=(
        *(16384, 16721, 17464, 18559, 19954, 21585, 23380, 25249),
        *(27121, 28807, 30096, 31107, 31839, 32199, 32502, 32724),
    ),
    mirrored=(
        *(16384, 16047, 15304, 14209, 12814, 11183, 9388, 7519),
        *(5647, 3961, 2672, 1661, 929, 569, 266, 44),
    ),
    shifts=(13, 13, 13, 13, 13, 14, 14, 14, 14, 16, 16, 16, 16, 19, 19, 19),
)
_VENUS_TANH = _Segments(
    bands=(
        *(512, 888, 1226, 1558, 1899, 2264, 2670, 3146),
        *(3734, 4297, 4761, 5466, 6151, 7193, 8093, 32768),
    ),
    slopes=(
        *(32266, 29154, 25374, 21309, 17272, 26886, 19904, 13765),
        *(8599, 19497, 12047, 7324, 3373, 26820, 5531, 337),
    ),
    offsets=(
        *(0, 778, 2417, 4851, 7922, 11474, 15334, 19335),
        *(23303, 26699, 28653, 30026, 31344, 31981, 32565, 32725),
    ),
    shifts=(11, 11, 11, 11, 11, 12, 12, 12, 12, 14, 14, 14, 14, 18, 18, 18),
)
_SIGMOID_BANDS = (
    *(63656107, 111395083, 153816608, 194953701, 236865036, 281253298, 329433241, 384154475),
    *(447714743, 515399149, 589016819, 679940425, 759830874, 862986200, 965402453, 2147483648),
)
_SIGMOID_SLOPES = (
    *(529475578, 482862538, 424212188, 361565531, 298613704, 238039992, 181912633, 132002182),
    *(89144402, 56020914, 34019888, 18928477, 9459126, 5291645, 2204341, 177654),
)
_TANH_BANDS = (
    *(33584191, 58182438, 80361293, 102120620, 124483371, 148392654, 174972063, 206183541),
    *(244722657, 281591256, 312045360, 358241226, 403095772, 471425623, 530372454, 2147483648),
)
_TANH_SLOPES = (
    *(2114623134, 1910645334, 1662969581, 1396521636, 1131979061, 881027392, 652221876, 451080022),
    *(281798391, 159724746, 98692663, 60001039, 27632752, 13732196, 2832019, 172634),
)
_SIGMOID = {
    "arcs": _Segments(
        _SIGMOID_BANDS,
        _SIGMOID_SLOPES,
        offsets=(
            *(1073741824, 1095849221, 1144526551, 1216321063, 1307759740, 1414659140),
            *(1532274042, 1654777693, 1777444109, 1887935281, 1972419725, 2038648643),
            *(2086619912, 2110212774, 2130063364, 2144640936),
        ),
        mirrored=(
            *(1073741824, 1051634427, 1002957097, 931162585, 839723908, 732824508),
            *(615209606, 492705955, 370039539, 259548367, 175063923, 108835005),
            *(60863736, 37270874, 17420284, 2842712),
        ),
    ),
    "venusa": _Segments(
        _SIGMOID_BANDS,
        _SIGMOID_SLOPES,
        offsets=(
            *(134217728, 136981152, 143065818, 152040132, 163469967, 176832392),
            *(191534255, 206847211, 222180513, 235991910, 246552465, 254831080),
            *(260827489, 263776596, 266257920, 268080117),
        ),
        mirrored=(
            *(134217728, 131454303, 125369637, 116395323, 104965488, 91603063),
            *(76901200, 61588244, 46254942, 32443545, 21882990, 13604375),
            *(7607967, 4658859, 2177535, 355339),
        ),
    ),
}
_TANH = {
    "arcs": _Segments(
        _TANH_BANDS,
        _TANH_SLOPES,
        offsets=(
            *(0, 51039676, 158405367, 317937954, 519217264, 751968259, 1004938252, 1267155516),
            *(1527203771, 1749783808, 1877830237, 1967785133, 2054179492, 2095926998),
            *(2134212723, 2144721503),
        ),
    ),
    "venusa": _Segments(
        _TANH_BANDS,
        _TANH_SLOPES,
        offsets=(
            *(0, 6379959, 19800670, 39742244, 64902158, 93996032, 125617281, 158394439),
            *(190900471, 218722976, 234728779, 245973141, 256772436, 261990874),
            *(266776590, 268090187),
        ),
    ),
}


def _of_segment(values: tuple[int, ...], segment: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device=segment.device)[segment]


def _segment(magnitude: Tensor, bands: tuple[int, ...]) -> Tensor:
    """Return the first segment that holds each magnitude."""
    edges = torch.tensor(bands, dtype=torch.int64, device=magnitude.device)
    return torch.bucketize(magnitude, edges)


def sigmoid(x: Tensor, curves: str) -> Tensor:
    """Return the engine's sigmoid.

    Args:
        x: int64 tensor of ``input_bits`` numbers with ``input_fraction`` (:class:`Curves`).
        curves: ``venus`` (Q11 to Q15), ``arcs`` (Q27 to Q31) or ``venusa`` (Q27 to Q58).

    Returns:
        int64 tensor of the shape of ``x`` with ``output_fraction``. It differs from the real
        function by up to 20.7 steps of Q15 (venus), 5.7e-4 (arcs, venusa).

    Raises:
        ConfigError: If there are no kernels of this name.
    """
    curves_of(curves)
    table = _VENUS_SIGMOID if curves == "venus" else _SIGMOID[curves]
    segment = _segment(x.abs(), table.bands)
    offsets = torch.where(
        x < 0, _of_segment(table.mirrored, segment), _of_segment(table.offsets, segment)
    )
    product = _of_segment(table.slopes, segment) * x
    if curves == "venus":
        return (product >> _of_segment(table.shifts, segment)) + offsets
    if curves == "arcs":
        return (product >> 27) + offsets
    return product + (offsets << 30)


def tanh(x: Tensor, curves: str) -> Tensor:
    """Return the engine's hyperbolic tangent (see :func:`sigmoid`; off by up to 1.3e-3)."""
    curves_of(curves)
    table = _VENUS_TANH if curves == "venus" else _TANH[curves]
    magnitude = x.abs()
    if curves == "venus":
        magnitude = magnitude.clamp(max=32767)
    sign = torch.where(x < 0, -1, 1)
    segment = _segment(magnitude, table.bands)
    product = _of_segment(table.slopes, segment) * magnitude * sign
    offsets = _of_segment(table.offsets, segment) * sign
    if curves == "venus":
        return (product >> _of_segment(table.shifts, segment)) + offsets
    if curves == "arcs":
        return (product >> 27) + offsets
    return product + (offsets << 30)


def to_fraction(y: Tensor, curves: str, fraction: int) -> Tensor:
    """Bring what :func:`sigmoid` or :func:`tanh` gave to fewer fraction bits.

    Args:
        y: Their result.
        curves: The same as theirs.
        fraction: Fraction bits of the result: 15 inside recurrent layers, 7 for 8-bit results.

    Returns:
        Whole numbers in ``[-2^fraction, 2^fraction - 1]``.

    Raises:
        ConfigError: If the kernel has fewer fraction bits.
    """
    given = curves_of(curves).output_fraction
    if not 0 <= fraction <= given:
        msg = f"the kernels of {curves!r} give {given} fraction bits. Found: {fraction}."
        raise ConfigError(msg)
    return saturate(rounding_shift(y, given - fraction), fraction + 1)


def straight_lines(function: str, curves: str) -> list[tuple[int, int, int]]:
    """Return :func:`sigmoid` or :func:`tanh` as straight lines, for a faster evaluation.

    Args:
        function: ``sigmoid`` or ``tanh``.
        curves: ``arcs`` or ``venusa``.

    Returns:
        ``(largest x, slope, constant)`` of each line, by rising ``x``. With 58 fraction bits the
        result is ``slope * x + constant``; rounded to fewer than 31 it equals :func:`to_fraction`
        before that saturates.

    Raises:
        ConfigError: If the kernels of this name are no such lines.
    """
    tables = {"sigmoid": _SIGMOID, "tanh": _TANH}[function]
    if curves not in tables:
        msg = f"no straight lines are called {curves!r}. Allowed: {sorted(tables)}."
        raise ConfigError(msg)
    table = tables[curves]
    shift = 58 - 31 if curves == "arcs" else 30
    mirrored = table.mirrored or tuple(-offset for offset in table.offsets)
    ends_below = [-band - 1 for band in table.bands[:-1]]
    below = zip([-1, *ends_below], table.slopes, mirrored, strict=True)
    above = zip(table.bands, table.slopes, table.offsets, strict=True)
    return [
        (end, slope, offset << shift) for end, slope, offset in (*reversed(list(below)), *above)
    ]


# --- gelu and silu ----------------------------------------------------------------------------

# Two slopes per segment: for x >= 0 and for x < 0.
_GELU = _Segments(
    bands=(
        *(14115017, 28375324, 42953268, 58054959, 73951497, 91038024, 109967415, 132036451),
        *(160959227, 226844274, 267242587, 306191336, 350131144, 407973369, 516356188, 2147483648),
    ),
    slopes=(
        *(72728288, 83897176, 94867369, 105507160, 115674329, 125208681, 133918928, 141554901),
        *(147729276, 151456513, 147845039, 143733750, 139917095, 136824421, 134818073, 134217887),
    ),
    mirrored=(
        *(61489440, 50320552, 39350359, 28710568, 18543399, 9009047, 298800, -7337173),
        *(-13511548, -17238785, -13627311, -9516022, -5699367, -2606693, -600345, -159),
    ),
    offsets=(
        *(-10758, -157495, -447240, -872623, -1421992, -2078164, -2815981, -3596982),
        *(-4354386, -4913744, -4157062, -3134007, -2046605, -1040047, -281784, -3183),
    ),
)
_SILU = _Segments(
    bands=(
        *(24654376, 49696796, 75597255, 102943334, 132562612, 165787474, 205189411, 257698662),
        *(386828914, 411601113, 503293022, 600623812, 719278864, 886211418, 1200463913),
        2147483648,
    ),
    slopes=(
        *(73253038, 85425077, 97268252, 108569000, 119102644, 128623281, 136842248, 143368061),
        *(147330902, 146163034, 144088169, 140854555, 138082720, 135988566, 134689659, 134226579),
    ),
    mirrored=(
        *(60964690, 48792651, 36949476, 25648728, 15115084, 5594447, -2624520, -9150333),
        *(-13113174, -11945306, -9870441, -6636827, -3864992, -1770838, -471931, -8851),
    ),
    offsets=(
        *(-18406, -297641, -845322, -1640240, -2649106, -3823039, -5089876, -6333243),
        *(-7277526, -6866303, -6053889, -4539545, -2991709, -1593178, -528753, -24754),
    ),
)


def gelu(x: Tensor) -> Tensor:
    """Return GELU as venusA computes it, Q27 to Q27 with 32 bits."""
    return _even_offset_curve(x, _GELU)


def silu(x: Tensor) -> Tensor:
    """Return SiLU (swish) as venusA computes it, Q27 to Q27 with 32 bits."""
    return _even_offset_curve(x, _SILU)


def _even_offset_curve(x: Tensor, table: _Segments) -> Tensor:
    segment = _segment(x.abs(), table.bands)
    slopes = torch.where(
        x < 0, _of_segment(table.mirrored, segment), _of_segment(table.slopes, segment)
    )
    total = x * slopes + (_of_segment(table.offsets, segment) << 30)
    return saturate(rounding_shift(total, 27), 32)


# --- softmax ----------------------------------------------------------------------------------

_LOG2_E = 774541002  # log2(e) in Q29
_EXP2 = (57364, 446161, 2008107, 5813551, 8388575)  # polynomial of 2^x for x in [-1, 0), Q23
_ONE = 1 << 23


def softmax(x: Tensor, curves: str) -> Tensor:
    """Return the engine's softmax over the last axis.

    Args:
        x: int64 tensor of 32-bit numbers in Q25.
        curves: ``venus``, ``arcs`` or ``venusa``.

    Returns:
        int64 tensor in Q15, from 0 to 2^15.

    Raises:
        ConfigError: If there are no kernels of this name.
    """
    curves_of(curves)
    top = x.amax(-1, keepdim=True)
    if curves == "venusa":
        top = top.clamp(min=INT32_MIN + 1)
    below = x - top
    if curves != "venusa":
        below = saturate(below, 32)
    powers = rounding_shift(below * _LOG2_E, 31)  # Q23
    whole = (powers >> 23) + 1
    rest = (powers & (_ONE - 1)) - _ONE
    if curves == "venusa":
        terms = _exp2_wide(rest, whole)
    else:
        mantissas = torch.full_like(rest, _EXP2[0])
        for coefficient in _EXP2[1:]:
            mantissas = rounding_shift(mantissas * rest, 23) + coefficient
        terms = mantissas << whole.clamp(min=0) >> (-whole).clamp(0, 63)
    terms = saturate(terms, 32)
    total = terms.sum(-1, keepdim=True).clamp(max=INT32_MAX)
    if curves == "venus":
        return saturate(rounding_shift(_newton_reciprocal(total) * terms, 31), 32)
    # Thirty steps of a restoring division of one by the total.
    quotient = 2 * torch.div(1 << 52, total, rounding_mode="floor")
    return rounding_shift(quotient * terms, 38)


def _exp2_wide(rest: Tensor, whole: Tensor) -> Tensor:
    """Return ``2^(rest + whole)`` with 30 more bits kept inside than the other engines keep."""
    mantissas = torch.full_like(rest, _EXP2[0])
    for coefficient in _EXP2[1:-1]:
        mantissas = rounding_shift((mantissas * rest << 7) + (coefficient << 30), 30)
    total = (mantissas * rest << 7) + (_EXP2[-1] << 30)
    shift = 30 - whole
    return torch.where(shift > 63, 0, rounding_shift(total, shift.clamp(max=63)))


def _newton_reciprocal(total: Tensor) -> Tensor:
    """Return ``2^46 / total`` for ``total`` from 1 to 2^31 - 1, in two Newton steps."""
    shift = 23 - _bit_length(total)
    x = torch.where(shift >= 0, total << shift.clamp(min=0), total >> (-shift).clamp(min=0))
    shift = shift + 1
    inverse = 0xBB5000 - x
    for _ in range(2):
        error = 2 * (0x400000 - rounding_shift(x * inverse, 23))
        inverse = inverse + rounding_shift(inverse * error, 23)
    scaled = torch.where(
        shift >= 0, inverse << shift.clamp(min=0), inverse >> (-shift).clamp(min=0)
    )
    return saturate(scaled, 32)


@functools.cache
def _venus_log() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return the logarithm of every Q15 number from 1 to 2^15, in Q25, as the engine has it.

    Measured; the file holds second differences, which compress well.
    """
    path = Path(__file__).with_name("data") / "venus_log.npz"
    with np.load(path) as file:
        first = np.cumsum(np.concatenate([file["slope"], file["curvature"]]).astype(np.int64))
        table: np.ndarray[tuple[int], np.dtype[np.int64]] = np.cumsum(
            np.concatenate([file["start"].astype(np.int64), first])
        )
    table.setflags(write=False)
    return table


def log_softmax(x: Tensor) -> Tensor:
    """Return the logarithm of :func:`softmax` over the last axis as venus computes it.

    Args:
        x: int64 tensor of 32-bit numbers in Q25.

    Returns:
        int64 tensor in Q25, at most 0; the logarithm of a probability of 0 is -2^31.
    """
    probabilities = softmax(x, "venus")
    table = torch.from_numpy(np.minimum(_venus_log(), 0)).to(x.device)
    logarithms = table[(probabilities - 1).clamp(0, 2**15 - 1)]
    return torch.where(probabilities > 0, logarithms, INT32_MIN)


# --- square roots -----------------------------------------------------------------------------


@functools.cache
def _inverse_roots() -> tuple[int, ...]:
    """Return ``floor(2^14 / sqrt(m))`` for mantissas ``m = (256 + i) / 1024``, at most 2^15 - 1."""
    roots = []
    for i in range(768):
        # 2^14 / sqrt((256 + i) / 1024) = sqrt(2^38 / (256 + i)), in whole numbers.
        root = int((2**38 // (256 + i)) ** 0.5)
        while (root + 1) ** 2 * (256 + i) <= 2**38:
            root += 1
        while root**2 * (256 + i) > 2**38:
            root -= 1
        roots.append(min(2**15 - 1, root))
    return tuple(roots)


def reciprocal_sqrt(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the engine's inverse square root by table, as layer norms use it.

    Args:
        x: int64 tensor of numbers from 0 to below 2^62.

    Returns:
        Two int64 tensors of the shape of ``x``, value and shift: ``n / sqrt(x)`` is
        ``rounding_shift(n * value, shift)`` in Q15. A shift that is not positive means no shift.
        The value has ten significant bits of ``x`` in it.
    """
    pair = (_bit_length(x) - 1).clamp(min=0) >> 1
    move = 2 * pair - 8
    mantissa = torch.where(move >= 0, x >> move.clamp(min=0), x << (-move).clamp(min=0))
    mantissa = torch.where(x > 0, mantissa, 256)
    exponent = torch.where(x > 0, pair + 1, 0)
    return _of_segment(_inverse_roots(), mantissa - 256), exponent - 1
