"""Recurrent layers inside models: sequences, states, packing, dropout, limits, the fused switch."""

import contextlib
import copy
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.rnn as rnn_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig, UnsupportedError, export_onnx
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.tags import tag_of
from lightning_linger.nn import LSTMP, UBLSTMP
from lightning_linger.ops.recurrent import compiled, loop
from lightning_linger.platforms import PLATFORMS
from tests.models import Lambda, assert_integer_exact, keys, site_of, train, trained

KINDS = ("LSTM", "GRU", "RNN")
LAYERS = [("LSTM", {}), ("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"})]
each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def plain(kind, *sizes, **options):
    """A model that is one recurrent layer."""
    layer = getattr(nn, kind)(*sizes, **options)
    return Lambda(lambda self, *args: self.rnn(*args), rnn=layer)


def layer_site(model):
    (site,) = [
        s for s in instrumentation_of(model).sites if s.op.kind in ("lstm", "gru", "rnn_tanh")
    ]
    return site


def fixed(**fields):
    """A configuration in which every range is known beforehand."""
    return QuantConfig(range=1.0, **fields)


def equal(a, b):
    leaves = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(torch.equal(x, y) for x, y in leaves if isinstance(x, torch.Tensor))


# --- any configuration --------------------------------------------------------------------------


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


# --- ranges and tags ----------------------------------------------------------------------------


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


# --- gradients ----------------------------------------------------------------------------------


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


# --- sequences ----------------------------------------------------------------------------------

LENGTHS = torch.tensor([5, 2, 7, 3])


def packed_forward(self, x, lengths):
    y = self.first(x)
    sequences = pack_padded_sequence(y, lengths, batch_first=True, enforce_sorted=False)
    y, states = self.rnn(sequences)
    return pad_packed_sequence(y, batch_first=True)[0], states


@pytest.mark.parametrize("system", [contextlib.nullcontext, linger.integer])
@pytest.mark.parametrize("bidirectional", [False, True])
@each_kind
def test_packed_equals_each_sequence_alone(kind, bidirectional, system):
    layer = getattr(nn, kind)(4, 6, 2, batch_first=True, bidirectional=bidirectional)
    model = Lambda(packed_forward, first=nn.Linear(4, 4), rnn=layer)
    x = torch.randn(4, 7, 4)
    trained(model, x, LENGTHS, lr=0.1)
    context = system(model) if system is linger.integer else system()
    with torch.no_grad(), context:
        y, states = model(x, LENGTHS)
        for index, length in enumerate(LENGTHS.tolist()):
            alone, ends = model(x[index : index + 1, :length], torch.tensor([length]))
            assert torch.equal(alone[0], y[index, :length])
            assert not y[index, length:].any()
            pairs = zip(tree_leaves(ends), tree_leaves(states), strict=True)
            assert all(torch.equal(a[:, 0], b[:, index]) for a, b in pairs)


@pytest.mark.parametrize(
    "pack",
    [
        lambda x, n: pack_padded_sequence(x, n, True, False),
        lambda x, n: rnn_utils.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False),
        lambda x, n: torch.nn.utils.rnn.pack_padded_sequence(
            x, n.sort(descending=True).values, batch_first=True
        ),
        lambda x, n: torch._VF._pack_padded_sequence(x, n.sort(descending=True).values, True),
    ],
)
def test_packing_keeps_the_grid_however_it_is_imported(pack):
    tags = []

    def forward(self, x, lengths):
        found = pack(self.first(x), lengths)
        data = found[0] if isinstance(found, tuple) else found.data
        tags.append(tag_of(data))
        if not isinstance(found, rnn_utils.PackedSequence):
            found = rnn_utils.PackedSequence(*found)
        return rnn_utils.pad_packed_sequence(self.rnn(found)[0], batch_first=True)[0]

    model = Lambda(forward, first=nn.Linear(4, 4), rnn=nn.LSTM(4, 6))
    x = torch.randn(4, 7, 4)
    trained(model, x, LENGTHS)
    assert not layer_site(model).inputs
    tags.clear()
    assert_integer_exact(model, x, LENGTHS)
    assert all(tag is not None for tag in tags)


