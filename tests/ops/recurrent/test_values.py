"""Any layer on any platform: training forwards, integers and float agree as far as promised."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from lightning_linger import QuantConfig
from lightning_linger.nn import LSTMP, UBLSTMP
from lightning_linger.platforms import PLATFORMS
from tests.models import Lambda, assert_integer_exact, keys, trained
from tests.ops.recurrent.layers import LAYERS, plain


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_fake_equals_integer(data):
    draw = data.draw
    kind, options = draw(st.sampled_from([*LAYERS, ("LSTM", {"proj_size": 3})]))
    shifting = [name for name, platform in PLATFORMS.items() if platform.right_shift_only]
    platform = draw(st.sampled_from(shifting))
    width = st.sampled_from((2, 3, 4, 8, 12, 16))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch, steps, features = (draw(st.integers(1, 4)) for _ in range(3))
    batch_first = draw(st.booleans())
    model = plain(
        kind,
        features,
        5,
        num_layers=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
        batch_first=batch_first,
        **options,
    )
    x = torch.randn((batch, steps, features) if batch_first else (steps, batch, features))
    config = QuantConfig(
        platform=platform,
        weight_bits=draw(width),
        activation_bits=draw(width),
        output_bits=draw(st.one_of(width, st.none())),
        granularity=draw(st.sampled_from((None, "channel"))),
        fused_rnn=draw(st.booleans()),
    )
    trained(model, x, config=config, steps=2, lr=0.05)
    assert_integer_exact(model, x)
    assert_integer_exact(model, 30 * x)


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_sixteen_bits_come_close_to_the_float_layer(kind, options, platform):
    model = plain(kind, 8, 16, 2, bidirectional=True, **options)
    x = torch.randn(20, 4, 8)
    with torch.no_grad():
        expected = model(x)
    bits = QuantConfig(platform=platform, weight_bits=16, activation_bits=16, output_bits=16)
    trained(model, x, config=bits)
    with torch.no_grad():
        found = model(x)
    # Straight lines of 16 segments are off by 1.3e-3; they feed back.
    allowed = 2e-3 if platform == "onnxruntime" else 2e-2
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert (a - b).abs().max() < allowed * max(1.0, float(b.abs().max()))


def test_unbatched_input():
    model = plain("LSTM", 4, 5)
    x = torch.randn(6, 4)
    trained(model, x)
    assert_integer_exact(model, x)
    with torch.no_grad():
        y, (h, c) = model(x)
    assert (y.shape, h.shape, c.shape) == ((6, 5), (1, 5), (1, 5))


@pytest.mark.parametrize(
    "layer", [LSTMP(4, 3, 6), UBLSTMP(4, 3, 6), LSTMP(4, 3, 6, go_forward=False)]
)
def test_layers_that_torch_lacks(layer):
    model = Lambda(lambda self, x: self.rnn(x), rnn=copy.deepcopy(layer))
    x = torch.randn(2, 5, 4)
    trained(model, x, lr=0.1)
    assert any("/lstm/" in key for key in keys(model))
    assert_integer_exact(model, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_come_out_as_they_went_in(dtype):
    model = plain("GRU", 4, 5).to(dtype)
    x = torch.randn(3, 2, 4, dtype=dtype)
    trained(model, x, lr=0.1)
    with torch.no_grad():
        assert all(leaf.dtype == dtype for leaf in tree_leaves(model(x)))
    assert_integer_exact(model, x)
