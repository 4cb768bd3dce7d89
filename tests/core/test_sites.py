"""Sites: every spelling of a call has one name, and the name stays what it was."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantizationWarning
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import (
    Block,
    Chain,
    Lambda,
    ResNet,
    assert_integer_exact,
    images,
    keys,
    site_of,
    train,
    trained,
)


def _iadd(x: Tensor, y: Any) -> Tensor:
    x = x.clone()
    x += y
    return x


def _isub(x: Tensor, y: Any) -> Tensor:
    x = x.clone()
    x -= y
    return x


def _imul(x: Tensor, y: Any) -> Tensor:
    x = x.clone()
    x *= y
    return x


UNARY: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "relu": [
        F.relu,
        torch.relu,
        lambda x: x.relu(),
        lambda x: x.clone().relu_(),
        lambda x: F.relu(x, inplace=True),
        lambda x: F.relu_(x.clone()),
        lambda x: torch.relu_(x.clone()),
    ],
    "relu6": [F.relu6, lambda x: F.relu6(x, True)],
    "clamp": [
        lambda x: x.clamp(-1, 1),
        lambda x: torch.clamp(x, min=-1, max=1),
        lambda x: x.clip(-1, 1),
        lambda x: torch.clip(x, -1, 1),
        lambda x: x.clone().clamp_(-1, 1),
    ],
    "clamp_min": [lambda x: x.clamp_min(0), lambda x: torch.clamp_min(x, 0)],
    "clamp_max": [lambda x: x.clamp_max(1), lambda x: torch.clamp_max(x, 1)],
    "hardtanh": [F.hardtanh, lambda x: F.hardtanh(x, -2.0, 2.0, True)],
    "add": [
        lambda x: x + 1.0,
        lambda x: 1.0 + x,
        lambda x: x + x,
        lambda x: x.add(x),
        lambda x: torch.add(x, x),
        lambda x: x.clone().add_(x),
        lambda x: _iadd(x, x),
        lambda x: x.__add__(x),
        lambda x: torch.add(input=x, other=x),
    ],
    "sub": [
        lambda x: x - 1.0,
        lambda x: 1.0 - x,
        lambda x: torch.rsub(x, 1.0),
        lambda x: x.sub(1.0),
        lambda x: torch.sub(x, 1.0),
        lambda x: torch.subtract(x, 1.0),
        lambda x: _isub(x, 1.0),
    ],
    "mul": [
        lambda x: x * 2.0,
        lambda x: 2.0 * x,
        lambda x: x * x,
        lambda x: x.mul(x),
        lambda x: torch.mul(x, x),
        lambda x: torch.multiply(x, x),
        lambda x: _imul(x, x),
        lambda x: x.clone().mul_(0.5),
    ],
    "cat": [
        lambda x: torch.cat([x, x], 1),
        lambda x: torch.concat((x, x), dim=1),
        lambda x: torch.concatenate([x, x], axis=1),
    ],
    "max_pool2d": [
        lambda x: F.max_pool2d(x, 2),
        lambda x: torch.max_pool2d(x, 2),
        lambda x: F.max_pool2d(input=x, kernel_size=2),
    ],
    "avg_pool2d": [lambda x: F.avg_pool2d(x, 2), lambda x: torch._C._nn.avg_pool2d(x, 2)],
    "adaptive_avg_pool2d": [lambda x: F.adaptive_avg_pool2d(x, 2)],
    "mean": [
        lambda x: x.mean((2, 3)),
        lambda x: torch.mean(x, (2, 3)),
        lambda x: x.mean(dim=[2, 3], keepdim=True),
    ],
    "pad": [
        lambda x: F.pad(x, (1, 1)),
        lambda x: F.pad(x, (1, 1), value=0.5),
        lambda x: torch.constant_pad_nd(x, (1, 1), 0.5),
    ],
}
SPELLINGS = [
    pytest.param(op, function, id=f"{op}-{index}")
    for op, functions in UNARY.items()
    for index, function in enumerate(functions)
]


def _after_conv(function: Callable[[Tensor], Tensor]) -> nn.Module:
    return Lambda(lambda self, x: function(self.conv(x)), conv=nn.Conv2d(3, 4, 3, padding=1))


@pytest.mark.parametrize(("op", "function"), SPELLINGS)
def test_spelling(op: str, function: Callable[[Tensor], Tensor]) -> None:
    """Every spelling has the same site, is quantized, and computes what it says."""
    x = torch.randn(2, 3, 8, 8)
    model = _after_conv(function)
    expected = model(x).detach()
    linger.prepare(model, (x,))
    assert keys(model) == ["conv/conv2d/0", f"/{op}/0"]
    linger.quantize(model, linger.QuantConfig(activation_bits=16, output_bits=16, weight_bits=16))
    train(model, (x,), 2, 0.0)
    model.eval()
    assert site_of(model, f"/{op}/0").quantized
    assert_integer_exact(model, x)
    # 16 bits are close to float: a swapped operand or a lost constant is not.
    assert torch.allclose(model(x), expected, atol=5e-3)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(inplace=True),
        nn.ReLU(),
        nn.ReLU6(inplace=True),
        nn.Hardtanh(inplace=True),
        nn.MaxPool2d(2),
        nn.AvgPool2d(2),
        nn.AdaptiveAvgPool2d(2),
        nn.ZeroPad2d(1),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 2, 1),
        nn.ConvTranspose2d(4, 2, 2),
        nn.Linear(8, 3),
        nn.Dropout(0.5),
        nn.Dropout2d(0.5),
    ],
    ids=lambda layer: type(layer).__name__ + ("-inplace" if getattr(layer, "inplace", 0) else ""),
)
def test_modules_are_sites_of_their_own(layer: nn.Module) -> None:
    x = torch.randn(2, 3, 8, 8)
    model = Chain(nn.Conv2d(3, 4, 3, padding=1), layer)
    linger.prepare(model, (x,))
    assert len(keys(model)) == 2
    assert keys(model)[1].startswith("net.1/")
    linger.quantize(model)
    train(model, (x,), 2, 0.0)
    model.eval()
    assert_integer_exact(model, x)


def test_functional_layers_with_own_parameters() -> None:
    class Raw(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 3, 3, 3))
            self.v = nn.Parameter(torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(x, self.w, None, 1, padding="same").mean((2, 3))
            return F.linear(y, weight=self.v)

    x = torch.randn(2, 3, 8, 8)
    model = trained(Raw(), x)
    assert keys(model) == ["/conv2d/0", "/mean/0", "/linear/0"]
    assert_integer_exact(model, x)


def test_a_residual_network_has_all_its_sites() -> None:
    model = linger.prepare(ResNet(dropout=0.1), (images(),))
    blocks = [
        f"layers.{i}.{name}"
        for i in range(2)
        for name in (
            *("conv1/conv2d/0", "bn1/batch_norm/0", "relu/relu/0", "conv2/conv2d/0"),
            *("bn2/batch_norm/0", "/add/0", "relu@1/relu/0"),
        )
    ]
    blocks = [key.replace("./", "/") for key in blocks]
    assert keys(model) == [
        *("stem/conv2d/0", "bn/batch_norm/0", "/relu/0"),
        *blocks,
        *("pool/adaptive_avg_pool2d/0", "dropout/dropout/0", "fc/linear/0"),
    ]


def test_names_do_not_depend_on_other_branches() -> None:
    def forward(self: Any, x: Tensor, extra: bool) -> Tensor:
        y = self.a(x)
        if extra:
            y = self.side(y) + self.side(y)
        return self.b(y)

    def build() -> nn.Module:
        layers = {name: nn.Linear(4, 4) for name in ("a", "b", "side")}
        return Lambda(forward, **layers)

    x = torch.randn(2, 4)
    small = keys(linger.prepare(build(), (x, False)))
    large = keys(linger.prepare(build(), (x, True)))
    assert set(small) < set(large)
    assert set(large) - set(small) == {"side/linear/0", "side@1/linear/0", "/add/0"}


def test_a_reused_module_has_one_site_per_call() -> None:
    x = torch.randn(3, 4)
    model = Lambda(lambda self, x: self.fc(self.fc(self.fc(x) * 0.1)), fc=nn.Linear(4, 4))
    trained(model, x)
    assert keys(model) == ["fc/linear/0", "/mul/0", "fc@1/linear/0", "fc@2/linear/0"]
    ranges = {
        site.output.estimator.absmax().item()
        for site in instrumentation_of(model).sites
        if site.output is not None
    }
    assert len(ranges) == 4
    assert_integer_exact(model, x)


def test_a_module_under_two_names() -> None:
    shared = nn.Linear(4, 4)
    x = torch.randn(3, 4)
    model = Lambda(lambda self, x: self.b(self.a(x)), a=shared, b=shared)
    trained(model, x)
    assert keys(model) == ["a/linear/0", "a@1/linear/0"]
    assert_integer_exact(model, x)


def test_tied_weights_have_their_own_sites() -> None:
    x = torch.randn(3, 4)
    model = Lambda(lambda self, x: self.b(self.a(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    model.b.weight = model.a.weight
    trained(model, x)
    assert model.b.weight is model.a.weight
    assert keys(model) == ["a/linear/0", "b/linear/0"]
    assert_integer_exact(model, x)


def test_nested_sequentials() -> None:
    x = torch.randn(3, 4)
    inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    model = trained(Chain(inner, nn.ReLU()), x)
    assert keys(model) == [
        *("net.0.0/linear/0", "net.0.1.0/relu/0", "net.0.1.1/linear/0", "net.1/relu/0")
    ]
    assert_integer_exact(model, x)


def test_the_root_may_be_a_sequential() -> None:
    x = torch.randn(3, 4)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    expected = model(x)
    linger.prepare(model, (x,))
    assert torch.equal(model(x), expected)
    linger.quantize(model)
    train(model, (x,), 2, 0.0)
    model.eval()
    assert keys(model) == ["0/linear/0", "1/relu/0", "2/linear/0"]
    assert_integer_exact(model, x)


def test_the_root_may_iterate_over_its_children() -> None:
    class Iterating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.children():
                x = layer(x)
            return x

    x = torch.randn(3, 4)
    model = trained(Iterating(), x)
    assert_integer_exact(model, x)


def test_the_root_may_be_a_layer() -> None:
    x = torch.randn(3, 4)
    model = trained(nn.Linear(4, 2), x)
    assert keys(model) == ["/linear/0"]
    assert_integer_exact(model, x)


def test_subclasses_of_layers() -> None:
    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0.5

    x = torch.randn(2, 3, 6, 6)
    model = trained(Chain(Scaled(3, 4, 3)), x)
    assert keys(model) == ["net.0/conv2d/0", "net.0/mul/0"]
    assert isinstance(model.net[0], Scaled)
    assert_integer_exact(model, x)


def test_several_inputs_and_keywords() -> None:
    def forward(self: Any, a: Tensor, b: Tensor, *, scale: float = 1.0, skip: Tensor) -> Tensor:
        return self.a(a) * scale + self.b(b) + skip

    model = Lambda(forward, a=nn.Linear(4, 3), b=nn.Linear(5, 3))
    a, b, skip = torch.randn(2, 4), torch.randn(2, 5), torch.randn(2, 3)
    linger.prepare(model, (a, b), {"skip": skip, "scale": 0.5})
    linger.quantize(model)
    for _ in range(2):
        model(a, b, scale=0.5, skip=skip)
    model.eval()
    fake = model(a, b, scale=0.5, skip=skip)
    with linger.integer(model):
        assert torch.equal(model(a, b, scale=0.5, skip=skip), fake)
    assert keys(model) == ["a/linear/0", "/mul/0", "b/linear/0", "/add/0", "/add/1"]


def test_output_trees() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        y = self.a(x)
        return {"logits": y, "pair": (y + y, [self.b(y)]), "note": "text", "raw": x}

    x = torch.randn(2, 4)
    model = trained(Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 2)), x)
    assert_integer_exact(model, x)
    with linger.integer(model):
        output = model(x)
    assert output["note"] == "text"
    assert output["raw"] is x
    assert output["logits"].dtype == torch.float32


def test_training_and_evaluation_branches_are_both_found() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.body(x)
        return self.train_head(y) if self.training else self.eval_head(y)

    layers = {name: nn.Linear(4, 4) for name in ("body", "train_head", "eval_head")}
    model = linger.prepare(Lambda(forward, **layers), (torch.randn(2, 4),))
    assert set(keys(model)) == {"body/linear/0", "train_head/linear/0", "eval_head/linear/0"}
    assert model.training


def test_a_site_without_a_range_runs_float() -> None:
    """A branch that training never took has no range: evaluation computes it in float."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return self.train_head(x) if self.training else self.eval_head(x)

    x = torch.randn(2, 4)
    layers = {name: nn.Linear(4, 4) for name in ("train_head", "eval_head")}
    model = trained(Lambda(forward, **layers), x)
    assert torch.equal(model(x), F.linear(x, model.eval_head.weight, model.eval_head.bias))


