"""Integer kernels against an independent int64 reference, on random and extreme codes."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lightning_linger  # noqa: F401 - registers the ops

OPS = torch.ops.linger
BITS = [4, 8, 16]
SHIFTS = [-3, 0, 1, 5, 9]


def codes(bits: int, *shape: int, extreme: bool = False) -> Tensor:
    """Random codes, or codes of the two ends only."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if extreme:
        drawn = torch.where(torch.rand(shape) < 0.5, low, high)
    else:
        drawn = torch.randint(low, high + 1, shape)
    return drawn.to(_dtype(bits))


def _dtype(bits: int) -> torch.dtype:
    return torch.int8 if bits <= 8 else torch.int16 if bits <= 16 else torch.int32


def _limits(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def shifted(acc: np.ndarray, shift: int, bits: int, low: int | None = None) -> np.ndarray:
    """Divide by ``2^shift`` with half-up rounding in integers, and saturate."""
    acc = acc.astype(np.int64)
    moved = acc << -shift if shift <= 0 else (acc + (1 << (shift - 1))) >> shift
    bottom, top = _limits(bits)
    return np.clip(moved, bottom if low is None else low, top)


def divided(sums: np.ndarray, count: Any, bits: int) -> np.ndarray:
    """Divide with half-up rounding in integers."""
    return np.clip(np.floor_divide(2 * sums + count, 2 * count), *_limits(bits))


def same(found: Tensor, expected: np.ndarray, bits: int) -> None:
    assert found.dtype == _dtype(bits)
    assert np.array_equal(found.numpy().astype(np.int64), expected)


# --- reference convolution ------------------------------------------------------------------


def correlate(
    x: np.ndarray, w: np.ndarray, stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> np.ndarray:
    """Correlate ``[N, C, ...]`` with ``[O, C / groups, ...]`` in int64; no padding."""
    x, w = x.astype(np.int64), w.astype(np.int64)
    spatial = w.shape[2:]
    sizes = [
        (x.shape[2 + d] - dilation[d] * (spatial[d] - 1) - 1) // stride[d] + 1
        for d in range(len(spatial))
    ]
    out = np.zeros((x.shape[0], w.shape[0], *sizes), dtype=np.int64)
    per_group = w.shape[0] // groups
    for o in range(w.shape[0]):
        group = o // per_group
        part = x[:, group * w.shape[1] : (group + 1) * w.shape[1]]
        for tap in itertools.product(*(range(k) for k in spatial)):
            window = tuple(
                slice(t * d, t * d + s * (n - 1) + 1, s)
                for t, d, s, n in zip(tap, dilation, stride, sizes, strict=True)
            )
            patch = part[(slice(None), slice(None), *window)]
            kernel = w[(o, slice(None), *tap)].reshape(1, -1, *([1] * len(spatial)))
            out[:, o] += (patch * kernel).sum(axis=1)
    return out


def transposed(
    x: np.ndarray,
    w: np.ndarray,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
) -> np.ndarray:
    """Scatter every input value through ``[C, O / groups, ...]``, then crop."""
    x, w = x.astype(np.int64), w.astype(np.int64)
    spatial = w.shape[2:]
    full = [
        (x.shape[2 + d] - 1) * stride[d] + dilation[d] * (spatial[d] - 1) + 1 + output_padding[d]
        for d in range(len(spatial))
    ]
    per_group = x.shape[1] // groups
    out = np.zeros((x.shape[0], w.shape[1] * groups, *full), dtype=np.int64)
    for c in range(x.shape[1]):
        group = c // per_group
        target = slice(group * w.shape[1], (group + 1) * w.shape[1])
        for tap in itertools.product(*(range(k) for k in spatial)):
            window = tuple(
                slice(t * d, t * d + s * (n - 1) + 1, s)
                for t, d, s, n in zip(tap, dilation, stride, x.shape[2:], strict=True)
            )
            kernel = w[(c, slice(None), *tap)].reshape(1, -1, *([1] * len(spatial)))
            out[(slice(None), target, *window)] += x[:, c : c + 1] * kernel
    crop = tuple(slice(p, n - p) for p, n in zip(padding, full, strict=True))
    return out[(slice(None), slice(None), *crop)]


CONVOLUTIONS = [
    pytest.param(
        dims,
        is_transposed,
        bits_x,
        bits_w,
        bits_o,
        id=f"{'t' if is_transposed else ''}{dims}d-{bits_x}x{bits_w}to{bits_o}",
    )
    for dims in (1, 2, 3)
    for is_transposed in (False, True)
    for bits_x, bits_w, bits_o in [
        (4, 4, 4),
        (8, 8, 8),
        (8, 4, 16),
        (16, 8, 8),
        (16, 16, 16),
        (8, 8, 32),
    ]
]


@pytest.mark.parametrize("extreme", [False, True], ids=["random", "extreme"])
@pytest.mark.parametrize(("dims", "is_transposed", "bits_x", "bits_w", "bits_o"), CONVOLUTIONS)
def test_conv(
    dims: int, is_transposed: bool, bits_x: int, bits_w: int, bits_o: int, extreme: bool
) -> None:
    size = {1: (9,), 2: (6, 7), 3: (4, 5, 4)}[dims]
    for groups, stride, padding, dilation in [(1, 1, 0, 1), (2, 2, 1, 1), (2, 1, 2, 2)]:
        x = codes(bits_x, 2, 4, *size, extreme=extreme)
        shape = (4, 6 // groups) if is_transposed else (6, 4 // groups)
        w = codes(bits_w, *shape, *([2] * dims), extreme=extreme)
        bias = torch.randint(-(2**12), 2**12, (6,), dtype=torch.int32)
        geometry = [(value,) * dims for value in (stride, padding, dilation)]
        if is_transposed:
            extra = (1 if stride > 1 else 0,) * dims
            acc = transposed(
                x.numpy(), w.numpy(), geometry[0], geometry[1], extra, geometry[2], groups
            )
        else:
            extra = (0,) * dims
            pads = [(0, 0), (0, 0), *([(padding, padding)] * dims)]
            acc = correlate(np.pad(x.numpy(), pads), w.numpy(), geometry[0], geometry[2], groups)
        acc += bias.numpy().reshape(1, -1, *([1] * dims))
        for shift in [0] if bits_o == 32 else SHIFTS[1:]:
            low, high = _limits(bits_o)
            found = OPS.conv(
                *(x, w, bias, *geometry, groups, is_transposed, extra),
                *(2.0**-7, [2.0**-5], 2.0 ** (shift - 12), bits_x, bits_w, bits_o),
                *(low, high, "half_up", "venusa", bits_x + bits_w <= 12),
            )
            same(found, shifted(acc, shift, bits_o), bits_o)


@pytest.mark.parametrize(
    "bits", [(4, 4, 8), (8, 8, 8), (8, 16, 16), (16, 16, 8), (16, 8, 32)], ids=str
)
@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7)], ids=["2d", "3d"])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
def test_linear(bits: tuple[int, int, int], shape: tuple[int, ...], with_bias: bool) -> None:
    bits_x, bits_w, bits_o = bits
    for extreme, shift in itertools.product((False, True), [0] if bits_o == 32 else SHIFTS[1:]):
        x, w = codes(bits_x, *shape, extreme=extreme), codes(bits_w, 3, 7, extreme=extreme)
        bias = torch.randint(-(2**12), 2**12, (3,), dtype=torch.int32) if with_bias else None
        acc = x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T
        if bias is not None:
            acc = acc + bias.numpy()
        low, high = _limits(bits_o)
        found = OPS.linear(
            *(x, w, bias, 0.5, [0.25], 0.125 * 2.0**shift, bits_x, bits_w, bits_o),
            *(low, high, "half_up", "venusa", False),
        )
        same(found, shifted(acc, shift, bits_o), bits_o)


