"""TFLite's integer arithmetic against what its compiled reference kernels printed."""

import gzip
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_linger.ops import tflite

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


def test_the_file_holds_every_record() -> None:
    counts = {kind: len(records) for kind, records in RECORDS.items()}
    assert counts == {
        **{"M": 20000, "S": 140, "G": 140, "N": 140},
        **{"L": 35, "T": 35, "H": 35, "A": 60, "U": 60},
    }


def test_requantizations() -> None:
    by_multiplier: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    for x, real, m, shift, result in RECORDS["M"]:
        assert tflite.quantize_multiplier(float(real)) == (int(m), int(shift))
        by_multiplier[int(m), int(shift)].append((int(x), int(result)))
    for multiplier, pairs in by_multiplier.items():
        x, expected = torch.tensor(pairs).unbind(1)
        found = tflite.multiply_by_quantized_multiplier(x, *multiplier)
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("kind", "function"), [("S", tflite.softmax), ("G", tflite.log_softmax)])
def test_softmaxes(kind: str, function: object) -> None:
    for scale, size, *values in RECORDS[kind]:
        n = int(size)
        found = function(codes(values[:n]), float(scale))  # type: ignore[operator]
        assert torch.equal(found.long(), codes(values[n:]))


def test_l2_normalization() -> None:
    for zero_point, size, *values in RECORDS["N"]:
        n = int(size)
        found = tflite.l2_normalization(codes(values[:n]), int(zero_point))
        assert torch.equal(found.long(), codes(values[n:]))


@pytest.mark.parametrize(("kind", "function"), [("L", tflite.logistic), ("T", tflite.tanh)])
def test_curves(kind: str, function: object) -> None:
    for scale, zero_point, *values in RECORDS[kind]:
        found = function(ALL_CODES, float(scale), int(zero_point))  # type: ignore[operator]
        assert torch.equal(found.long(), codes(values))


def test_hard_swish() -> None:
    for scale_x, scale_o, zero_x, zero_o, *values in RECORDS["H"]:
        found = tflite.hard_swish(
            ALL_CODES, (float(scale_x), float(scale_o)), (int(zero_x), int(zero_o))
        )
        assert torch.equal(found.long(), codes(values))


@pytest.mark.parametrize(("kind", "function"), [("A", tflite.add), ("U", tflite.mul)])
def test_sums_and_products(kind: str, function: object) -> None:
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
def test_high_product(a: int, b: int) -> None:
    product = a * b
    expected = _truncated(product + (2**30 if product >= 0 else 1 - 2**30), 2**31)
    found = tflite.saturating_rounding_doubling_high_mul(torch.tensor(a), torch.tensor(b))
    assert int(found) == min(expected, 2**31 - 1)


@given(st.integers(-(2**31), 2**31 - 1), st.integers(0, 31))
def test_rounding_division(x: int, exponent: int) -> None:
    half = 2**exponent // 2
    expected = _truncated(x + (half if x >= 0 else -half), 2**exponent)
    assert int(tflite.rounding_divide_by_power_of_two(torch.tensor(x), exponent)) == expected


@pytest.mark.parametrize(
    ("real", "expected"),
    [
        *((0.0, (0, 0)), (0.5, (2**30, 0)), (0.25, (2**30, -1)), (1.0, (2**30, 1))),
        *((3.0, (1610612736, 2)), (1 - 2**-40, (2**30, 1)), (2.0**-33, (0, 0))),
    ],
)
def test_multipliers(real: float, expected: tuple[int, int]) -> None:
    assert tflite.quantize_multiplier(real) == expected


def test_a_scale_is_a_float32_number() -> None:
    x = torch.tensor([3, 4, 0, -12])
    single = float(np.float32(0.1))
    assert torch.equal(tflite.softmax(x, 0.1), tflite.softmax(x, single))
