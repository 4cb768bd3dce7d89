"""Range limits: reading them, and their two gradients."""

import pytest
import torch

from lightning_linger import ConfigError, Limit
from lightning_linger.core.limits import bound_of, limited


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (8, Limit("static", 8.0)),
        (0.5, Limit("static", 0.5)),
        ("7*mean", Limit("mean", 7.0)),
        ("2.5 * mean", Limit("mean", 2.5)),
        ("99.9%", Limit("percentile", 99.9)),
        ("100 %", Limit("percentile", 100.0)),
        (Limit("mean", 3.0), Limit("mean", 3.0)),
    ],
)
def test_parse(spec: object, expected: Limit) -> None:
    assert Limit.parse(spec) == expected


@pytest.mark.parametrize(
    "spec",
    [
        *(0, -1.0, float("nan"), float("inf"), True, "8", "mean", "mean*7", "-7*mean", "0*mean"),
        *(
            "101%",
            "0%",
            "-5%",
            "%",
            "",
            None,
            [8],
            Limit("percentile", 101.0),
            Limit("static", 0.0),
        ),
    ],
)
def test_parse_refuses(spec: object) -> None:
    with pytest.raises(ConfigError, match="limit"):
        Limit.parse(spec)


@pytest.mark.parametrize("spec", ["1.2.3*mean", "..%", "1..5%"])
def test_parse_refuses_what_only_looks_like_a_number(spec: str) -> None:
    with pytest.raises(ConfigError, match="limit"):
        Limit.parse(spec)


def test_bounds() -> None:
    x = torch.tensor([-4.0, 1.0, 2.0, -3.0])
    assert bound_of(x, Limit.parse(1.5)).item() == 1.5
    assert bound_of(x, Limit.parse("1.2*mean")).item() == pytest.approx(3.0)
    assert bound_of(x, Limit.parse("75%")).item() == 3.0
    assert bound_of(x, Limit.parse("100%")).item() == 4.0
    assert bound_of(x, Limit.parse("0.001%")).item() == 1.0


@pytest.mark.parametrize(
    ("gradient", "expected"),
    [("zero", [0.0, 5.0, 5.0, 0.0]), ("pull", [-0.01, 5.0, 5.0, 0.01])],
)
@pytest.mark.parametrize("spec", [2.0, "0.8*mean", "50%"])
def test_gradient_outside(spec: float | str, gradient: str, expected: list[float]) -> None:
    # All three bounds lie at 2: the mean of the absolute values is 2.5, the median is 2.
    x = torch.tensor([-6.0, -0.5, 1.5, 2.0, 2.5], requires_grad=True)
    if spec == "50%":
        x = torch.tensor([-6.0, -0.5, 1.5, 2.0], requires_grad=True)
    limited_x = limited(x, Limit.parse(spec), gradient)
    limited_x.backward(torch.full_like(x, 5.0))
    low_inside_high = [x.grad[0].item(), x.grad[1].item()]
    assert low_inside_high == pytest.approx(expected[:2])
    assert limited_x.abs().max() <= 2.0 + 1e-6


@pytest.mark.parametrize("gradient", ["zero", "pull"])
def test_static_limit(gradient: str) -> None:
    x = torch.tensor([-3.0, -1.0, 0.5, 3.0], requires_grad=True)
    y = limited(x, Limit("static", 2.0), gradient)
    assert y.tolist() == [-2.0, -1.0, 0.5, 2.0]
    y.backward(torch.tensor([7.0, 7.0, 7.0, 7.0]))
    outside = [-0.01, 0.01] if gradient == "pull" else [0.0, 0.0]
    assert x.grad.tolist() == pytest.approx([outside[0], 7.0, 7.0, outside[1]])


def test_pull_brings_values_back() -> None:
    """Gradient descent along the pull moves values towards the limit, whatever the loss says."""
    x = torch.tensor([-3.0, 3.0], requires_grad=True)
    limited(x, Limit("static", 2.0), "pull").sum().backward()
    assert (x - 10 * x.grad).abs().max() < 3.0


def test_no_limit() -> None:
    x = torch.randn(3)
    assert limited(x, None, "zero") is x


def test_input_is_left_alone() -> None:
    x = torch.tensor([-3.0, 3.0])
    for spec in (1.0, "1*mean", "50%"):
        for gradient in ("zero", "pull"):
            limited(x, Limit.parse(spec), gradient)
    assert x.tolist() == [-3.0, 3.0]