def test_linear_behind_a_relu_edge_and_as_float() -> None:
    x, w = codes(8, 6, 5), codes(8, 4, 5)
    acc = x.numpy().astype(np.int64) @ w.numpy().astype(np.int64).T
    common = (x, w, None, 0.5, [0.25])
    clamped = OPS.linear(*common, 16.0, 8, 8, 8, 0, 100, "half_up", "venusa", True)
    assert np.array_equal(clamped.numpy(), np.clip(shifted(acc, 7, 8), 0, 100))
    real = OPS.linear(*common, 0.0, 8, 8, 0, 0, 0, "half_up", "venusa", True)
    assert real.dtype == torch.float32
    assert np.array_equal(real.numpy(), (acc * 0.125).astype(np.float32))


def test_scales_per_channel() -> None:
    x, w = codes(8, 2, 3, 5, 5), codes(8, 4, 3, 3, 3)
    shifts = [3, 5, 7, 9]
    acc = correlate(x.numpy(), w.numpy(), (1, 1), (1, 1), 1)
    found = OPS.conv(
        *(x, w, None, (1, 1), (0, 0), (1, 1), 1, False, (0, 0), 1.0, [2.0**-s for s in shifts]),
        *(1.0, 8, 8, 8, -128, 127, "half_up", "venusa", True),
    )
    expected = np.stack([shifted(acc[:, c], shift, 8) for c, shift in enumerate(shifts)], axis=1)
    same(found, expected, 8)


