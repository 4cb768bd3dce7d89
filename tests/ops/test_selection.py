"""Extremes, order and the larger of two, against references in Python's own numbers."""

import itertools
from fractions import Fraction

import onnx
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.integer import code_limits, payload_dtype, requantize
from lightning_linger.export import export_onnx
from lightning_linger.ops.selection import (
    integer_amax,
    integer_argmax,
    integer_max,
    integer_maximum,
    integer_topk,
)
from tests.models import Lambda, train

few = settings(max_examples=60, deadline=None)
either = st.booleans()


@st.composite
def tensors(draw):
    """Codes with many ties, and a dimension."""
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    bits = draw(st.sampled_from([2, 3, 8, 16]))
    low, high = code_limits(bits)
    values = draw(st.lists(st.integers(low, high), min_size=1, max_size=3))
    picked = [draw(st.sampled_from([*values, low, high])) for _ in range(torch.Size(shape).numel())]
    x = torch.tensor(picked, dtype=payload_dtype(bits)).reshape(shape)
    return x, draw(st.integers(0, len(shape) - 1))


def along(x, dim):
    """Rows along a dimension, by the place of their result."""
    for place in itertools.product(*(range(n) for d, n in enumerate(x.shape) if d != dim)):
        index = (*place[:dim], slice(None), *place[dim:])
        yield place, x[index].tolist()


# --- kernels ----------------------------------------------------------------------------------


@few
@given(tensors(), either, either)
def test_extremes_and_their_first_places(drawn, largest, keepdim):
    x, dim = drawn
    values, indices = integer_max(x, dim, keepdim, largest, "venusa")
    places = integer_argmax(x, dim, keepdim, largest, "venusa")
    reduced = integer_amax(x, [dim], keepdim, largest, "venusa")
    assert values.dtype == reduced.dtype == x.dtype
    assert indices.dtype == torch.int64
    assert torch.equal(places, indices)
    assert torch.equal(reduced, values)
    if keepdim:
        assert values.shape[dim] == 1
        values, indices = values.squeeze(dim), indices.squeeze(dim)
    for place, row in along(x, dim):
        extreme = max(row) if largest else min(row)
        assert int(values[place]) == extreme
        assert int(indices[place]) == row.index(extreme)


@few
@given(tensors(), either, st.data())
def test_order_keeps_ties_in_place(drawn, largest, data):
    x, dim = drawn
    k = data.draw(st.integers(1, x.shape[dim]))
    values, indices = integer_topk(x, k, dim, largest, "venusa")
    for place, row in along(x, dim):
        order = sorted(range(len(row)), key=lambda i: -row[i] if largest else row[i])[:k]
        index = (*place[:dim], slice(None), *place[dim:])
        assert indices[index].tolist() == order
        assert values[index].tolist() == [row[i] for i in order]


@few
@given(tensors(), either)
def test_the_larger_of_two(drawn, largest):
    x, dim = drawn
    y = x.flip(dim).narrow(dim, 0, 1)
    found = integer_maximum(x, y, largest, "venusa")
    choose = max if largest else min
    wide = y.expand_as(x)
    for place in itertools.product(*map(range, x.shape)):
        assert int(found[place]) == choose(int(x[place]), int(wide[place]))


# --- ops --------------------------------------------------------------------------------------


class Two(nn.Module):
    """A function of two linear layers of the input, one of them much larger."""

    def __init__(self, function, size, factor=1.0):
        super().__init__()
        self.a, self.b = nn.Linear(size, size), nn.Linear(size, size)
        self.b.weight.data.mul_(factor)
        self.function = function

    def forward(self, x):
        return self.function(self.a(x), self.b(x))


def quantized(model, x, platform="venusa", **fields):
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform=platform, **fields))
    train(model, (x,), 1, 0.0)
    return model.eval()


def one(function, size):
    return Lambda(lambda self, x: function(self.fc(x)), fc=nn.Linear(size, size))


def sites_of(model):
    return {site.op.kind: site for site in instrumentation_of(model).sites}


def as_tuple(result):
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)


def both(model, x):
    with torch.no_grad():
        fake = model(x)
        with linger.integer(model):
            return fake, model(x)


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        (lambda y: y.max(), torch.Tensor),
        (lambda y: torch.max(y, 1), torch.return_types.max),
        (lambda y: y.max(dim=-1, keepdim=True), torch.return_types.max),
        (lambda y: torch.min(y, 1, True), torch.return_types.min),
        (lambda y: y.topk(2), torch.return_types.topk),
        (lambda y: torch.topk(y, k=2, dim=1, largest=False, sorted=False), torch.return_types.topk),
        (lambda y: y.sort(), torch.return_types.sort),
        (lambda y: torch.sort(y, dim=0, descending=True, stable=True), torch.return_types.sort),
        (lambda y: y.argmax(), torch.Tensor),
        (lambda y: torch.argmin(y, keepdim=True), torch.Tensor),
        (lambda y: torch.amax(y, dim=(0, 1)), torch.Tensor),
        (lambda y: y.amin(-1, keepdim=True), torch.Tensor),
    ],
)
def test_results_are_of_the_types_of_torch(function, kind):
    x = torch.randn(4, 5)
    model = quantized(one(function, 5), x)
    with torch.no_grad():
        expected = function(model.fc(x))
    for found in both(model, x):
        assert isinstance(found, kind)
        pairs = zip(*(as_tuple(r) for r in (found, expected)), strict=True)
        for mine, reference in pairs:
            assert mine.shape == reference.shape
            assert mine.dtype == reference.dtype
            if mine.is_floating_point():
                assert (mine - reference).abs().max() < 0.05
    site = next(iter(set(sites_of(model)) - {"linear"}))
    assert sites_of(model)[site].quantized


