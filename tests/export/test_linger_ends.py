"""Inputs, outputs and branches of exported models."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lightning_linger as linger
from lightning_linger.export import export_onnx
from tests.export.linger_models import MANY_STEPS, Net, conv_model, exported, image, ops, quantized
from tests.models import Lambda


def test_values_enter_and_leave_integers_once(tmp_path):
    """Nothing is quantized twice, and nothing becomes real between two ops of the engine."""

    def run(m, x):
        y = torch.cat([m.conv(x), m.other(x)], 1)
        return F.max_pool2d(torch.sigmoid(y), 2), y

    model = quantized(conv_model(run, other=nn.Conv2d(4, 4, 3)), image())
    proto = exported(model, tmp_path, image())
    assert ops(proto).count("Quant") == 1
    assert ops(proto).count("Dequant") == 2
    readers = {name for node in proto.graph.node for name in node.input}
    assert not readers & {n.output[0] for n in proto.graph.node if n.op_type == "Dequant"}


def test_outputs_come_in_the_order_of_the_forward(tmp_path):
    x = image()

    def run(m, x):
        return {"z": m.conv(x), "a": (m.layer(x), None, 3), "same": x}

    model = quantized(conv_model(run, layer=nn.Conv2d(4, 4, 3)), x)
    proto = exported(model, tmp_path, x)
    assert [v.name for v in proto.graph.output] == ["z", "a_0", "same"]


def test_one_value_may_be_returned_twice(tmp_path):
    x = image()

    def run(m, x):
        y = m.conv(x)
        return y, y, y[:, :1]

    proto = exported(quantized(conv_model(run), x), tmp_path, x)
    assert [v.name for v in proto.graph.output] == ["output_0", "output_1", "output_2"]


def test_two_inputs_and_a_keyword(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)

        def forward(self, left, pair, *, gate=None, twice=False):
            y = self.a(left) + self.b(pair["right"])
            y = y * gate
            return y + y if twice else y

    left, right, gate = image(), image(), torch.rand(2, 4, 1, 1)
    inputs, kwargs = (left, {"right": right}), {"gate": gate, "twice": True}
    proto = exported(quantized(Two(), *inputs, kwargs=kwargs), tmp_path, *inputs, kwargs=kwargs)
    assert [v.name for v in proto.graph.input] == ["left", "pair_right", "gate"]
    assert ops(proto).count("QAdd") == 2


def test_a_branch_goes_the_way_of_the_example(tmp_path):
    def run(m, x):
        y = m.conv(x)
        if y.sum() > x.sum() + 1e6:
            y = y * 2
        return F.relu(y)

    x = image()
    model = quantized(conv_model(run), x)
    with pytest.warns(linger.QuantizationWarning, match=r"test_linger_ends\.py:\d+ decides"):
        proto = exported(model, tmp_path, x)
    assert ops(proto) == [*MANY_STEPS, "Relu", "Dequant"]


def test_no_warning_without_a_branch(tmp_path):
    x = image(3)
    model = quantized(Net(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(model, (x,), tmp_path / "model.onnx")


def test_no_warning_about_the_weights_of_recurrent_layers(tmp_path):
    x = torch.randn(1, 4, 3)
    model = Lambda(lambda m, x: m.rnn(x)[0], rnn=nn.LSTM(3, 3, batch_first=True))
    linger.prepare(model, (x,))
    linger.calibrate(linger.quantize(model), [(x,)]).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_onnx(model, (x,), tmp_path / "model.onnx")
