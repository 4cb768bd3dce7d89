"""Tensors that no range fits well, through every part: zeros, constants, tiny and single values."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.fake_quantize import fake_quantize
from lightning_linger.core.ranges import LEARNED, STATISTICS
from tests.models import Chain, assert_integer_exact, site_of

WEIGHTS: dict[str, Any] = {
    "zeros": torch.zeros_like,
    "constant": lambda w: torch.full_like(w, -0.37),
    "denormal": lambda w: torch.full_like(w, 2.0**-140) * torch.sign(w),
    "single": lambda w: (
        torch.zeros_like(w).flatten().index_fill(0, torch.tensor([1]), 3.0).view_as(w)
    ),
    "huge": lambda w: w * 1e4,
}
INPUTS: dict[str, Any] = {
    "zeros": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, 0.7),
    "denormal": lambda x: torch.full_like(x, 2.0**-140),
    "normal": lambda x: x,
}


@settings(max_examples=40)
@given(
    weight=st.sampled_from(sorted(WEIGHTS)),
    values=st.sampled_from(sorted(INPUTS)),
    inputs=st.sampled_from([1, 4]),
    granularity=st.sampled_from(["tensor", "channel", "input_channel", 1]),
    weight_range=st.sampled_from([*STATISTICS, "99%", "lsq", "tqt"]),
    range=st.sampled_from([*(f"ema_{name}" for name in STATISTICS), *LEARNED]),
    gradient_bits=st.sampled_from([None, 4]),
    bits=st.integers(2, 16),
)
def test_degenerate_tensors_train_and_run_in_integers(
    weight: str,
    values: str,
    inputs: int,
    granularity: Any,
    weight_range: str,
    range: str,
    gradient_bits: int | None,
    bits: int,
) -> None:
    if granularity in ("input_channel", 1) and weight_range in LEARNED:
        granularity = "tensor"
    torch.manual_seed(0)
    # With one input, every output channel and every group is a single value.
    model = Chain(nn.Linear(inputs, 3), nn.ReLU(), nn.Linear(3, 2))
    x = INPUTS[values](torch.randn(5, inputs))
    with torch.no_grad():
        model.net[0].weight.copy_(WEIGHTS[weight](model.net[0].weight))
    linger.prepare(model, (x,))
    linger.quantize(
        model,
        QuantConfig(
            weight_bits=bits,
            granularity=granularity,
            weight_range=weight_range,
            range=range,
            gradient_bits=gradient_bits,
        ),
    )
    for _ in (0, 1):
        model(x).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    model.eval()
    with torch.no_grad():
        assert torch.isfinite(model(x)).all()
        # Zero is on every grid.
        assert site_of(model, "net.0/linear/0").inputs["0"](torch.zeros(3)).tolist() == [0.0] * 3
    assert_integer_exact(model, x)


@settings(max_examples=30)
@given(
    weights=st.integers(2, 16),
    activations=st.integers(2, 16),
    outputs=st.integers(2, 16),
    biases=st.integers(8, 32),
    gradients=st.integers(2, 16),
)
def test_row08_any_width_for_each_item(
    weights: int, activations: int, outputs: int, biases: int, gradients: int
) -> None:
    torch.manual_seed(0)
    model = Chain(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.randn(16, 6)
    linger.prepare(model, (x,))
    fields = {
        "weight_bits": weights,
        "activation_bits": activations,
        "output_bits": outputs,
        "bias_bits": biases,
        "gradient_bits": gradients,
    }
    linger.quantize(model, linger.preset("nics_fix"), overrides={"net.0": fields})
    model(x).sum().backward()
    for name, node in site_of(model, "net.0/linear/0").gradients.items():
        codes = model.net[0].get_parameter(name).grad / node.grid.step(node.estimator.absmax())
        assert torch.equal(codes, codes.round())
        assert 2 ** (gradients - 1) >= codes.abs().max() > 2 ** (gradients - 2) - 1
    seen: list[Tensor] = []
    model.net[2].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    model.eval()
    with torch.no_grad():
        model(x)
    site = site_of(model, "net.0/linear/0")
    codes = seen[0] / site.output.latest_step
    assert torch.equal(codes, codes.round())
    assert codes.max() <= 2 ** (outputs - 1) - 1
    prepared = site.prepared["weights"].codes.long()
    assert -(2 ** (weights - 1)) <= prepared.min() <= prepared.max() < 2 ** (weights - 1)
    # A narrow bias makes the step of the weight coarser, so that it fits.
    assert biases < 24 or prepared.abs().max() >= 2 ** (weights - 2)
    assert site.inputs["0"].grid.bits == activations
    assert_integer_exact(model, x)


@pytest.mark.parametrize("rounding", ["half_even", "half_up", "floor", "ceil", "half_away"])
def test_a_value_further_out_never_has_a_smaller_code(rounding: str) -> None:
    x = torch.linspace(-5, 5, 4001)
    y = fake_quantize(x, 2.0**-4, -16, 15, rounding)
    assert (y.diff() >= 0).all()
