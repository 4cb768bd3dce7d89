"""Models that are exported in the dialect of the engines, and looked at."""

import onnx
import torch
import torch.nn.functional as F
from torch import nn

import lightning_linger as linger
from lightning_linger.export import OnnxIntegerRunner, export_onnx
from lightning_linger.export.capture import flat_tensors
from tests.models import Lambda

PLATFORMS = ("venusa", "arcs", "venus")
ENGINE_NAMES = {"venusa": "venusA", "arcs": "arcs", "venus": "venus"}


class Net(nn.Module):
    """Residual addition, concatenation, both pools, a mean, clamps and a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.bn(self.stem(x)))
        y = F.relu(self.conv(x) + x)
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(x, 2)], 1)
        return self.fc(F.relu6(y.mean((2, 3))))


def quantized(model, *inputs, steps=2, fuse=True, kwargs=None, **fields):
    linger.prepare(model, inputs, kwargs)
    if fuse:
        linger.fuse_bn(model)
    linger.quantize(model, linger.QuantConfig(**fields))
    model.train()
    with torch.no_grad():
        for _ in range(steps):
            model(*inputs, **(kwargs or {}))
    return model.eval()


def conv_model(run, **layers):
    layers = {"conv": nn.Conv2d(4, 4, 3)} | layers
    return Lambda(run, **layers)


def image(channels=4, size=8):
    return torch.randn(2, channels, size, size)


def exported(model, tmp_path, *inputs, kwargs=None):
    """Export, check the file, run it in integers and compare with the model; return the file."""
    path = export_onnx(model, inputs, tmp_path / "model.onnx", "linger", kwargs)
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    with linger.integer(model), torch.no_grad():
        expected = flat_tensors(model(*inputs, **(kwargs or {})))
    arrays = [x.numpy() for x in flat_tensors((inputs, kwargs))]
    runner = OnnxIntegerRunner(path)
    found = runner.run(dict(zip(runner.input_names, arrays, strict=True)))
    assert len(found) == len(expected)
    for result, wanted in zip(found.values(), expected, strict=True):
        assert torch.equal(torch.from_numpy(result), wanted)
    return proto


def ops(proto):
    return [node.op_type for node in proto.graph.node]


def attributes(proto, name):
    node = next(node for node in proto.graph.node if node.name == name)
    found = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    return {key: v.decode() if isinstance(v, bytes) else v for key, v in found.items()}


MANY_STEPS = ["Quant", "QConv2d"]