def test_packing_many_sequences():
    def forward(self, x):
        rows = self.first(x)
        sequences = pack_sequence([rows[0], rows[1, :2], rows[2, :4]], enforce_sorted=False)
        y, _ = self.rnn(sequences)
        return pad_packed_sequence(y, padding_value=-1.0, total_length=9)[0]

    model = Lambda(forward, first=nn.Linear(4, 4), rnn=nn.GRU(4, 6))
    x = torch.randn(3, 6, 4)
    trained(model, x)
    assert not layer_site(model).inputs
    assert_integer_exact(model, x)
    with torch.no_grad():
        padding = model(x)[6:]
    # The nearest code is the value itself, or the smallest one.
    assert padding.unique().numel() == 1
    assert -1.0 <= padding.max() < 0


def test_packed_sequences_cannot_be_recorded(tmp_path):
    model = Lambda(packed_forward, first=nn.Linear(4, 4), rnn=nn.LSTM(4, 6, batch_first=True))
    x = torch.randn(4, 7, 4)
    trained(model, x, LENGTHS, config=QuantConfig(platform="onnxruntime"))
    with pytest.raises(UnsupportedError, match="`/pack_padded_sequence/0`: a packed sequence"):
        export_onnx(model, (x, LENGTHS), tmp_path / "a.onnx", "qdq")


@each_kind
def test_a_sequence_in_two_halves_equals_the_whole(kind):
    def whole(self, x):
        return self.rnn(x)

    def halves(self, x):
        first, states = self.rnn(x[:3])
        second, states = self.rnn(x[3:], states)
        return torch.cat([first, second]), states

    layer = getattr(nn, kind)(4, 6, 2)
    x = torch.randn(7, 3, 4).clamp(-1, 1)
    results = []
    for forward in (whole, halves):
        model = Lambda(forward, rnn=copy.deepcopy(layer))
        trained(model, x, config=fixed(), steps=1)
        assert_integer_exact(model, x)
        with torch.no_grad():
            results.append(model(x))
    assert equal(*results)


