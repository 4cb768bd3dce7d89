"""Packed and halved sequences, cells, initial states and dropout."""

import contextlib
import copy

import pytest
import torch
import torch.nn.utils.rnn as rnn_utils
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import lightning_linger as linger
from lightning_linger import QuantConfig, UnsupportedError, export_onnx
from lightning_linger.core.tags import tag_of
from tests.models import Lambda, assert_integer_exact, trained
from tests.ops.recurrent.layers import (
    LENGTHS,
    each_kind,
    equal,
    fixed,
    layer_site,
    packed_forward,
    plain,
)


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
