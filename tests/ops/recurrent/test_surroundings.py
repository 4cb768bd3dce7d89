"""Recurrent layers in exports, compiled models, autocast and saved states."""

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import lightning_linger as linger
from lightning_linger import QuantConfig, UnsupportedError, export_onnx
from tests.models import Lambda, train, trained
from tests.ops.recurrent.layers import equal, plain


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
