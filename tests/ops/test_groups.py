"""Weights with scales of groups: true statistics, and wider integers that are exact; row 15."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig, UnsupportedError
from lightning_linger.core.fake_quantize import fake_quantize
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.nics_fix import FIX_FIXED, get_fix_configs, set_fix_method
from lightning_linger.ops.groups import grouped_rows
from tests.models import Chain, assert_integer_exact, site_of


def quantized(layer: nn.Module, x: Tensor, **fields: Any) -> Chain:
    """Return a layer whose groups of inputs have very different sizes, quantized and run once."""
    model = Chain(copy.deepcopy(layer), nn.ReLU())
    weight = model.net[0].weight
    with torch.no_grad():
        scale = torch.exp2(torch.arange(weight.shape[1]) * 1.5 - 6.0)
        weight.mul_(scale.view(1, -1, *([1] * (weight.dim() - 2))))
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(**fields))
    model(x)
    return model


def power_of_two_step(values: Tensor, bits: int) -> Tensor:
    return torch.exp2(torch.ceil(torch.log2(values.abs().max())) - (bits - 1))


def used_weight(model: nn.Module) -> Tensor:
    collected = instrumentation_of(model).switches
    collected.rounded = found = []
    model.eval()
    instrumentation_of(model).thaw()
    with torch.no_grad():
        model(torch.zeros(1, *INPUT))
    collected.rounded = None
    return next(entry.values for entry in found if entry.name == "weight")


INPUT = (6, 5, 5)


@pytest.mark.parametrize("granularity", ["channel", "input_channel", 1, 2, 3, 6])
def test_row15_true_statistics_along_an_axis_of_a_tensor_that_is_not_square(
    granularity: Any,
) -> None:
    model = quantized(nn.Conv2d(6, 4, 3), torch.randn(2, *INPUT), granularity=granularity)
    weight = model.net[0].weight.detach()
    found = used_weight(model)
    size = granularity if isinstance(granularity, int) else 1
    for o in range(4):
        for i in range(0, 6, size):
            part = slice(i, i + size)
            group = {
                "channel": weight[o],
                "input_channel": weight[:, i],
            }.get(granularity, weight[o, part])
            step = power_of_two_step(group, 8).item()
            # No group is finer than an integer of 16 bits has room for.
            if granularity != "channel":
                rows = grouped_rows(weight, granularity)
                widest = max(power_of_two_step(row, 8).item() for row in rows)
                step = max(step, widest * 2.0**-8)
            expected = fake_quantize(weight[o, part], step, -128, 127, "half_up")
            assert torch.equal(found[o, part], expected)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(12, 5), (12,)),
        (nn.Linear(12, 5, bias=False), (3, 12)),
        (nn.Conv1d(12, 4, 3, stride=2), (12, 9)),
        (nn.Conv2d(12, 6, 3, groups=1, padding=1), (12, 5, 5)),
        (nn.Conv2d(24, 6, 3, groups=2), (24, 5, 5)),
    ],
    ids=["linear", "no-bias", "conv1d", "conv2d", "grouped"],
)
@pytest.mark.parametrize("granularity", ["input_channel", 1, 4, 12])
@pytest.mark.parametrize("platform", ["venusa", "arcs"])
def test_integers_are_exact(
    layer: nn.Module, shape: tuple[int, ...], granularity: Any, platform: str
) -> None:
    torch.manual_seed(1)
    x = torch.randn(4, *shape)
    model = quantized(layer, x, granularity=granularity, platform=platform, weight_bits=4)
    model.eval()
    assert_integer_exact(model, x)
    site = site_of(model, next(iter(linger.summary(model))).site)
    codes = site.prepared["weights"].codes
    assert codes.dtype == torch.int16
    groups = grouped_rows(codes, granularity)
    if granularity != 12:
        assert codes.abs().max() > 8, "wider than the 4 bits of a group"
    for row in groups:
        # A group is 4 bits and a shift.
        lowest = min((int(c) & -int(c) for c in row.tolist() if c), default=1)
        assert row.abs().max() // lowest <= 8


@pytest.mark.parametrize("fold", [True, False])
def test_training_folded_frozen_and_saved(fold: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)

    def build() -> nn.Module:
        return Chain(
            nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
        )

    model, x = build(), torch.randn(5, 4, 6, 6)
    linger.prepare(model, (x,))
    if fold:
        linger.fuse_bn(model)
    linger.quantize(model, QuantConfig(granularity=2, range="last_absmax"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        if step == 3:
            set_fix_method(model, FIX_FIXED)
            before = get_fix_configs(model, data_only=True)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert model.net[0].weight.grad.abs().sum() > 0
    assert get_fix_configs(model, data_only=True) == before
    assert len(before["net.4"]["weight"]["scale"]) == 3 * 48
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = linger.load_checkpoint(build, tmp_path / "state.pt")
    model.eval()
    assert torch.equal(other.eval()(x), model(x))
    assert_integer_exact(model, x)


def test_finer_groups_lose_less() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 12)

    def error(granularity: Any) -> float:
        torch.manual_seed(0)
        model = quantized(
            nn.Linear(12, 8), x, granularity=granularity, weight_bits=3, output_bits=16
        )
        reference = linger.strip(quantized(nn.Linear(12, 8), x))
        reference.load_state_dict(
            {k: v for k, v in model.state_dict().items() if "_linger" not in k}
        )
        with torch.no_grad():
            return float((model.eval()(x) - reference(x)).square().mean())

    errors = [error(granularity) for granularity in ("tensor", 6, 3)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"granularity": 5}, r"net.0/linear/0.*12 input channels do not part into groups of 5"),
        ({"granularity": 0}, "`granularity` must be one of.*a group size.*Found: 0"),
        ({"granularity": "row"}, "`granularity` must be one of.*Found: 'row'"),
        ({"granularity": True}, "`granularity` must be one of.*Found: True"),
        ({"granularity": 4, "platform": "onnxruntime"}, "needs scale='power_of_two'.*'free'"),
        ({"granularity": 4, "weight_range": "lsq"}, "ranges of groups are not learned"),
        ({"granularity": 4, "strict_platform": True}, "no engine has scales of groups"),
    ],
)
def test_what_cannot_be(fields: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=message):
        quantized(nn.Linear(12, 5), torch.randn(3, 12), **fields)


@pytest.mark.parametrize(("platform", "dialect"), [("venusa", "linger"), ("onnxruntime", "qdq")])
def test_no_dialect_takes_them_and_check_says_so(
    platform: str, dialect: str, tmp_path: Path
) -> None:
    x = torch.randn(3, 12)
    fields = {"granularity": 4, "platform": platform, "scale": "power_of_two"}
    model = quantized(nn.Linear(12, 5), x, **fields).eval()
    with pytest.raises(UnsupportedError, match=r"net.0/linear/0.*no dialect has scales of groups"):
        linger.export_onnx(model, (x,), tmp_path / "model.onnx", dialect)
    assert list(tmp_path.iterdir()) == []
    if platform == "venusa":
        assert any(f.rule == "granularity" for f in linger.check(model, platform))


def test_other_layers_keep_one_scale() -> None:
    model = Chain(nn.ConvTranspose2d(4, 6, 3), nn.ReLU())
    x = torch.randn(2, 4, 5, 5)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(granularity=2))
    model(x)
    model.eval()
    assert_integer_exact(model, x)
    assert isinstance(get_fix_configs(model, data_only=True)["net.0"]["weight"]["scale"], float)
