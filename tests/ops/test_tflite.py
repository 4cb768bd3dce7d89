"""TFLite's integer arithmetic against what its compiled reference kernels printed."""

import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_linger.core.fixed_point import (
    multiply_by_quantized_multiplier,
    multiply_wide,
    quantize_multiplier,
    quantize_multipliers,
    rounding_divide_by_power_of_two,
    saturating_rounding_doubling_high_mul,
    wrapped,
)
from lightning_linger.ops import tflite
from lightning_linger.ops.results import outward_by_rounding_twice

FILE = Path(__file__).parents[1] / "data" / "golden" / "tflite_probe.txt.gz"
ALL_CODES = torch.arange(-128, 128)


def _records() -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = defaultdict(list)
    for line in gzip.decompress(FILE.read_bytes()).decode().splitlines():
        kind, *values = line.split()
        found[kind].append(values)
    return found


RECORDS = _records()


def codes(values: list[str]) -> torch.Tensor:
    return torch.tensor([int(v) for v in values])


def test_row67_the_file_holds_every_record() -> None:
    counts = {kind: len(records) for kind, records in RECORDS.items()}
    assert counts == {
        **{"M": 20000, "S": 140, "G": 140, "N": 140},
        **{"L": 35, "T": 35, "H": 35, "A": 60, "U": 60},
    }


def test_row67_requantizations() -> None:
    by_multiplier: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for x, real, m, shift, result in RECORDS["M"]:
        assert quantize_multiplier(float(real)) == (int(m), int(shift))
        by_multiplier[int(m), int(shift)].append((int(x), int(result)))
    for multiplier, pairs in by_multiplier.items():
        x, expected = torch.tensor(pairs).unbind(1)
        found = multiply_by_quantized_multiplier(x, *multiplier)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "function"), [("S", tflite.softmax), ("G", tflite.log_softmax)])
def test_row67_softmaxes(kind: str, function: object) -> None:
    for scale, size, *values in RECORDS[kind]:
        n = int(size)
        found = function(codes(values[:n]), float(scale))  # type: ignore[operator]
        assert torch.equal(found.long(), codes(values[n:]))


def test_row67_l2_normalization() -> None:
    for zero_point, size, *values in RECORDS["N"]:
        n = int(size)
        found = tflite.l2_normalization(codes(values[:n]), int(zero_point))
        assert torch.equal(found.long(), codes(values[n:]))


@pytest.mark.parametrize(("kind", "function"), [("L", tflite.logistic), ("T", tflite.tanh)])
def test_row67_curves(kind: str, function: object) -> None:
    for scale, zero_point, *values in RECORDS[kind]:
        found = function(ALL_CODES, float(scale), int(zero_point))  # type: ignore[operator]
        assert torch.equal(found.long(), codes(values))


def test_row67_hard_swish() -> None:
    for scale_x, scale_o, zero_x, zero_o, *values in RECORDS["H"]:
        found = tflite.hard_swish(
            ALL_CODES, (float(scale_x), float(scale_o)), (int(zero_x), int(zero_o))
        )
        assert torch.equal(found.long(), codes(values))


@pytest.mark.parametrize(("kind", "function"), [("A", tflite.add), ("U", tflite.mul)])
def test_row67_sums_and_products(kind: str, function: object) -> None:
    for record in RECORDS[kind]:
        scales = tuple(map(float, record[:3]))
        zero_points = tuple(map(int, record[3:6]))
        n, values = int(record[6]), record[7:]
        x, y, expected = (codes(values[i * n : (i + 1) * n]) for i in range(3))
        found = function(x, y, scales, zero_points)  # type: ignore[operator]
        assert torch.equal(found.long(), expected)


# --- against plain Python integers --------------------------------------------------------------


def _truncated(a: int, b: int) -> int:
    return abs(a) // b * (1 if a >= 0 else -1)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1))
def test_row66_high_product(a: int, b: int) -> None:
    product = a * b
    expected = _truncated(product + (2**30 if product >= 0 else 1 - 2**30), 2**31)
    found = saturating_rounding_doubling_high_mul(torch.tensor(a), torch.tensor(b))
    assert int(found) == min(expected, 2**31 - 1)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(0, 31))
def test_row66_rounding_division(x: int, exponent: int) -> None:
    half = 2**exponent // 2
    expected = _truncated(x + (half if x >= 0 else -half), 2**exponent)
    assert int(rounding_divide_by_power_of_two(torch.tensor(x), exponent)) == expected


@pytest.mark.parametrize(
    ("real", "expected"),
    [
        *((0.0, (0, 0)), (0.5, (2**30, 0)), (0.25, (2**30, -1)), (1.0, (2**30, 1))),
        *((3.0, (1610612736, 2)), (1 - 2**-40, (2**30, 1)), (2.0**-33, (0, 0))),
    ],
)
def test_row66_multipliers(real: float, expected: tuple[int, int]) -> None:
    assert quantize_multiplier(real) == expected


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (1, 2**30, 1),
        (-1, 2**30, 0),
        (3, 2**30, 2),
        (-3, 2**30, -1),
        (-(2**31), -(2**31), 2**31 - 1),
    ],
)
def test_row66_halves_of_a_high_product_go_up(a: int, b: int, expected: int) -> None:
    found = saturating_rounding_doubling_high_mul(torch.tensor(a), torch.tensor(b))
    assert int(found) == expected


