"""Ranges and tags of hidden states."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import lightning_linger as linger
from lightning_linger import QuantConfig
from tests.models import Lambda, assert_integer_exact, keys, site_of, trained
from tests.ops.recurrent.layers import each_kind, equal, layer_site, plain


@each_kind
def test_the_first_range_is_that_of_the_float_hidden_states(kind):
    model = plain(kind, 4, 6)
    x = torch.randn(7, 3, 4)
    with torch.no_grad():
        largest = model(x)[0].abs().max()
    config = QuantConfig(weight_bits=16, activation_bits=16, output_bits=16)
    linger.quantize(linger.prepare(model, (x,)), config)
    with torch.no_grad():
        model(x)
    found = layer_site(model).output.estimator
    assert found.batches == 1
    torch.testing.assert_close(found.range[1], largest, rtol=1e-3, atol=1e-3)


def test_a_range_grows_out_of_saturation():
    """The range follows what the state was before it was rounded, or it could never grow."""
    model = plain("LSTM", 4, 6)
    x = torch.randn(5, 3, 4)
    linger.quantize(linger.prepare(model, (0.01 * x,)))
    with torch.no_grad():
        model(0.01 * x)
        site = layer_site(model)
        start = float(site.output.estimator.range[1])
        for _ in range(60):
            model(5 * x)
    assert float(site.output.estimator.range[1]) > 4 * start


@pytest.mark.filterwarnings("ignore:.*a batch holds NaN or infinity")
@each_kind
def test_nan_comes_out_as_nan_and_moves_no_range(kind):
    model = plain(kind, 4, 6, 2)
    x = torch.randn(5, 3, 4)
    linger.quantize(linger.prepare(model, (x,)))
    with torch.no_grad():
        model(x)
        before = layer_site(model).output.estimator.range.clone()
        bad = x.clone()
        bad[2, 1, 0] = torch.nan
        assert model(bad)[0].isnan().all()
        model.rnn.weight_hh_l0[0, 0] = torch.nan
        assert model(x)[0].isnan().all()
    assert torch.equal(layer_site(model).output.estimator.range, before)


def test_an_empty_batch():
    model = trained(plain("GRU", 4, 6), torch.randn(5, 3, 4))
    for mode in (True, False):
        y, h = model.train(mode)(torch.zeros(5, 0, 4))
        assert (y.shape, h.shape) == ((5, 0, 6), (1, 0, 6))


def test_layers_have_a_range_each_and_directions_share_it():
    model = plain("LSTM", 4, 6, 3, bidirectional=True)
    x = torch.randn(5, 3, 4)
    trained(model, x, config=QuantConfig(activation_bits=12, output_bits=8))
    site = layer_site(model)
    assert list(site.parts) == ["hidden0", "hidden1"]
    assert [q.grid.bits for q in site.parts.values()] == [12, 12]
    assert site.output.grid.bits == 8
    without = trained(plain("LSTM", 4, 6, 2), x, config=QuantConfig(output_bits=None))
    assert list(layer_site(without).parts) == ["hidden0", "hidden1"]
    assert layer_site(without).output is None


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_last_states_of_layers_with_different_ranges_are_one_tensor(bits):
    layer = nn.RNN(4, 6, 2, nonlinearity="relu")
    layer.weight_ih_l0.data.mul_(40)
    layer.weight_ih_l1.data.mul_(0.001)
    layer.bias_ih_l1.data.mul_(0.1)
    layer.bias_hh_l1.data.zero_()
    model = Lambda(lambda self, x: self.rnn(x)[1], rnn=layer)
    x = torch.randn(5, 3, 4)
    with torch.no_grad():
        expected = model(x)
    assert expected[0].max() > 50 * expected[1].max()
    trained(model, x, config=QuantConfig(output_bits=bits))
    assert_integer_exact(model, x)
    with torch.no_grad():
        found = model(x)
    assert (found[0] - expected[0]).abs().max() < max(2.0**-bits, 0.1) * expected[0].max()


def test_initial_states_count_in_the_range():
    model = plain("RNN", 4, 6)
    for parameter in model.parameters():  # whatever is computed stays below the initial state
        parameter.data.mul_(0.1)
    x, h = 0.01 * torch.randn(3, 2, 4), torch.full((1, 2, 6), 0.9)
    linger.quantize(linger.prepare(model, (x, h)), QuantConfig(range="absmax"))
    found = layer_site(model).output.estimator
    with torch.no_grad():
        for size in (0.3, 0.6, 1.0):
            model(x, size * h)
            assert float(found.range[1]) == pytest.approx(size * 0.9)


def test_hidden_states_are_codes_and_cell_states_are_not_operands():
    def forward(self, x):
        y, (h, c) = self.rnn(x)
        return self.a(y), self.b(h[-1]), self.c(c[0])

    heads = {name: nn.Linear(6, 2) for name in "abc"}
    model = Lambda(forward, rnn=nn.LSTM(4, 6), **heads)
    x = torch.randn(5, 3, 4)
    trained(model, x)
    inputs = {key: list(site_of(model, key).inputs) for key in keys(model)}
    assert inputs == {
        "rnn/lstm/0": ["0"],
        "a/linear/0": [],
        "b/linear/0": [],
        "c/linear/0": ["0"],
    }
    assert_integer_exact(model, x)


def test_an_activation_behind_the_layer_does_not_narrow_its_state():
    model = Lambda(lambda self, x: F.relu(self.rnn(x)[0]), rnn=nn.LSTM(4, 6))
    x = torch.randn(5, 3, 4)
    trained(model, x)
    site = layer_site(model)
    assert site.output.window.low == -float("inf")
    assert not site_of(model, "/relu/0").merged
    with torch.no_grad():
        assert (model.rnn(x)[0] < 0).any()
    assert_integer_exact(model, x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_repeats_the_forward(reentrant):
    def run(model, x):
        return checkpoint(model.rnn, x, use_reentrant=reentrant)[0] if model.on else model.rnn(x)[0]

    gradients = []
    for on in (True, False):
        torch.manual_seed(0)
        model = Lambda(run, first=nn.Linear(4, 4), rnn=nn.LSTM(4, 6, 2))
        model.run = lambda self, x: run(self, self.first(x))
        model.on = on
        x = torch.randn(5, 3, 4)
        linger.quantize(linger.prepare(model, (x,)), QuantConfig(platform="onnxruntime"))
        for step in range(3):  # the range, and any step with it, moves between forward and backward
            model.zero_grad()
            model((step + 1) * x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert equal(*gradients)
