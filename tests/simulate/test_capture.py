"""Graph captures of quantized models: export, trace, compile."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import Lambda, ResNet, images, trained


def _forward(self: Any, x: Tensor) -> Tensor:
    y = F.relu6(self.a(x))
    z = torch.cat([self.b(y), F.max_pool2d(y, 3, 1, 1)], 1) * 0.3
    left, right = z.chunk(2, 1)
    z = F.avg_pool2d(left - right + 0.1, 2)
    return self.c(z.flatten(1)), z.mean((2, 3))


def _mixed() -> nn.Module:
    return Lambda(
        _forward,
        a=nn.Conv2d(3, 4, 3, padding=1),
        b=nn.Conv2d(4, 4, 1),
        c=nn.Linear(4 * 36, 3),
    )


MODELS = {"resnet": ResNet, "mixed": _mixed}
CONFIGS = {
    "8": QuantConfig(),
    "16": QuantConfig(weight_bits=8, activation_bits=16, output_bits=16),
    "float-out": QuantConfig(output_bits=None),
}
# Behind float outputs the mixed model computes in float, where a compiler may differ by an ulp.
COMPILED = [(m, c) for m in MODELS for c in CONFIGS if (m, c) != ("mixed", "float-out")]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def build(name: str, config: str) -> nn.Module:
    fold = "running" if name == "resnet" else None
    model = trained(MODELS[name](), images(), config=CONFIGS[config], fold=fold, steps=3, lr=0.02)
    with torch.no_grad():
        model(images())  # evaluation prepares the weights
    return model


@pytest.fixture(params=[(m, c) for m in MODELS for c in CONFIGS], ids="-".join)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(*request.param)


def _leaves(output: Any) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(output)


def _same(found: Any, expected: Any) -> None:
    for a, b in zip(_leaves(found), _leaves(expected), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_export(model: nn.Module) -> None:
    x = images()
    program = torch.export.export(model, (x,), strict=False)
    for batch in (x, images() * 2):
        _same(program.module()(batch), model(batch))


@torch.no_grad()
def test_export_in_integers(model: nn.Module) -> None:
    x = images()
    with linger.integer(model):
        program = torch.export.export(model, (x,), strict=False)
    for batch in (x, images() * 2):
        _same(program.module()(batch), model(batch))
    called = Counter(str(n.target) for n in program.graph.nodes if "linger" in str(n.target))
    assert called["linger.conv.default"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert called["linger.linear.default"] == 1


@torch.no_grad()
@pytest.mark.parametrize("system", ["fake", "integer"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_trace(model: nn.Module, system: str) -> None:
    x = images()
    if system == "integer":
        with linger.integer(model):
            traced = torch.jit.trace(model, x, check_trace=False)
    else:
        traced = torch.jit.trace(model, x, check_trace=False)
    for batch in (x, images() * 2):
        _same(traced(batch), model(batch))


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "config"), COMPILED)
def test_compile(name: str, config: str, backend: str) -> None:
    torch._dynamo.reset()
    with torch.enable_grad():
        model = build(name, config)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for batch in (images(), images() * 2):
        _same(compiled(batch), model(batch))


PIECES: dict[str, Callable[[Tensor], Any]] = {
    "chunk": lambda y: y.chunk(2, 1)[0] + 1.0,
    "split": lambda y: y.split(2, 1)[1],
    "unbind": lambda y: y.unbind(1)[0],
    "slice": lambda y: y[:, :2] * 2.0,
    "clamp": lambda y: y.clamp(-0.3, 0.4),
    "mean": lambda y: y.mean((2, 3)),
    "cat": lambda y: torch.cat([y, y * 0.1], 1),
    "tuple": lambda y: {"a": (y, [y.flatten(1)])},
}


@torch.no_grad()
@pytest.mark.parametrize("piece", PIECES)
def test_compile_pieces(piece: str) -> None:
    with torch.enable_grad():
        model = Lambda(lambda self, x: PIECES[piece](self.a(x)), a=nn.Conv2d(3, 4, 3))
        trained(model, images())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for batch in (images(), images() * 2):
        _same(compiled(batch), model(batch))


def test_a_call_the_compiler_hides_is_an_error_not_a_silent_float() -> None:
    layers = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 3)}
    model = Lambda(lambda self, x: self.b(F.pad(self.a(x), (1, 1, 1, 1))), **layers)
    trained(model, images())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad(), pytest.raises(Exception, match=r"(?s)/conv2d/0.*F\.pad"):
        compiled(images())


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_training_is_at_most_one_step_apart(backend: str) -> None:
    torch._dynamo.reset()
    x = images(8)
    eager = linger.prepare(ResNet(), (x,))
    linger.quantize(linger.fuse_bn(eager))
    for _ in range(3):
        with torch.no_grad():
            eager(x)
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    expected, found = eager(x), compiled(x)
    step = float(expected._linger_tag.step)
    codes = ((found - expected) / step).round().abs()
    assert codes.max() <= 1
    expected.square().sum().backward()
    found.square().sum().backward()
    for (name, p), q in zip(eager.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            cosine = F.cosine_similarity(p.grad.flatten(), q.grad.flatten(), dim=0)
            assert cosine > 0.99 or p.grad.norm() < 1e-5, name
    for (name, a), b in zip(eager.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, a, rtol=0.02, atol=0.01, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_a_capture_leaves_the_model_as_it_was() -> None:
    model = trained(ResNet(), images(), fold="running")
    x = images()
    expected = model(x)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    torch.export.export(model, (x,), strict=False)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    with linger.integer(model):
        assert torch.equal(model(x), expected)


@torch.no_grad()
def test_a_model_that_was_never_evaluated_can_be_captured() -> None:
    model = trained(ResNet(), images(), fold="running")
    x = images()
    fresh = copy.deepcopy(model)
    program = torch.export.export(fresh, (x,), strict=False)
    _same(program.module()(x), model(x))
    fresh = copy.deepcopy(model)
    with linger.integer(fresh):
        program = torch.export.export(fresh, (x,), strict=False)
    _same(program.module()(x), model(x))
    torch._dynamo.reset()
    fresh = copy.deepcopy(model)
    _same(torch.compile(fresh, backend="aot_eager", fullgraph=True)(x), model(x))


def test_every_site_appears_once_in_the_exported_integer_graph() -> None:
    x = images()
    model = trained(ResNet(), x, fold="running").eval()
    with torch.no_grad(), linger.integer(model):
        model(x)
        graph = torch.export.export(model, (x,), strict=False).graph
    found = Counter(
        str(node.target).split(".")[1] for node in graph.nodes if "linger." in str(node.target)
    )
    kernels = {
        "conv2d": "conv",
        "linear": "linear",
        "add": "add",
        "adaptive_avg_pool2d": "avg_pool",
    }
    expected = Counter(
        kernels[site.op.kind]
        for site in instrumentation_of(model).sites
        if site.quantized and site.op.kind in kernels
    )
    assert expected["conv"] > 3
    assert {kind: found[kind] for kind in expected} == dict(expected)