@each_kind
def test_cells_step_like_the_layer(kind):
    layer = getattr(nn, kind)(4, 6)
    cell = getattr(nn, f"{kind}Cell")(4, 6)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    cell.load_state_dict({name: getattr(layer, f"{name}_l0") for name in names})

    def loop(self, x):
        state, outputs = None, []
        for t in range(5):
            state = self.cell(x[t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs), state

    x = torch.randn(5, 3, 4).clamp(-1, 1)
    models = (Lambda(lambda self, x: self.rnn(x), rnn=layer), Lambda(loop, cell=cell))
    for model in models:
        trained(model, x, config=fixed(), steps=1)
        assert_integer_exact(model, x)
    with torch.no_grad():
        (y, states), (steps, last) = (model(x) for model in models)
    assert torch.equal(y, steps)
    for a, b in zip(tree_leaves(states), tree_leaves(last), strict=True):
        assert torch.equal(a[0], b)
    gradients = []
    for model, weights in zip(models, (layer, cell), strict=True):
        model.train()
        model(x)[0].square().sum().backward()
        gradients.append([p.grad for p in weights.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_initial_states_change_the_result_and_get_gradients():
    model = plain("LSTM", 4, 6, 2)
    x = torch.randn(5, 3, 4)
    h, c = (torch.randn(2, 3, 6).mul(0.3).requires_grad_() for _ in range(2))
    linger.quantize(linger.prepare(model, (x, (h.detach(), c.detach()))))
    for _ in range(2):
        model(x, (h, c))[0].sum().backward()
    assert h.grad.abs().sum() > 0
    assert c.grad.abs().sum() > 0
    model.eval()
    assert_integer_exact(model, x, (h, c))
    with torch.no_grad():
        zeros = torch.zeros_like(h)
        assert not torch.equal(model(x, (h, c))[0], model(x, (zeros, zeros))[0])


def test_dropout_may_scale_an_input_beyond_its_grid():
    """Codes are then larger than their width says; gates saturate, they never wrap."""
    layer = nn.RNN(4, 6, bias=False)
    layer.weight_ih_l0.data.fill_(3.0)  # 12 at most, of 16 that the gates hold
    layer.weight_hh_l0.data.zero_()
    model = Lambda(lambda self, x: self.rnn(self.drop(self.first(x))), first=nn.Linear(4, 4))
    model.drop, model.rnn = nn.Dropout(0.9), layer
    model.first.weight.data.zero_()
    model.first.bias.data.fill_(0.9)
    x = torch.randn(5, 50, 4)
    linger.quantize(linger.prepare(model, (x,)), fixed(platform="venusa"))
    with torch.no_grad():
        y = model(x)[0]
    assert (y >= 0).all()
    assert (y > 0.9).any()


def test_dropout_acts_between_layers_in_training_only():
    models = []
    for p in (0.5, 0.0):
        torch.manual_seed(0)
        models.append(plain("GRU", 4, 6, 2, dropout=p))
    x = torch.randn(5, 3, 4)
    for model in models:
        linger.quantize(linger.prepare(model, (x,)), fixed())
    dropping, quiet = models
    with torch.no_grad():
        assert not torch.equal(dropping(x)[0], dropping(x)[0])
        assert torch.equal(quiet(x)[0], quiet(x)[0])
        for model in models:
            model.eval()
        assert torch.equal(dropping(x)[0], quiet(x)[0])
    assert_integer_exact(dropping, x)
    one = plain("GRU", 4, 6)
    one.rnn.dropout = 0.5  # behind the last layer there is none
    linger.quantize(linger.prepare(one, (x,)), fixed())
    with torch.no_grad():
        assert torch.equal(one(x)[0], one(x)[0])


# --- fused and step by step ---------------------------------------------------------------------


@pytest.mark.parametrize("platform", ["venusa", "venus", "onnxruntime"])
@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_row64_fused_equals_step_by_step(kind, options, platform):
    model = plain(kind, 4, 6, 2, bidirectional=True, **options)
    x = torch.randn(5, 3, 4)
    twin = copy.deepcopy(model)
    for network, fused in ((model, True), (twin, False)):
        trained(network, x, config=QuantConfig(platform=platform, fused_rnn=fused), lr=0.1)
    assert equal(dict(model.named_parameters()), dict(twin.named_parameters()))
    with torch.no_grad():
        expected = model(x)
        assert equal(expected, twin(x))
        with linger.fused_rnn(False):
            assert equal(expected, model(x))
        with linger.integer(model), linger.fused_rnn(False):
            assert equal(expected, model(x))


@pytest.mark.parametrize(("kind", "options"), [*LAYERS, ("LSTM", {"proj_size": 3})])
def test_step_by_step_agrees_with_torch_in_the_float_stage(kind, options):
    layer = getattr(nn, kind)(4, 6, 2, bidirectional=True, batch_first=True, **options)
    model = Lambda(packed_forward, first=nn.Linear(4, 4), rnn=layer)
    x = torch.randn(4, 7, 4)
    model.eval()
    with torch.no_grad():
        expected = model(x, LENGTHS)
        linger.normalize(linger.prepare(model, (x, LENGTHS)), weight=8.0)
        assert equal(model(x, LENGTHS), expected)
        with linger.fused_rnn(False):
            stepwise = model(x, LENGTHS)
    for a, b in zip(tree_leaves(stepwise), tree_leaves(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_row64_the_switch_nests_and_belongs_to_its_thread():
    from lightning_linger.ops.recurrent.fusion import is_fused

    model = trained(plain("LSTM", 4, 6), torch.randn(5, 3, 4))
    site, seen = layer_site(model), []
    assert is_fused(site)
    with linger.fused_rnn(False):
        assert not is_fused(site)
        with linger.fused_rnn(True):
            assert is_fused(site)
        assert not is_fused(site)
        thread = threading.Thread(target=lambda: seen.append(is_fused(site)))
        thread.start()
        thread.join()
        with pytest.raises(ZeroDivisionError), linger.fused_rnn(True):
            assert 1 / 0
        assert not is_fused(site)
    assert is_fused(site)
    assert seen == [True]


def test_the_switch_takes_three_values():
    match = r"`fused_rnn` must be True, False or 'compiled'. Found: 'no'"
    with pytest.raises(ConfigError, match=match):
        QuantConfig(fused_rnn="no")
    with pytest.raises(ConfigError, match=match), linger.fused_rnn("no"):
        pass
    with linger.fused_rnn("compiled"):
        assert QuantConfig(fused_rnn="compiled").fused_rnn == "compiled"


# --- compiled -----------------------------------------------------------------------------------


@pytest.fixture
def steps(monkeypatch):
    """What is compiled from here on."""
    found = compiled.CompiledSteps()
    monkeypatch.setattr(loop, "STEPS", found)
    return found


@pytest.mark.parametrize(
    ("kind", "options", "platform"),
    [
        ("LSTM", {}, "venusa"),
        *(
            pytest.param(kind, options, platform, marks=pytest.mark.slow)
            for platform in ("venusa", "venus", "onnxruntime")
            for kind, options in [*LAYERS, ("LSTM", {"proj_size": 3})]
            if (kind, options, platform) != ("LSTM", {}, "venusa")
        ),
    ],
)
def test_compiled_steps_equal_the_others(kind, options, platform, steps):
    # A step that moves would be compiled again.
    config = fixed(platform=platform, fused_rnn="compiled")
    model = plain(kind, 4, 6, **options)
    x = torch.randn(5, 3, 4)
    twin = copy.deepcopy(model)
    trained(model, x, config=config, lr=0.1)
    free = platform == "onnxruntime"
    assert len(steps) == (0 if free else 1)
    trained(twin, x, config=dataclasses.replace(config, fused_rnn=True), lr=0.1)
    assert equal(dict(model.named_parameters()), dict(twin.named_parameters()))
    model.eval()
    twin.eval()
    with torch.no_grad():
        expected = twin(x)
        assert equal(expected, model(x))
        with linger.integer(model):
            found = model(x)
        assert len(steps) == (1 if free else 2)
        with linger.integer(twin):
            assert equal(found, twin(x))
        with torch.inference_mode(), linger.integer(model):  # as in a Trainer's validation
            assert equal(found, model(x))
        # The switch wins over the configuration, and nothing else is compiled.
        with linger.integer(model), linger.fused_rnn(False):
            assert equal(found, model(x))
    assert len(steps) == (1 if free else 2)


def test_what_cannot_be_compiled_runs_as_it_is(steps, monkeypatch, caplog):
    model = trained(plain("GRU", 4, 6), torch.randn(5, 3, 4))
    x = torch.randn(5, 3, 4)
    with torch.no_grad(), linger.integer(model):
        expected = model(x)

    def refuse(*args, **kwargs):
        msg = "no C++ compiler\nand more"
        raise RuntimeError(msg)

    monkeypatch.setattr(torch, "compile", refuse)
    with torch.no_grad(), linger.integer(model), linger.fused_rnn("compiled"):
        assert equal(model(x), expected)
        assert equal(model(x), expected)
    assert len(steps) == 0
    said = [record.getMessage() for record in caplog.records if record.name == "lightning_linger"]
    assert said == ["recurrent layers run without being compiled: RuntimeError: no C++ compiler"]


def test_one_step_and_different_lengths_are_not_compiled(steps, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)  # would be called, and fail
    layer = nn.LSTM(4, 6, batch_first=True)
    model = Lambda(packed_forward, first=nn.Linear(4, 4), rnn=layer)
    x = torch.randn(4, 7, 4)
    linger.quantize(linger.prepare(model, (x, LENGTHS)), fixed())
    with torch.no_grad(), linger.integer(model.eval()):
        expected = model(x, LENGTHS)
        with linger.fused_rnn("compiled"):
            assert equal(model(x, LENGTHS), expected)
    one = linger.quantize(linger.prepare(plain("LSTM", 4, 6), (x[:1],)), fixed()).eval()
    with torch.no_grad(), linger.integer(one), linger.fused_rnn("compiled"):
        one(x[:1])
    assert len(steps) == 0
    assert not steps.failed


def test_captures_compile_nothing(steps):
    model = trained(plain("LSTM", 4, 6), torch.randn(5, 3, 4)).eval()
    x = torch.randn(5, 3, 4)
    with torch.no_grad(), linger.integer(model):
        expected = model(x)  # fills what a capture reads
        with linger.fused_rnn("compiled"):
            program = torch.export.export(model, (x,), strict=False)
            assert equal(program.module()(x), expected)
    assert len(steps) == 0


# --- range limits -------------------------------------------------------------------------------


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


# --- around it ----------------------------------------------------------------------------------


def test_divergence_of_a_recurrent_model_is_zero():
    model = Lambda(
        lambda self, x: self.head(self.rnn(x)[0]), rnn=nn.LSTM(4, 6, 2), head=nn.Linear(6, 2)
    )
    x = torch.randn(5, 3, 4)
    trained(model, x, lr=0.1)
    rows = {row.site: row for row in linger.divergence(model, (x,))}
    assert list(rows) == ["rnn/lstm/0", "head/linear/0"]
    row = rows["rnn/lstm/0"]
    assert row.elements == 5 * 3 * 6
    assert (row.mismatches, row.isolated_mismatches) == (0, 0)
    assert row.sqnr > 15


def test_torch_export_of_the_integer_model():
    model = Lambda(
        lambda self, x: self.head(self.rnn(x)[1][0][-1]), rnn=nn.LSTM(4, 6), head=nn.Linear(6, 2)
    )
    x = torch.randn(5, 3, 4)
    trained(model, x)
    with torch.no_grad(), linger.integer(model):
        expected = model(x)
        program = torch.export.export(model, (x,), strict=False)
        assert torch.equal(program.module()(x), expected)
    ops = [str(node.target) for node in program.graph.nodes if "linger" in str(node.target)]
    assert sum("linger.lstm" in op for op in ops) == 1


@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_engines_without_the_layer_say_so(kind, tmp_path):
    model = plain(kind, 4, 6, batch_first=True)
    x = torch.randn(1, 5, 4)
    linger.prepare(model, (x,))
    with pytest.raises(UnsupportedError, match=r"cannot run .* `nn.LSTM` on whole sequences"):
        linger.quantize(model, QuantConfig(platform="arcs", strict_platform=True))
    linger.quantize(model, QuantConfig(platform="arcs"))
    train(model, (x,), 1, 0.0)
    model.eval()
    with pytest.raises(UnsupportedError, match=f"`rnn/.*no form of a .*{kind}"):
        export_onnx(model, (x,), tmp_path / "a.onnx", "linger")


class WithStates(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 6, batch_first=True)
        self.h = nn.Parameter(torch.zeros(1, 1, 6))

    def forward(self, x):
        return self.rnn(x, (self.h, torch.full_like(self.h, 0.5)))[0]


@pytest.mark.parametrize(
    ("model", "fields", "reason"),
    [
        (WithStates, {}, "an LSTM with initial states because the engine starts from zeros"),
        (
            lambda: plain("LSTM", 4, 6, proj_size=2, batch_first=True),
            {},
            "an LSTM with a projection",
        ),
        (lambda: plain("LSTM", 4, 6, batch_first=True), {"weight_bits": 16}, "16-bit weights"),
        (lambda: plain("LSTM", 4, 6, batch_first=True), {"output_bits": 4}, "4-bit hidden state"),
        (lambda: plain("LSTM", 4, 6, batch_first=True), {"activation_bits": 16}, "16-bit input"),
        (
            lambda: plain("LSTM", 4, 6, batch_first=True),
            {"granularity": "channel"},
            "weights with one scale per channel because the engine has one per weight",
        ),
        (lambda: plain("LSTM", 4, 6), {}, "an LSTM on 5 sequences at once"),
        (
            lambda: Lambda(lambda self, x: self.cell(x[0])[0], cell=nn.LSTMCell(4, 6)),
            {},
            "an LSTM cell because the engine runs whole sequences",
        ),
    ],
)
def test_what_the_engine_cannot_do_is_refused(model, fields, reason, tmp_path):
    model, x = model(), torch.randn(1, 5, 4)
    trained(model, x, config=QuantConfig(platform="arcs", **fields))
    with pytest.raises(UnsupportedError, match=f"`.*lstm.*`: .*{reason}.* overrides=") as caught:
        export_onnx(model, (x,), tmp_path / "a.onnx", "linger")
    assert "linger dialect has no form of" in str(caught.value)


def test_narrow_weights_and_inputs_are_exported(tmp_path):
    model, x = plain("LSTM", 4, 6, batch_first=True), torch.randn(1, 5, 4)
    config = QuantConfig(platform="arcs", weight_bits=4, activation_bits=6)
    trained(model, x, config=config)
    path = export_onnx(model, (x,), tmp_path / "a.onnx", "linger")
    with torch.no_grad(), linger.integer(model):
        expected = tree_leaves(model(x))
    results = linger.OnnxIntegerRunner(path).run({"input_0": x.numpy()})
    for found, wanted in zip(results.values(), expected, strict=True):
        assert torch.equal(torch.from_numpy(found), wanted)


def test_autocast_leaves_the_integers_alone():
    model = trained(plain("LSTM", 4, 6), torch.randn(5, 3, 4))
    x = torch.randn(5, 3, 4)
    with torch.no_grad():
        expected = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert equal(model(x), expected)


def compiled_cell(platform):
    torch._dynamo.reset()  # its guards look at models that are gone

    def two_steps(self, x):
        state = self.cell(x[0])
        return self.cell(x[1], state)[0]

    model = Lambda(two_steps, cell=nn.LSTMCell(4, 3))
    x = torch.randn(2, 3, 4)
    trained(model, x, config=QuantConfig(platform=platform))
    with torch.no_grad():
        expected = model(x)
    return model, torch.compile(model, backend="aot_eager", fullgraph=True), x, expected


@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
def test_compiled_cells_agree_in_evaluation(platform):
    _, compiled, x, expected = compiled_cell(platform)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected)


@pytest.mark.slow
def test_compiled_cells_have_gradients():
    model, compiled, x, expected = compiled_cell("venusa")
    assert torch.equal(compiled(x), expected)
    model.train()
    y = compiled(x)
    assert (y - expected).abs().max() < 0.02
    y.sum().backward()
    assert model.cell.weight_hh.grad.abs().sum() > 0


def test_state_and_strip():
    model = trained(plain("LSTM", 4, 6, 2), torch.randn(5, 3, 4), lr=0.1)
    x = torch.randn(5, 3, 4)
    other = plain("LSTM", 4, 6, 2)
    linger.quantize(linger.prepare(other, (x,)))
    other.load_state_dict(model.state_dict())
    other.eval()
    with torch.no_grad():
        assert equal(other(x), model(x))
        quantized = model(x)[0]
        linger.strip(model)
        assert not torch.equal(model(x)[0], quantized)