def test_a_call_first_met_later_stays_float_and_is_named_once() -> None:
    def forward(self: Any, x: Tensor, deep: bool = False) -> Tensor:
        y = self.a(x)
        return self.b(y) if deep else y

    x = torch.randn(2, 4)
    model = trained(Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), x)
    with pytest.warns(QuantizationWarning) as caught:
        y = model(x, deep=True)
    (message,) = [str(w.message) for w in caught]
    assert "`b/linear/0`" in message
    # The innermost frame of the user's code is the line of the lambda's body above.
    assert "test_sites.py:" in message
    assert torch.equal(y, F.linear(model(x), model.b.weight, model.b.bias))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x, deep=True)
    with linger.integer(model):
        assert torch.equal(model(x, deep=True), y)


def test_the_forward_of_a_submodule_is_instrumented_too() -> None:
    x = torch.randn(4, 6, 5, 5)
    model = Lambda(lambda self, x: self.b(self.a(x)), a=Block(6), b=Block(6))
    trained(model, x)
    whole = model.a(x)
    assert not torch.equal(whole, model.a.relu(whole + 0.013))
    with linger.integer(model):
        assert torch.equal(model.a(x), whole)
    linger.strip(model)
    assert not torch.equal(model.a(x), whole)


def test_an_exception_inside_forward_leaves_the_mode() -> None:
    x = torch.randn(2, 4)

    def forward(self: Any, x: Tensor, fail: bool = False) -> Tensor:
        y = self.a(x)
        if fail:
            msg = "user"
            raise KeyError(msg)
        return self.b(y)

    model = trained(Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), x)
    before = model(x)
    for _ in range(2):
        with pytest.raises(KeyError, match="user"):
            model(x, fail=True)
        assert not torch.overrides._get_current_function_mode_stack()
        assert torch.equal(model(x), before)
    with linger.integer(model), pytest.raises(KeyError):
        model(x, fail=True)
    assert not torch.overrides._get_current_function_mode_stack()
    assert_integer_exact(model, x)


