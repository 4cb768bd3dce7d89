"""What the dialect refuses, and what a failed export leaves behind."""

import copy
import warnings

import pytest
import torch.nn.functional as F
from torch import nn

import lightning_linger as linger
from lightning_linger.export import export_onnx
from tests.export.linger_models import Net, conv_model, image, quantized


def refused(model, error, match, *inputs, path, **kwargs):
    with pytest.raises(error, match=match):
        export_onnx(model, inputs, path, **kwargs)
    assert not [p for p in path.parent.iterdir() if "onnx" in p.name] if path.parent.is_dir() else 1


def test_errors_name_the_cause(tmp_path):
    x = image(3)
    path = tmp_path / "model.onnx"
    plain = Net()
    refused(plain, linger.NotReadyError, "not prepared", x, path=path)
    linger.prepare(plain, (x,))
    linger.quantize(plain)
    refused(plain, linger.NotReadyError, "`stem/conv2d/0`", x, path=path)
    model = quantized(Net(), x)
    refused(model, linger.ConfigError, "unknown dialect 'lingr'", x, path=path, dialect="lingr")
    refused(model, linger.ConfigError, "does not exist", x, path=tmp_path / "no" / "model.onnx")
    refused(model, linger.ConfigError, "do not fit", path=path)
    with pytest.raises(linger.ConfigError, match="is a folder"):
        export_onnx(model, (x,), tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    x = image(3)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    model = quantized(Net(), x)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(linger.ConfigError, match="No space left"):
        export_onnx(model, (x,), path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("run", "layers", "fields", "match"),
    [
        (lambda m, x: m.layer(x[:, :, None]), {"layer": nn.Conv3d(4, 4, 1)}, {}, "3-dimensional"),
        (lambda m, x: F.avg_pool2d(m.conv(x), 4, 4, ceil_mode=True), {}, {}, "ceil_mode"),
        (lambda m, x: m.conv(x), {}, {"granularity": "channel"}, "granularity='tensor'"),
        (lambda m, x: m.conv(x), {}, {"rounding": "half_even"}, "rounds half up"),
        (lambda m, x: m.conv(x), {}, {"platform": "onnxruntime"}, "dialect='qdq'"),
    ],
    ids=["conv3d", "ceil_mode", "per_channel", "rounding", "platform"],
)
def test_what_the_dialect_cannot_say_is_refused(tmp_path, run, layers, fields, match):
    x = image()
    model = quantized(conv_model(run, **copy.deepcopy(layers)), x, **fields)
    refused(model, linger.UnsupportedError, match, x, path=tmp_path / "model.onnx")


def test_one_graph_has_one_platform(tmp_path):
    x = image()
    model = conv_model(lambda m, x: m.layer(m.conv(x)), layer=nn.Conv2d(4, 4, 3))
    linger.prepare(model, (x,))
    linger.quantize(model, overrides={"layer": {"platform": "arcs"}})
    model.train()(x)
    refused(model, linger.UnsupportedError, "one platform", x, path=tmp_path / "model.onnx")


def test_a_forward_that_counts_is_refused(tmp_path):
    def run(m, x):
        m.count += 1
        return m.conv(x) + (m.conv(x) if m.count % 2 else 0.5)

    x = image()
    model = conv_model(run)
    model.count = 0
    quantized(model, x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(model, linger.UnsupportedError, "ran", x, path=tmp_path / "model.onnx")