@pytest.mark.parametrize("bits", [(8, 8, 8), (16, 16, 16), (16, 8, 8), (4, 8, 16)], ids=str)
def test_scale_shift(bits: tuple[int, int, int]) -> None:
    bits_x, bits_w, bits_o = bits
    for extreme, shift in itertools.product((False, True), SHIFTS[1:]):
        x, w = codes(bits_x, 3, 5, 4, 2, extreme=extreme), codes(bits_w, 5, extreme=extreme)
        bias = torch.randint(-(2**20), 2**20, (5,), dtype=torch.int32)
        acc = x.numpy().astype(np.int64) * w.numpy().astype(np.int64).reshape(1, -1, 1, 1)
        acc += bias.numpy().reshape(1, -1, 1, 1)
        found = OPS.scale_shift(
            *(x, w, bias, 0.5, [0.5], 0.25 * 2.0**shift, bits_x, bits_w, bits_o),
            *(*_limits(bits_o), "half_up", "venusa", False),
        )
        same(found, shifted(acc, shift, bits_o), bits_o)


@pytest.mark.parametrize("sign", [1, -1], ids=["add", "sub"])
@pytest.mark.parametrize(
    "bits", [(4, 4, 4), (8, 8, 8), (16, 16, 16), (8, 16, 8), (4, 8, 16)], ids=str
)
def test_add_rounds_and_saturates_each_operand(bits: tuple[int, int, int], sign: int) -> None:
    bits_x, bits_y, bits_o = bits
    for extreme, a, b in itertools.product((False, True), SHIFTS, SHIFTS):
        x, y = codes(bits_x, 200, extreme=extreme), codes(bits_y, 200, extreme=extreme)
        expected = shifted(x.numpy(), a, bits_o) + sign * shifted(y.numpy(), b, bits_o)
        found = OPS.add(
            *(x, y, sign, 2.0**-a, 2.0**-b, 1.0, bits_o, *_limits(bits_o)),
            *("half_up", "venusa", True),
        )
        same(found, np.clip(expected, *_limits(bits_o)), bits_o)


def test_add_broadcasts() -> None:
    x, y = codes(8, 2, 3, 4), codes(8, 3, 1)
    found = OPS.add(x, y, 1, 1.0, 1.0, 1.0, 8, -128, 127, "half_up", "venusa", True)
    same(found, np.clip(x.numpy().astype(int) + y.numpy().astype(int), -128, 127), 8)


@pytest.mark.parametrize(
    "bits", [(4, 4, 8), (8, 8, 8), (8, 16, 16), (16, 16, 16), (16, 16, 8)], ids=str
)
def test_mul(bits: tuple[int, int, int]) -> None:
    bits_x, bits_y, bits_o = bits
    for extreme, shift in itertools.product((False, True), [0, 1, 4, 8, 14, 16]):
        x, y = codes(bits_x, 500, extreme=extreme), codes(bits_y, 500, extreme=extreme)
        acc = x.numpy().astype(np.int64) * y.numpy().astype(np.int64)
        found = OPS.mul(
            *(x, y, 0.5, 0.25, 0.125 * 2.0**shift, bits_o, *_limits(bits_o)),
            *("half_up", "venusa"),
        )
        same(found, shifted(acc, shift, bits_o), bits_o)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_cat(bits: int) -> None:
    for extreme in (False, True):
        parts = [codes(bits, 2, n, 3, extreme=extreme) for n in (1, 2, 3)]
        shifts = [0, 1, 4]
        found = OPS.cat(parts, 1, [2.0**-s for s in shifts], 1.0, bits, "half_up", "venusa")
        expected = [shifted(p.numpy(), s, bits) for p, s in zip(parts, shifts, strict=True)]
        same(found, np.concatenate(expected, axis=1), bits)


