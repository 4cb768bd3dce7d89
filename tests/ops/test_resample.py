"""Interpolation and adaptive maxima against whole numbers counted one by one."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig, UnsupportedError
from lightning_linger.core.tags import tag_of
from lightning_linger.ops.adaptive import adaptive_windows
from lightning_linger.ops.resample import (
    WEIGHT_BITS,
    integer_resize_linear,
    linear_taps,
    nearest_places,
)
from tests.models import Chain, Lambda, assert_integer_exact, site_of, trained

ONE = 2**WEIGHT_BITS


def round_half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def round_half_even(x: Fraction) -> int:
    return round(x)


ROUND = {"half_up": round_half_up, "half_even": round_half_even}


def source_position(place: int, source: int, target: int, align: bool) -> Fraction:
    if align:
        return Fraction(place * (source - 1), target - 1) if target > 1 else Fraction(0)
    return max(Fraction((2 * place + 1) * source, 2 * target) - Fraction(1, 2), Fraction(0))


def reference(x: np.ndarray, size: tuple[int, ...], align: bool, rounding: str) -> np.ndarray:
    """Interpolate ``[N, C, ...]`` value by value, in whole numbers."""
    out = np.zeros((*x.shape[:2], *size), np.int64)
    for n, c, *place in itertools.product(*map(range, out.shape)):
        neighbours = []
        for axis, i in enumerate(place):
            source = x.shape[2 + axis]
            position = source_position(i, source, size[axis], align)
            near = min(int(position), source - 1)
            weight = round_half_up(min(position - near, Fraction(1)) * ONE)
            neighbours.append([(near, ONE - weight), (min(near + 1, source - 1), weight)])
        total = 0
        for corner in itertools.product(*neighbours):
            weight = math.prod(w for _, w in corner)
            total += weight * int(x[(n, c, *(at for at, _ in corner))])
        out[(n, c, *place)] = ROUND[rounding](Fraction(total, ONE ** len(size)))
    return out


@settings(max_examples=60)
@given(
    bits=st.sampled_from([2, 4, 8, 16]),
    sizes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7)), min_size=1, max_size=3),
    align=st.booleans(),
    rounding=st.sampled_from(sorted(ROUND)),
    extreme=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_linear_modes(
    bits: int,
    sizes: list[tuple[int, int]],
    align: bool,
    rounding: str,
    extreme: bool,
    seed: int,
) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    drawn = np.random.default_rng(seed).integers(low, high + 1, (1, 2, *(s for s, _ in sizes)))
    codes = np.where(drawn < 0, low, high) if extreme else drawn
    target = tuple(t for _, t in sizes)
    x = torch.from_numpy(codes).to(torch.int8 if bits <= 8 else torch.int16)
    found = integer_resize_linear(x, target, [0.0] * len(target), align, bits, rounding, "venusa")
    assert found.dtype == x.dtype
    assert np.array_equal(found.numpy(), reference(codes, target, align, rounding))


@pytest.mark.parametrize("factor", [0.4, 0.5, 1.3, 2.0, 2.5, 1 / 3])
def test_a_scale_factor_moves_the_source_positions(factor: float) -> None:
    first, second, weights = linear_taps(9, math.floor(9 * factor), factor, False)
    for place, taps in enumerate(zip(first, second, weights, strict=True)):
        position = max((place + Fraction(1, 2)) / Fraction(factor) - Fraction(1, 2), Fraction(0))
        near = min(math.floor(position), 8)
        assert taps[:2] == (near, min(near + 1, 8))
        assert taps[2] == round_half_up(min(position - near, Fraction(1)) * ONE)


@pytest.mark.parametrize("align", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_linear_modes_are_as_near_as_they_say(dims: int, align: bool) -> None:
    """Half a code of the result, and half a unit of each weight times what neighbours differ."""
    x = torch.randint(-128, 128, (1, 1, *[6] * dims))
    mode = ("linear", "bilinear", "trilinear")[dims - 1]
    real = F.interpolate(x.double(), size=(11,) * dims, mode=mode, align_corners=align)
    found = integer_resize_linear(
        x.to(torch.int8), (11,) * dims, [0.0] * dims, align, 8, "half_up", "venusa"
    )
    bound = 0.5 + 255 * dims / (2 * ONE)
    assert (found.double() - real).abs().max() <= bound


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("source", [1, 2, 3, 7, 16, 31])
def test_nearest_places_are_those_of_torch(source: int, mode: str) -> None:
    image = torch.arange(source, dtype=torch.float32).expand(1, 1, 2, source)
    for target in (*range(1, 40), 64, 100):
        found = F.interpolate(image, size=(2, target), mode=mode)[0, 0, 0]
        assert found.tolist() == list(nearest_places(source, target, 0.0, mode, image=True))
    for factor in (0.5, 0.7, 1.0, 1.3, 1.5, 2.0, 2.7, 3.0):
        target = math.floor(source * factor)
        if target:
            found = F.interpolate(image, scale_factor=(1.0, factor), mode=mode)[0, 0, 0]
            assert found.tolist() == list(nearest_places(source, target, factor, mode, image=True))


@settings(max_examples=60)
@given(source=st.integers(1, 20), target=st.integers(1, 20), seed=st.integers(0, 999))
def test_adaptive_windows(source: int, target: int, seed: int) -> None:
    x = torch.randint(-128, 128, (source,), generator=torch.Generator().manual_seed(seed))
    windows = adaptive_windows(source, target)
    assert len({len(window) for window in windows}) == 1
    found = [max(x[place].item() for place in window) for window in windows]
    assert found == F.adaptive_max_pool1d(x.float().view(1, 1, -1), target).flatten().tolist()


# --- in a model -------------------------------------------------------------------------------


def on_conv(function: object) -> nn.Module:
    return Lambda(lambda self, x: function(self.conv(x)), conv=nn.Conv2d(3, 4, 3, padding=1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale_factor": 2},
        {"size": (9, 5), "mode": "nearest-exact"},
        {"scale_factor": 1.7, "mode": "bilinear"},
        {"size": 13, "mode": "bilinear", "align_corners": True},
    ],
    ids=str,
)
def test_the_scale_stays(arguments: dict[str, object]) -> None:
    x = torch.randn(2, 3, 6, 6)
    model = trained(on_conv(lambda a: F.interpolate(a, **arguments)), x)
    y = model(x)
    tag = tag_of(y)
    assert tag is not None
    assert tag.site == "/interpolate/0"
    assert tag.step == site_of(model, "conv/conv2d/0").output.step()
    codes = y / tag.step
    assert torch.equal(codes, codes.round())
    assert y.shape == F.interpolate(torch.randn(2, 4, 6, 6), **arguments).shape
    assert_integer_exact(model, x)
    assert_integer_exact(model, x * 40)


@pytest.mark.parametrize("mode", ["bicubic", "area"])
def test_other_modes_stay_float_and_say_why(mode: str) -> None:
    x = torch.randn(2, 3, 6, 6)
    model = trained(on_conv(lambda a: F.interpolate(a, scale_factor=2, mode=mode)), x)
    reason = site_of(model, "/interpolate/0").why_float
    assert mode in reason
    assert "use" in reason or "call" in reason
    assert_integer_exact(model, x)


def test_antialiasing_and_indices_stay_float() -> None:
    x = torch.randn(2, 3, 6, 6)
    small = {"scale_factor": 0.5, "mode": "bilinear", "antialias": True}
    model = trained(on_conv(lambda a: F.interpolate(a, **small)), x)
    assert "antialias" in site_of(model, "/interpolate/0").why_float
    for pool in ("adaptive_max_pool2d", "max_pool2d"):
        function = getattr(F, pool)
        model = trained(on_conv(lambda a, f=function: f(a, 2, return_indices=True)), x)
        assert "indices" in site_of(model, f"/{pool}/0").why_float
        assert_integer_exact(model, x)


def test_only_linear_modes_are_beyond_the_engine() -> None:
    x = torch.randn(2, 3, 6, 6)
    config = QuantConfig(platform="arcs", strict_platform=True)
    trained(Chain(nn.Conv2d(3, 4, 1), nn.Upsample(scale_factor=2)), x, config=config)
    model = Chain(nn.Conv2d(3, 4, 1), nn.UpsamplingBilinear2d(scale_factor=2))
    with pytest.raises(UnsupportedError, match="mode='nearest'"):
        trained(model, x, config=config)


def test_the_gradient_is_that_of_the_float_function() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = trained(on_conv(lambda a: F.interpolate(a, scale_factor=1.5, mode="bilinear")), x)
    seen: list[Tensor] = []
    model.conv.register_forward_hook(lambda module, args, out: seen.append(out))
    y = model(x)
    cotangent = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, seen[0], cotangent)
    leaf = seen[0].detach().clone().requires_grad_()
    real = F.interpolate(leaf, scale_factor=1.5, mode="bilinear")
    (expected,) = torch.autograd.grad(real, leaf, cotangent)
    assert torch.equal(found, expected)


def test_training_is_at_most_a_code_away() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = trained(on_conv(lambda a: F.interpolate(a, scale_factor=1.5, mode="bilinear")), x)
    exact = model(x)
    step = tag_of(exact).step
    site = site_of(model, "/interpolate/0")
    site.train()
    apart = ((model(x) - exact) / step).abs()
    site.eval()
    assert apart.max() <= 1


def test_a_batch_of_its_own_size_runs() -> None:
    """Shapes other than those of the example, as a last batch has them."""
    x = torch.randn(4, 3, 6, 6)
    model = trained(on_conv(lambda a: F.interpolate(a, scale_factor=2.0, mode="bilinear")), x)
    for shape in ((1, 3, 6, 6), (2, 3, 9, 4)):
        assert_integer_exact(model, torch.randn(shape))
        with linger.integer(model):
            assert model(torch.randn(shape)).shape == (shape[0], 4, 2 * shape[2], 2 * shape[3])