@pytest.mark.parametrize(
    ("x", "exponent", "expected"), [(-3, 1, -2), (-1, 1, -1), (1, 1, 1), (10, 2, 3), (-6, 2, -2)]
)
def test_row66_halves_of_a_shift_go_away_from_zero(x: int, exponent: int, expected: int) -> None:
    assert int(rounding_divide_by_power_of_two(torch.tensor(x), exponent)) == expected


@pytest.mark.parametrize(
    ("real", "x", "expected"),
    [
        (0.5, 5, 3),
        (0.5, -5, -2),
        (0.3, 1000, 300),
        (0.007247427341846, 12345, 89),
        (0.007247427341846, -12345, -89),
    ],
)
def test_row66_multiplications(real: float, x: int, expected: int) -> None:
    m, shift = quantize_multiplier(real)
    assert int(multiply_by_quantized_multiplier(torch.tensor(x), m, shift)) == expected


@given(st.integers(-(2**24), 2**24), st.floats(2.0**-20, 1.0))
def test_row76_a_single_rounding(x: int, real: float) -> None:
    m, shift = quantize_multiplier(real)
    found = multiply_by_quantized_multiplier(torch.tensor(x), m, shift, "single")
    assert int(found) == (x * m + 2 ** (30 - shift)) >> (31 - shift)


@given(st.integers(-(2**40), 2**40), st.floats(2.0**-24, 1.0))
def test_row80_a_product_of_64_bits(x: int, real: float) -> None:
    m, shift = quantize_multiplier(real)
    reduced = (m + 2**15) >> 16 if m < 0x7FFF0000 else 0x7FFF
    expected = (x * reduced + 2 ** (14 - shift)) >> (15 - shift)
    assert int(multiply_wide(torch.tensor(x), m, shift)) == expected


@given(st.lists(st.tuples(st.integers(-(2**20), 2**20), st.floats(2.0**-24, 30.0)), min_size=1))
def test_row66_multipliers_per_channel(pairs: list[tuple[int, float]]) -> None:
    x = torch.tensor([value for value, _ in pairs])
    m, shift = quantize_multipliers([real for _, real in pairs], x)
    found = multiply_by_quantized_multiplier(x, m, shift)
    one_by_one = [
        int(multiply_by_quantized_multiplier(torch.tensor(value), *quantize_multiplier(real)))
        for value, real in pairs
    ]
    assert found.tolist() == one_by_one


@given(
    accumulators=st.lists(st.integers(-400, 400), min_size=1, max_size=40),
    ratios=st.lists(st.floats(1e-3, 3.0), min_size=1, max_size=4),
)
def test_row66_training_rounds_real_values_as_the_engine_does_twice(
    accumulators: list[int], ratios: list[float]
) -> None:
    x = torch.tensor(accumulators)[:, None]
    m, shift = quantize_multipliers(ratios, x)
    expected = multiply_by_quantized_multiplier(x, m, shift)
    step = 0.75
    product = torch.tensor(ratios, dtype=torch.float64) * step
    real = x * product
    moved = real + outward_by_rounding_twice(real, product, step)
    codes = torch.trunc(moved / step + torch.copysign(torch.tensor(0.5).double(), moved))
    # Where a rounding is all but a tie, the multiplier's 31 bits decide.
    finer = real / step * 2.0 ** (-shift).clamp(min=0)
    clear = (finer.abs() % 1.0 - 0.5).abs() > 1e-5
    assert torch.equal(codes[clear].long(), expected[clear])


def test_row66_a_product_beyond_a_register_wraps() -> None:
    assert int(wrapped(torch.tensor(2**31))) == -(2**31)
    assert int(wrapped(torch.tensor(-(2**31) - 1))) == 2**31 - 1


# The examples of single operators.
CODES = torch.tensor([0, 1, 2, 3, -128, 127])
SPARSE = torch.tensor([-128, -64, -1, 0, 1, 64, 127])
NARROW = torch.tensor([-128, -60, -30, 0, 30, 60, 127])
EXAMPLES = {
    "row67-softmax": (tflite.softmax(CODES, 0.0235294), [-117, -117, -117, -117, -127, 83]),
    "row67-four-equal": (tflite.softmax(torch.full((4,), 5), 0.1), [-64] * 4),
    "row67-log-softmax": (tflite.log_softmax(CODES, 0.0235294), [76, 76, 77, 77, 28, 124]),
    "row67-logistic": (tflite.logistic(SPARSE, 0.05, 0), [-128, -118, -3, 0, 3, 118, 127]),
    "row67-tanh": (tflite.tanh(SPARSE, 0.05, 0), [-128, -128, -6, 0, 6, 127, 127]),
    "row67-l2": (tflite.l2_normalization(torch.tensor([3, 4, 0, -12]), 0), [30, 39, 0, -118]),
    "row67-l2-of-one": (tflite.l2_normalization(torch.tensor([4, 3, 3]), 3), [127, 0, 0]),
    "row67-l2-of-minus-one": (tflite.l2_normalization(torch.tensor([0, -1]), 0), [0, -128]),
    "row67-hard-swish": (
        tflite.hard_swish(NARROW, (0.05, 0.05), (0, 0)),
        [0, 0, -8, 0, 23, 60, 127],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples(name: str) -> None:
    found, expected = EXAMPLES[name]
    assert found.tolist() == expected


def test_a_scale_is_a_float32_number() -> None:
    x = torch.tensor([3, 4, 0, -12])
    single = float(np.float32(0.1))
    assert torch.equal(tflite.softmax(x, 0.1), tflite.softmax(x, single))
