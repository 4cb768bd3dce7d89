"""The summary: what it says of each call, as rows and as tables."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import lightning_linger as linger
from tests.models import Lambda

X = torch.randn(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


def prepared() -> nn.Module:
    model = Lambda(
        lambda self, x: torch.fft.fft(F.relu(self.bn(self.conv(x)))).real,
        conv=nn.Conv2d(1, 2, 3),
        bn=nn.BatchNorm2d(2),
    )
    linger.prepare(model, (X,))
    linger.fuse_bn(model)
    return model


@pytest.mark.parametrize(
    ("platform", "kind"), [("venusa", "power_of_two"), ("onnxruntime", "free/channel")]
)
def test_scale_kind_scale_and_range(platform: str, kind: str) -> None:
    model = prepared()
    assert linger.summary(model)[0].range == ""
    linger.quantize(model, linger.QuantConfig(platform=platform))
    row = linger.summary(model.eval())[0]
    assert (row.system, row.range, row.why_float) == ("float", "", "has seen no range yet")
    linger.calibrate(model, [X])
    with torch.no_grad():
        conv, bn = model.conv, model.bn
        y = F.conv2d(X, conv.weight, conv.bias)
        y = F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    row = linger.summary(model)[0]
    assert (row.system, row.bits, row.scale_kind) == ("fake", "8/8/8", kind)
    assert row.stage == "fuse, quantize"
    # Behind a ReLU only the positive side counts.
    largest = float(row.range)
    assert largest == pytest.approx(float(y.max()), rel=0.05)
    if kind == "power_of_two":
        assert row.scale == f"2^{math.ceil(math.log2(largest / 128))}"
    else:
        assert float(row.scale) == pytest.approx(largest / 127, rel=0.02)


def test_what_stays_float_says_why() -> None:
    rows = {row.op: row for row in linger.summary(linger.quantize(prepared()))}
    assert rows["batch_norm"].system == "folded"
    assert rows["batch_norm"].scale_kind == ""
    float_op = rows["fft_fft"]
    assert (float_op.system, float_op.bits, float_op.range) == ("float", "", "")
    assert "no quantized meaning" in float_op.why_float


def test_it_is_a_rich_table_with_every_column() -> None:
    table = linger.summary(linger.quantize(prepared()))
    console = Console(file=io.StringIO(), width=300)
    console.print(table)
    printed = console.file.getvalue()
    titles = ["site", "op", "system", "bits", "scale_kind", "scale", "range", "stage"]
    titles += ["why_float", "platform"]
    header = next(line for line in printed.splitlines() if "why_float" in line)
    assert header.replace("┃", " ").split() == titles
    assert "conv/conv2d/0" in printed
    assert str(table).splitlines()[0].split() == titles