def test_an_exception_in_a_layer_leaves_the_mode() -> None:
    x = torch.randn(2, 4)
    model = trained(Chain(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), x)
    before = model(x)
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.randn(2, 5))
    assert not torch.overrides._get_current_function_mode_stack()
    assert torch.equal(model(x), before)


def test_an_exception_caught_by_the_model_itself() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        try:
            self.a(x[:, :3])
        except RuntimeError:
            x = x + 0
        return self.b(self.a(x))

    x = torch.randn(2, 4)
    model = trained(Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), x)
    assert_integer_exact(model, x)


def test_an_overwritten_name_that_is_read_again_stays_float() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        F.relu_(y)  # the old name is read below
        return self.b(y)

    x = torch.randn(4, 4)
    model = trained(Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), x)
    assert "in place" in str(site_of(model, "/relu/0").why_float)
    assert_integer_exact(model, x)
    reference = F.linear(
        F.linear(x, model.a.weight, model.a.bias).relu(), model.b.weight, model.b.bias
    )
    assert torch.allclose(model(x), reference, atol=0.1)


def _assign(y: Tensor) -> None:
    y[:, 0] = 0.5


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "setitem": _assign,
    "zero_": lambda y: y.zero_(),
    "tanh_": lambda y: y.tanh_(),
    "relu_": lambda y: y.relu_(),
    "masked_fill_": lambda y: y.masked_fill_(y > 0, 0.5),
    "view": lambda y: y[:, :2].zero_(),
    "out": lambda y: torch.tanh(y, out=y),
}


