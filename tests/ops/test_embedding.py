"""Embeddings: the table as integers, its gradient, limits and refusals."""

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.integer import code_limits, payload_dtype
from lightning_linger.core.tags import tag_of
from lightning_linger.ops.embedding import integer_embedding
from tests.models import Lambda, assert_integer_exact, bits_of, site_of, train

TOKENS = torch.tensor([[1, 4, 1], [0, 6, 2]])
KEY = "embedding/embedding/0"


@settings(max_examples=40)
@given(
    bits=st.sampled_from([4, 8, 16]),
    shape=st.sampled_from([(), (3,), (2, 3)]),
    seed=st.integers(0, 1000),
)
def test_kernel_takes_rows(bits, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = code_limits(bits)
    table = torch.randint(low, high + 1, (5, 3), generator=generator).to(payload_dtype(bits))
    indices = torch.randint(5, shape, generator=generator)
    found = integer_embedding(indices, table, 0.5, bits, "venusa")
    rows = [table.tolist()[i] for i in indices.flatten().tolist()]
    assert found.dtype == table.dtype
    assert found.shape == (*shape, 3)
    assert found.reshape(-1, 3).tolist() == rows


def model_of(**fields) -> nn.Module:
    layers = {"embedding": nn.Embedding(7, 4, **fields), "linear": nn.Linear(4, 3)}
    return Lambda(lambda self, x: self.linear(self.embedding(x)), **layers)


def quantized(model: nn.Module, **fields) -> nn.Module:
    linger.prepare(model, (TOKENS,))
    linger.quantize(model, QuantConfig(**fields))
    return model


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_the_result_lies_on_the_grid_of_the_table(bits, granularity):
    model = quantized(model_of(), weight_bits=bits, activation_bits=bits, granularity=granularity)
    train(model, (TOKENS,), 1, 0.0)
    model.eval()
    found = {}
    model.embedding.register_forward_hook(lambda module, args, y: found.update(y=y))
    assert_integer_exact(model, TOKENS)
    model(TOKENS)
    step = float(tag_of(found["y"]).step)
    weight = model.embedding.weight.detach()
    low, high = code_limits(bits)
    reach = Fraction(float(weight.abs().max()))
    assert reach <= Fraction(step) * (high + 1) < 2 * reach or math.log2(step) == -31
    expected = [
        [
            max(low, min(high, math.floor(Fraction(float(w)) / Fraction(step) + Fraction(1, 2))))
            for w in weight[i]
        ]
        for i in TOKENS.flatten()
    ]
    assert bits_of(found["y"], step).view(-1, 4).tolist() == expected


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_reach_the_rows_that_were_read(sparse):
    model = quantized(model_of(padding_idx=0, sparse=sparse))
    kept = {}
    model.embedding.register_forward_hook(lambda module, args, y: kept.update(y=y))
    y = model(TOKENS)
    kept["y"].retain_grad()
    y.sum().backward()
    grad = model.embedding.weight.grad
    assert grad.is_sparse == sparse
    expected = torch.zeros(7, 4)
    for token, row in zip(TOKENS.flatten(), kept["y"].grad.view(-1, 4), strict=True):
        if token != 0:
            expected[token] += row
    torch.testing.assert_close(grad.to_dense(), expected)


def test_a_changed_table_is_not_taken_from_the_cache():
    model = quantized(model_of())
    train(model, (TOKENS,), 1, 0.0)
    model.eval()
    with torch.no_grad():
        before = model(TOKENS)
        model.embedding.weight.neg_()
        assert not torch.equal(model(TOKENS), before)
    assert_integer_exact(model, TOKENS)


def test_range_limits_act_on_the_table():
    model = model_of()
    model.embedding.weight.data.mul_(10.0)
    linger.prepare(model, (TOKENS,))
    linger.normalize(model, weight=0.5, output=None, overrides={"linear": None})
    expected = model.linear(F.embedding(TOKENS, model.embedding.weight.clamp(-0.5, 0.5)))
    torch.testing.assert_close(model(TOKENS), expected)
    linger.quantize(model)
    train(model, (TOKENS,), 1, 0.0)
    model.eval()
    found = {}
    model.embedding.register_forward_hook(lambda module, args, y: found.update(y=y))
    assert_integer_exact(model, TOKENS)
    model(TOKENS)
    assert float(tag_of(found["y"]).step) == 2.0**-8
    assert float(found["y"].detach().abs().max()) <= 0.5


def test_the_function_without_a_layer_names_the_table_first():
    layers = {"linear": nn.Linear(4, 3), "table": nn.Parameter(torch.randn(7, 4))}
    model = Lambda(lambda self, x: self.linear(torch.embedding(self.table, x)), **layers)
    quantized(model)
    train(model, (TOKENS,), 1, 0.0)
    model.eval()
    assert site_of(model, "/embedding/0").quantized
    assert_integer_exact(model, TOKENS)


def test_max_norm_is_refused():
    model = quantized(model_of(max_norm=1.0))
    assert "`max_norm`" in site_of(model, KEY).why_float


def test_a_bag_is_refused():
    layers = {"bag": nn.EmbeddingBag(7, 4), "linear": nn.Linear(4, 3)}
    model = quantized(Lambda(lambda self, x: self.linear(self.bag(x)), **layers))
    assert "use `embedding`" in site_of(model, "bag/embedding_bag/0").why_float
    assert site_of(model, "linear/linear/0").quantized


def test_a_computed_table_is_refused():
    layers = {"linear": nn.Linear(4, 4)}
    model = Lambda(
        lambda self, x, table: F.embedding(x, self.linear(table)), linear=layers["linear"]
    )
    linger.prepare(model, (TOKENS, torch.randn(7, 4)))
    linger.quantize(model)
    assert "computed from the input" in site_of(model, "/embedding/0").why_float