@pytest.mark.parametrize("bits_x", [4, 8, 16, 32])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_requantize(bits_x: int, bits: int) -> None:
    for extreme, shift in itertools.product((False, True), [-4, -1, 0, 1, 3, 8, 12]):
        low, high = _limits(bits_x)
        x = (
            codes(bits_x, 300, extreme=extreme)
            if bits_x < 32
            else torch.randint(low, high, (300,), dtype=torch.int32)
        )
        found = OPS.requantize(x, 2.0**-shift, 1.0, bits_x, bits, "half_up", "venusa")
        same(found, shifted(x.numpy(), shift, bits), bits)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_quantize_and_dequantize(bits: int) -> None:
    x = torch.randint(-(2**18), 2**18, (500,)).float() / 8 * 0.25
    low, high = _limits(bits)
    found = OPS.quantize(x, 0.25, bits, low, high, "half_up", "venusa")
    numerators = (x.double() * 4 * 8).long().numpy()
    same(found, shifted(numerators, 3, bits), bits)
    assert torch.equal(OPS.dequantize(found, 0.25, "venusa"), found.float() * 0.25)


def test_dequantize_of_wide_codes_rounds_once() -> None:
    x = torch.tensor([2**31 - 1, -(2**31), 2**24 + 1, 16777219], dtype=torch.int32)
    found = OPS.dequantize(x, 2.0**-10, "venusa")
    assert torch.equal(found, (x.double() * 2.0**-10).float())


def _windows(
    x: np.ndarray,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    fill: int,
) -> np.ndarray:
    """``[N, C, H, W, kernel...]`` windows of a padded image."""
    pads = [(0, 0), (0, 0), (padding[0], padding[0]), (padding[1], padding[1])]
    padded = np.pad(x.astype(np.int64), pads, constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))
    return windows[:, :, :: stride[0], :: stride[1]]


POOLS = [
    ((2, 2), (2, 2), (0, 0)),
    ((3, 3), (2, 1), (1, 1)),
    ((3, 2), (1, 2), (1, 0)),
    ((7, 7), (1, 1), (0, 0)),
]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), POOLS, ids=str)
def test_avg_pool(bits: int, kernel: Any, stride: Any, padding: Any) -> None:
    for extreme, include in itertools.product((False, True), (False, True)):
        x = codes(bits, 2, 3, 7, 8, extreme=extreme)
        found = OPS.avg_pool(
            x, kernel, stride, padding, False, include, 0, 1.0, 1.0, bits, "half_up", "venusa"
        )
        sums = _windows(x.numpy(), kernel, stride, padding, 0).sum((-1, -2))
        counts = _windows(np.ones((1, 1, 7, 8)), kernel, stride, padding, int(include)).sum(
            (-1, -2)
        )
        same(found, divided(sums, counts, bits), bits)
        found = OPS.avg_pool(
            x, kernel, stride, padding, False, include, 5, 1.0, 1.0, bits, "half_up", "venusa"
        )
        same(found, divided(sums, 5, bits), bits)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_avg_pool_with_ceil_mode(dims: int, include: bool) -> None:
    """Windows that reach over the edge: torch's own average in float64 says what they divide by."""
    x = codes(8, 2, 3, *([7] * dims))
    pool = getattr(torch.nn.functional, f"avg_pool{dims}d")
    for kernel, stride, padding in [(2, 2, 0), (3, 2, 1), (4, 3, 2)]:
        real = pool(x.double(), kernel, stride, padding, True, include)
        found = OPS.avg_pool(
            *(x, [kernel] * dims, [stride] * dims, [padding] * dims, True, include, 0),
            *(1.0, 1.0, 8, "half_up", "venusa"),
        )
        assert torch.equal(found.double(), torch.floor(real + 0.5 + 1e-9).clamp(-128, 127))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dims", [(1,), (2, 3), (1, 2, 3), (3,)], ids=str)