@pytest.mark.parametrize("write", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize("head", [True, False], ids=["read-by-a-layer", "returned"])
def test_plain_writes_into_a_quantized_value(write: Callable[[Tensor], Any], head: bool) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        with torch.no_grad():
            write(y)
        return self.b(y) if head else y

    x = torch.randn(4, 4)
    model = trained(Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), x)
    found = model(x)
    y = F.linear(x, model.a.weight, model.a.bias).detach()
    write(y)
    expected = F.linear(y, model.b.weight, model.b.bias) if head else y
    assert torch.allclose(found, expected, atol=0.1)
    assert_integer_exact(model, x)


def test_integer_arithmetic_on_indices_is_not_a_site() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        index = torch.arange(4) + 1
        return self.a(x)[:, (index * 2) % 4] + x.mean()

    x = torch.randn(4, 4)
    model = trained(Lambda(forward, a=nn.Linear(4, 4)), x)
    assert "/mul/0" not in keys(model)
    assert_integer_exact(model, x)


def test_a_weight_computed_from_the_input() -> None:
    """Nothing derived from such a weight may be kept for the next batch."""

    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.make(x.mean(0)).reshape(4, 3)
        return F.linear(x, weight)

    model = Lambda(forward, make=nn.Linear(3, 12))
    trained(model, torch.randn(64, 3) * 2)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(8, 3)
            expected = F.linear(x, model.make(x.mean(0)).reshape(4, 3))
            assert torch.allclose(model(x), expected)
            assert_integer_exact(model, x)


