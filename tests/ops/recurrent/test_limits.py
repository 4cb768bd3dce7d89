"""Range limits of recurrent layers."""

import copy

import pytest
import torch

import lightning_linger as linger
from tests.models import assert_integer_exact, train
from tests.ops.recurrent.layers import LAYERS, equal, layer_site, plain


@pytest.mark.parametrize(("kind", "options"), [*LAYERS, ("LSTM", {"proj_size": 3})])
def test_limits_hold_weights_biases_and_outputs(kind, options):
    model = plain(kind, 4, 6, 2, bidirectional=True, **options)
    reference = copy.deepcopy(model.rnn)
    for name, value in reference.named_parameters():
        value.data.clamp_(*((-0.02, 0.02) if "bias" in name else (-0.1, 0.1)))
    x = torch.randn(5, 3, 4)
    with torch.no_grad():
        wanted, wanted_states = reference(x)
    limit = float(wanted.abs().max()) / 2
    linger.normalize(linger.prepare(model, (x,)), weight=0.1, bias=0.02, output=limit)
    model.eval()
    with torch.no_grad():
        y, states = model(x)
    assert torch.equal(y, wanted.clamp(-limit, limit))
    assert equal(states, wanted_states)
    model.train()
    model(x)[0].sum().backward()
    weight = model.rnn.weight_ih_l0
    assert not weight.grad[weight.abs() > 0.1].any()
    assert weight.grad[weight.abs() < 0.1].any()


@pytest.mark.parametrize("limit", [0.25, "90%", "1.5*mean"])
def test_limits_stay_in_the_quantized_stage(limit):
    model = plain("LSTM", 4, 6)
    x = torch.randn(9, 3, 4)
    linger.prepare(model, (x,))
    linger.normalize(model, weight=0.2, bias=0.1, output=limit)
    linger.quantize(model)
    train(model, (x,), 3, 0.0)
    model.eval()
    assert_integer_exact(model, x)
    with torch.no_grad():
        y = model(x)[0]
    site = layer_site(model)
    bound = site.output_limit()
    step = float(site.output.step())
    assert y.abs().max() <= bound + step
    if limit == 0.25:
        assert float(site.output.estimator.range[1]) <= 0.25
    else:
        assert bound < float(site.output.estimator.range[1])


def test_a_pulling_limit_pulls_recurrent_weights():
    model = plain("GRU", 4, 6)
    x = torch.randn(5, 3, 4)
    linger.normalize(linger.prepare(model, (x,)), weight=0.1, output=None, gradient="pull")
    model(x)[0].sum().backward()
    weight = model.rnn.weight_hh_l0
    assert torch.equal(weight.grad[weight > 0.1], torch.full_like(weight[weight > 0.1], 0.01))
