"""Gradients of recurrent layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_leaves

import lightning_linger as linger
from lightning_linger import QuantConfig
from tests.models import trained
from tests.ops.recurrent.layers import LAYERS, plain


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
@pytest.mark.parametrize(("kind", "options"), [*LAYERS, ("LSTM", {"proj_size": 3})])
def test_gradients_of_wide_codes_point_where_the_float_ones_do(kind, options, platform):
    model = plain(kind, 4, 6, 2, bidirectional=True, **options)
    reference = copy.deepcopy(model)
    x = torch.randn(6, 3, 4)
    bits = QuantConfig(platform=platform, weight_bits=16, activation_bits=16, output_bits=16)
    trained(model, x, config=bits)
    model.train()
    outputs = []
    for network in (model, reference):
        y = tree_leaves(network(x))
        sum((leaf * (k + 1)).sum() for k, leaf in enumerate(y)).backward()
        outputs.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    # The last codes at the ends of the range pass no gradient.
    assert F.cosine_similarity(*outputs, dim=0) > 0.97


def test_frozen_weights_and_plain_inputs_may_want_no_gradient():
    model = plain("LSTM", 4, 6)
    model.rnn.weight_hh_l0.requires_grad_(False)
    x = torch.randn(5, 3, 4, requires_grad=True)
    linger.quantize(linger.prepare(model, (x.detach(),)))
    for _ in range(2):
        model(x)[0].sum().backward()
    assert model.rnn.weight_hh_l0.grad is None
    assert model.rnn.weight_ih_l0.grad.abs().sum() > 0
    assert x.grad.abs().sum() > 0


def test_evaluation_gives_gradients_where_they_are_wanted():
    model = trained(plain("GRU", 4, 6), torch.randn(5, 3, 4))
    x = torch.randn(5, 3, 4, requires_grad=True)
    with torch.no_grad():
        expected = model(x)[0]
    found = model(x)[0]
    assert torch.equal(found, expected)
    found.sum().backward()
    assert x.grad.abs().sum() > 0