def test_a_parametrized_weight_that_changes_in_evaluation() -> None:
    x = torch.randn(4, 6)
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model = trained(Chain(layer), x)
    with torch.no_grad():
        model(x)
        for _ in range(5):
            layer.parametrizations.weight.original0.mul_(0.7)
            expected = F.linear(x, layer.weight, layer.bias)
            assert torch.allclose(model(x), expected, atol=0.1)
            assert_integer_exact(model, x)


def test_weights_changed_in_evaluation_are_seen() -> None:
    x = torch.randn(4, 6)
    model = trained(Chain(nn.Linear(6, 6)), x)
    with torch.no_grad():
        before = model(x)
        model.net[0].weight.mul_(0.5)
        assert not torch.equal(model(x), before)
        assert_integer_exact(model, x)
        model.net[0].weight.data = model.net[0].weight.data * 0.5
        assert_integer_exact(model, x)
        expected = F.linear(x, model.net[0].weight, model.net[0].bias)
        assert torch.allclose(model(x), expected, atol=0.1)


@pytest.mark.parametrize("size", [7, 9])
def test_an_adaptive_pool_at_another_size(size: int) -> None:
    """Windows that become uneven after set-up are computed in float, never cut off."""
    model = Lambda(lambda self, x: F.adaptive_avg_pool2d(self.conv(x), 2), conv=nn.Conv2d(3, 4, 1))
    trained(model, torch.randn(4, 3, 8, 8))
    x = torch.randn(4, 3, size, size)
    expected = F.adaptive_avg_pool2d(F.conv2d(x, model.conv.weight, model.conv.bias), 2)
    assert torch.allclose(model(x), expected, atol=0.03)
    assert_integer_exact(model, x)


def test_attributes_of_integers_look_like_floats_to_the_model() -> None:
    seen: list[Any] = []

    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.a(x)
        seen.append((y.dtype, y.is_floating_point(), torch.is_floating_point(y), y.shape))
        z = torch.zeros_like(y)
        seen.append((z.dtype, float(y.max()), (y > 0).sum().item()))
        return self.b(y) + z

    x = torch.randn(2, 4)
    model = trained(Lambda(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4)), x)
    seen.clear()
    assert_integer_exact(model, x)
    assert seen[0] == seen[2]
    assert seen[1] == seen[3]


def test_a_prepared_model_is_copied_with_its_ranges() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    x = torch.randn(5, 4)
    linger.prepare(model, (x,))
    linger.quantize(model)
    model(x)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expected = model.eval()(x)
        model[0].weight.zero_()
        assert torch.equal(twin.eval()(x), expected)