def test_equal_codes_have_equal_places_in_both_systems():
    """Two bits leave hardly anything but ties."""
    x = torch.randn(50, 8)
    for function in (
        lambda y: y.argmax(-1),
        lambda y: y.max(-1).indices,
        lambda y: y.topk(4).indices,
        lambda y: y.sort(-1, descending=True).indices,
    ):
        model = quantized(one(function, 8), x, activation_bits=2, output_bits=2)
        fake, integer = both(model, x)
        assert fake.dtype == integer.dtype == torch.int64
        assert torch.equal(fake, integer)
        assert sites_of(model)["linear"].output.grid.bits == 2


def test_values_keep_the_scale_of_the_operand():
    x = torch.randn(4, 6)
    model = quantized(one(lambda y: y.max(1).values, 6), x)
    fake, integer = both(model, x)
    step = float(sites_of(model)["linear"].output.step())
    assert torch.equal(fake, integer)
    assert torch.equal(fake / step, torch.round(fake / step))


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
@pytest.mark.parametrize("function", [torch.maximum, torch.minimum, torch.max, torch.min])
def test_two_operands_meet_at_the_coarser_step(platform, function):
    x = torch.randn(40, 6)
    model = quantized(Two(function, 6, factor=7.0), x, platform)
    fake, integer = both(model, x)
    assert torch.equal(fake, integer)
    kinds = sites_of(model)
    steps = [
        float(site.output.step())
        for site in instrumentation_of(model).sites
        if site.op.kind == "linear"
    ]
    codes = fake / max(steps)
    assert torch.allclose(codes, torch.round(codes), atol=1e-3)
    assert kinds[function.__name__].quantized


def test_bringing_operands_together_rounds_once():
    codes = torch.arange(-128, 128).to(torch.int8)
    found = requantize(codes, 2.0**-6, 2.0**-4, 8, 8, "half_up", "venusa")
    expected = [(Fraction(c, 4) + Fraction(1, 2)).__floor__() for c in codes.tolist()]
    assert found.tolist() == expected


def test_a_plain_operand_gets_a_quantizer():
    x = torch.randn(4, 6)
    model = quantized(one(lambda y: torch.maximum(y, torch.full((6,), 0.3)), 6), x)
    site = sites_of(model)["maximum"]
    assert list(site.inputs) == ["1"]
    fake, integer = both(model, x)
    assert torch.equal(fake, integer)
    assert fake.min() > 0.25


def test_gradients_pass_through_the_rounding_of_operands():
    x = torch.randn(6, 4)
    model = quantized(Two(torch.maximum, 4, factor=9.0), x)
    y = model(x)
    y.sum().backward()
    with torch.no_grad():
        first = (model.a(x) > model.b(x)).float()
    clear = ((model.a(x) - model.b(x)).abs() > 0.2).all(0)
    assert torch.allclose(model.a.bias.grad[clear], first.sum(0)[clear])


def test_an_output_argument_stays_float():
    x = torch.randn(4, 6)
    model = one(lambda y: torch.amax(y, 1, out=torch.empty(0)), 6).requires_grad_(False)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform="venusa"))
    assert sites_of(model)["amax"].why_float == "`out=` has no integer form"


def test_indices_that_nobody_reads_are_not_exported(tmp_path):
    x = torch.randn(4, 6)
    model = quantized(one(lambda y: y.max(1).values, 6), x)
    path = export_onnx(model, (x,), tmp_path / "model.onnx", "linger")
    ops = [node.op_type for node in onnx.load(path).graph.node]
    assert "MaxPool" in ops
    assert "ArgMax" not in ops


@pytest.mark.parametrize("optimized", [True, False])
def test_equal_codes_have_equal_places_in_onnxruntime(optimized, tmp_path):
    x = torch.randn(50, 8)

    def function(y):
        places = (y.argmax(-1), y.argmin(0), y.max(-1).indices, y.min(0, keepdim=True).indices)
        order = (*y.topk(5), *y.topk(3, largest=False), *y.sort(), *y.sort(0, descending=True))
        return (*places, *order)

    fields = {"activation_bits": 2, "output_bits": 2, "scale": "power_of_two"}
    model = quantized(one(function, 8), x, "onnxruntime", **fields)
    path = tmp_path / "model.onnx"
    export_onnx(model, (x,), path, "qdq")
    options = ort.SessionOptions()
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    _, expected = both(model, x)
    assert len(found) == len(expected)
    for mine, reference in zip(found, expected, strict=True):
        assert torch.equal(torch.from_numpy(mine), reference)