def test_mean(bits: int, dims: tuple[int, ...]) -> None:
    for extreme, keepdim in itertools.product((False, True), (False, True)):
        x = codes(bits, 2, 3, 5, 7, extreme=extreme)
        sums = x.numpy().astype(np.int64).sum(dims, keepdims=keepdim)
        count = int(np.prod([x.shape[d] for d in dims]))
        found = OPS.mean(x, dims, keepdim, 1.0, bits, "half_up", "venusa")
        same(found, divided(sums, count, bits), bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("kernel", "stride", "padding"), POOLS, ids=str)
def test_max_pool(bits: int, kernel: Any, stride: Any, padding: Any) -> None:
    low = _limits(bits)[0]
    for extreme in (False, True):
        x = codes(bits, 2, 3, 7, 8, extreme=extreme)
        found = OPS.max_pool(x, kernel, stride, padding, (1, 1), False, "venusa")
        same(found, _windows(x.numpy(), kernel, stride, padding, low - 1).max((-1, -2)), bits)


@pytest.mark.parametrize("bits", BITS)
def test_clamp(bits: int) -> None:
    x = codes(bits, 300)
    for low, high in [(0, 5), (-3, 3), (0, 2 ** (bits - 1) - 1)]:
        same(OPS.clamp(x, low, high, bits, "venusa"), np.clip(x.numpy(), low, high), bits)


KERNELS: dict[str, tuple[Any, ...]] = {
    "conv": (
        codes(8, 1, 2, 5, 5),
        codes(8, 3, 2, 3, 3),
        None,
        (1, 1),
        (1, 1),
        (1, 1),
        1,
        False,
        (0, 0),
        1.0,
        [1.0],
        64.0,
        8,
        8,
        8,
        -128,
        127,
        "half_up",
        "venusa",
        True,
    ),
    "linear": (
        codes(8, 2, 5),
        codes(8, 3, 5),
        None,
        1.0,
        [1.0],
        64.0,
        8,
        8,
        16,
        -128,
        127,
        "half_up",
        "venusa",
        True,
    ),
    "scale_shift": (
        codes(8, 2, 5, 3),
        codes(8, 5),
        torch.zeros(5, dtype=torch.int32),
        1.0,
        [1.0],
        64.0,
        8,
        8,
        8,
        -128,
        127,
        "half_up",
        "venusa",
        True,
    ),
    "add": (codes(8, 4), codes(8, 4), 1, 1.0, 1.0, 2.0, 8, -128, 127, "half_up", "venusa", True),
    "mul": (codes(8, 4), codes(8, 4), 1.0, 1.0, 64.0, 8, -128, 127, "half_up", "venusa"),
    "cat": ([codes(8, 4), codes(8, 3)], 0, [1.0, 2.0], 2.0, 8, "half_up", "venusa"),
    "avg_pool": (
        codes(8, 1, 2, 5, 5),
        (2, 2),
        (2, 2),
        (0, 0),
        False,
        True,
        0,
        1.0,
        1.0,
        8,
        "half_up",
        "venusa",
    ),
    "max_pool": (codes(8, 1, 2, 5, 5), (2, 2), (2, 2), (0, 0), (1, 1), False, "venusa"),
    "mean": (codes(8, 1, 2, 5, 5), (2, 3), False, 1.0, 8, "half_up", "venusa"),
    "clamp": (codes(8, 4), 0, 5, 8, "venusa"),
    "quantize": (torch.randn(4), 0.1, 8, -128, 127, "half_up", "venusa"),
    "dequantize": (codes(8, 4), 0.5, "venusa"),
    "requantize": (codes(8, 4), 1.0, 2.0, 8, 16, "half_up", "venusa"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_well_formed_custom_ops(name: str) -> None:
    """Schema, fake kernel and mutation, as torch itself checks them."""
    torch.library.opcheck(
        getattr(OPS, name).default, KERNELS[name], test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_leave_their_inputs_alone_and_ignore_autocast(name: str) -> None:
    arguments = KERNELS[name]
    leaves = [t for t in torch.utils._pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
    before = [t.clone() for t in leaves]
    expected = getattr(OPS, name)(*arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(getattr(OPS, name)(*arguments), expected)
    assert all(torch.equal(a, b) for a, b in zip(leaves, before, strict=True))
