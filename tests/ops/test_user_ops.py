"""Ops and layers from outside the library go through QAT, integers and export."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.errors import UnsupportedError
from lightning_linger.core.functions import CANONICAL
from lightning_linger.core.registry import supported_kinds
from lightning_linger.export import register_export
from lightning_linger.export.dialect import Builder, Call
from lightning_linger.export.extension import unregister_export
from lightning_linger.export.linger.attributes import common_attributes
from lightning_linger.export.linger.schema import DOMAIN
from lightning_linger.export.runner.step import Step, to_array
from lightning_linger.ops import (
    KernelOp,
    Target,
    integer_op,
    payload_dtype,
    register,
    tag_of,
    unregister,
)
from tests.models import assert_integer_exact, trained


@linger.operator
def leak(x: Tensor, shift: int) -> Tensor:
    """Negative values are divided by ``2^shift``."""
    return torch.where(x < 0, x / 2**shift, x)


@integer_op("linger::test_leak")
def integer_leak(x: Tensor, shift: int, low: int, high: int, bits: int, platform: str) -> Tensor:
    """An arithmetic shift of the negative codes; the scale stays."""
    wide = x.to(torch.int32)
    return torch.where(wide < 0, wide >> shift, wide).clamp(low, high).to(payload_dtype(bits))


@integer_leak.register_fake
def _(x: Tensor, shift: int, low: int, high: int, bits: int, platform: str) -> Tensor:
    return x.new_empty(x.shape, dtype=payload_dtype(bits))


class LeakCall(NamedTuple):
    input: Tensor
    shift: int


class LeakOp(KernelOp):
    """Its result has the input's scale: what the kernel can do is a shift of codes."""

    def bind(self, *args: Any, **kwargs: Any) -> LeakCall:
        return LeakCall(*args, **kwargs)

    def obstacle(self, call: LeakCall) -> str | None:
        return None if 0 <= call.shift < 8 else "a shift is a number from 0 to 7"

    def finest_step(self, site: Any, call: LeakCall) -> Any:
        tag = tag_of(call.input)
        return None if tag is None else tag.step

    def real(self, site: Any, call: LeakCall) -> Tensor:
        return torch.where(call.input < 0, call.input / 2**call.shift, call.input)

    def kernel(self, site: Any, call: LeakCall, target: Target) -> Tensor:
        tag = tag_of(call.input)
        assert tag is not None
        ratio = target.scale / float(tag.step)
        assert ratio >= 1
        assert ratio == int(ratio)
        x = torch.div(call.input.int(), int(ratio), rounding_mode="floor").to(torch.int16)
        return integer_leak(x, call.shift, target.low, target.high, target.bits, site.platform_name)


class Leak(nn.Module):
    """A user's layer."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        return leak(x, self.shift)


class Centered(nn.Conv2d):
    """A user's subclass of a layer, with a forward of its own and a computed weight."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight, self.bias)


def write_linger(builder: Builder, call: Call) -> Any:
    attributes = common_attributes(call) | {"shift": call.shift}
    return builder.node("QLeak", [call.x], attributes, domain=DOMAIN)


def run_leak(step: Step) -> Any:
    x = torch.from_numpy(np.asarray(step.array(0)))
    return to_array(integer_leak(x, int(step.get("shift")), -128, 127, 8, step.platform))


@pytest.fixture
def op() -> Iterator[None]:
    register(LeakOp("leak"), functions=[leak])
    try:
        yield
    finally:
        unregister("leak")
        unregister_export("test_leak", op_types=["QLeak"])


def network(shift: int = 2) -> nn.Module:
    return nn.Sequential(Centered(2, 4, 3, padding=1), Leak(shift), nn.Conv2d(4, 2, 1))


@pytest.mark.parametrize("platform", ["venusa", "arcs"])
def test_user_layers_train_and_run_in_integers(op: None, platform: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 6, 6)
    model = trained(network(), x, config=QuantConfig(platform=platform), steps=4, lr=0.05)
    rows = {row.site: row for row in linger.summary(model)}
    quantized = {site for site, row in rows.items() if row.system == "fake"}
    assert quantized == {"0/conv2d/0", "1/leak/0", "2/conv2d/0"}
    assert isinstance(model[0], nn.Conv2d)
    assert_integer_exact(model, x)
    assert_integer_exact(model, x * 40)


def test_the_gradient_is_that_of_the_function(op: None) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 2, 6, 6)
    model = trained(network(3), x, config=QuantConfig(activation_bits=16, output_bits=16), steps=2)
    model.train()
    model(x).square().mean().backward()
    found = model[0].weight.grad.clone()
    model.zero_grad()
    linger.strip(model)
    model(x).square().mean().backward()
    assert (
        torch.nn.functional.cosine_similarity(
            found.flatten(), model[0].weight.grad.flatten(), dim=0
        )
        > 0.999
    )


def test_without_an_op_the_function_stays_as_it_was_written() -> None:
    x = torch.randn(3, 2, 6, 6)
    model = trained(network(), x)
    assert "leak" not in supported_kinds()
    assert_integer_exact(model, x)
    assert torch.equal(leak(x, 1), torch.where(x < 0, x / 2, x))


def test_a_dialect_without_a_row_names_the_site(op: None, tmp_path: Any) -> None:
    x = torch.randn(3, 2, 6, 6)
    model = trained(network(), x)
    with pytest.raises(UnsupportedError, match=r"1/leak/0.*linger.*no form of `test_leak`"):
        linger.export_onnx(model, (x,), tmp_path / "m.onnx", dialect="linger")
    assert not (tmp_path / "m.onnx").exists()


def test_a_row_makes_it_exportable(op: None, tmp_path: Any) -> None:
    from onnx.defs import OpSchema

    schema = OpSchema(
        "QLeak",
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("x", "T")],
        outputs=[OpSchema.FormalParameter("y", "U")],
        type_constraints=[
            ("T", ["tensor(int8)", "tensor(int16)"], ""),
            ("U", ["tensor(int8)"], ""),
        ],
        attributes=[
            OpSchema.Attribute("platform", OpSchema.AttrType.STRING, required=True),
            OpSchema.Attribute("quant_mode", OpSchema.AttrType.STRING, required=True),
            OpSchema.Attribute("shift", OpSchema.AttrType.INT, required=True),
        ],
    )
    register_export("test_leak", linger=write_linger, schemas=[schema], kernels={"QLeak": run_leak})
    with pytest.raises(ValueError, match="translation already"):
        register_export("test_leak", linger=write_linger)
    x = torch.randn(3, 2, 6, 6)
    model = trained(network(), x, steps=3)
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", dialect="linger")
    runner = linger.OnnxIntegerRunner(path)
    (name,) = runner.input_names
    (found,) = runner.run({name: x.numpy()}).values()
    with torch.no_grad(), linger.integer(model):
        expected = model(x)
    assert torch.equal(torch.from_numpy(found), expected)


def test_names_are_taken_once(op: None) -> None:
    with pytest.raises(ValueError, match="registered already"):
        register(LeakOp("leak"), functions=[leak])
    with pytest.raises(ValueError, match="belongs to the op 'leak'"):
        register(LeakOp("leak2"), functions=[leak])
    with pytest.raises(ValueError, match="no function of the names"):
        register(LeakOp("nowhere_in_torch"))
    assert "nowhere_in_torch" not in supported_kinds()


def test_unregister_forgets_the_function() -> None:
    register(LeakOp("leak"), functions=[leak])
    unregister("leak")
    assert leak not in CANONICAL
