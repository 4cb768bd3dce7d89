"""Training for TFLite: what the schedule does, how far training is from integers, what resumes."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import QuantConfig, UnsupportedError
from lightning_linger.core.instrumentation import instrumentation_of
from tests.models import ResNet, assert_integer_exact, images, site_of, train, trained

TFLITE = QuantConfig(platform="tflite")


def network(config: QuantConfig = TFLITE) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    x = images(8)
    return trained(ResNet(), x, config=config, fold="running", steps=4, lr=0.05), x


@pytest.mark.parametrize(
    "platform",
    [
        pytest.param(name, id=f"row79-{name}")
        for name in (
            *("tflite", "tflite_single_rounding", "tflite_float_tables", "tflite_divided_mean"),
        )
    ],
)
def test_a_trained_network_is_what_the_integers_are(platform: str) -> None:
    model, x = network(QuantConfig(platform=platform))
    assert_integer_exact(model, x)
    assert_integer_exact(model, x * 10)
    assert_integer_exact(model, x[:1])
    assert {row.platform for row in linger.summary(model) if row.bits} == {platform}


@pytest.mark.parametrize("bits", [4, 6, 16])
def test_other_widths_are_exact_too(bits: int) -> None:
    config = QuantConfig(
        platform="tflite", weight_bits=min(bits, 8), activation_bits=bits, output_bits=bits
    )
    model, x = network(config)
    assert_integer_exact(model, x)


LAYERS = {
    "conv": lambda: nn.Conv2d(3, 16, 3),
    "depthwise": lambda: nn.Conv2d(3, 6, 3, groups=3),
    "transposed": lambda: nn.ConvTranspose2d(3, 4, 3, stride=2),
    "linear": lambda: nn.Linear(16, 32),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("kind", [pytest.param(k, id=f"row77-{k}") for k in LAYERS])
def test_training_has_the_codes_of_the_integers(kind: str, bits: int) -> None:
    """On the same operands; but for ties, which these are too few to have."""
    torch.manual_seed(0)
    x = torch.randn(64, 3, 16, 16)
    config = QuantConfig(platform="tflite", weight_bits=bits, activation_bits=8, output_bits=bits)
    model = trained(nn.Sequential(LAYERS[kind]()), x, config=config)
    with torch.no_grad():
        evaluated = model(x)
        with linger.integer(model):
            integers = model(x)
        instrumentation_of(model).switches.observing = False
        training = model.train()(x)
    assert torch.equal(evaluated, integers)
    assert torch.equal(training, integers)


def test_training_learns() -> None:
    """The gradient of the float function at the values of the integers."""
    torch.manual_seed(0)
    x, target = images(16), torch.randint(0, 5, (16,))
    model = linger.fuse_bn(linger.prepare(ResNet(), (x,)))
    linger.quantize(model, TFLITE)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.3 * losses[0]
    assert_integer_exact(model.eval(), x)


def test_row78_weights_stay_narrow_and_the_batch_norm_is_folded_in_training() -> None:
    model, x = network()
    stem = site_of(model, "stem/conv2d/0")
    assert stem.fold is model.bn
    assert stem.weights.grid is not None
    assert stem.weights.grid.narrow
    with torch.no_grad():
        model(x)
    assert stem.prepared["weights"].codes.abs().max() == 127
    with torch.no_grad():
        factor = model.bn.weight / torch.sqrt(model.bn.running_var + model.bn.eps)
        folded = model.stem.weight * factor.view(-1, 1, 1, 1)
    steps = torch.tensor(stem.prepared["weights"].steps)
    assert torch.allclose(steps, folded.abs().amax((1, 2, 3)) / 127, rtol=1e-5)


# --- learned ranges -----------------------------------------------------------------------------


def test_a_learned_step_and_a_learned_offset_train() -> None:
    torch.manual_seed(0)
    x, target = images(16), torch.randint(0, 5, (16,))
    model = linger.fuse_bn(linger.prepare(ResNet(), (x,)))
    linger.quantize(model, QuantConfig(platform="tflite", range="lsq", weight_range="lsq"))
    learned = linger.learned_ranges(model)
    offsets = {name: p for name, p in learned.items() if name.endswith(".offset")}
    assert 0 < len(offsets) < len(learned)
    optimizer = torch.optim.Adam(linger.parameter_groups(model), lr=2e-3)
    before = None
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        if before is None:
            before = {name: p.detach().clone() for name, p in learned.items()}
        optimizer.step()
    moved = [name for name, p in offsets.items() if not torch.equal(p, before[name])]
    assert moved
    assert all(torch.isfinite(p).all() for p in learned.values())
    assert_integer_exact(model.eval(), x)


def test_what_was_learned_is_in_the_state() -> None:
    config = QuantConfig(platform="tflite", range="lsq")
    model, x = network(config)
    other = linger.prepare(ResNet(), (x,))
    linger.fuse_bn(other)
    linger.quantize(other, config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model(x))
    assert_integer_exact(other, x)


def test_frozen_offsets_stay() -> None:
    model, x = network(QuantConfig(platform="tflite", range="lsq"))
    linger.freeze_ranges(model)
    before = {name: p.detach().clone() for name, p in linger.learned_ranges(model).items()}
    train(model, (x,), 3, 0.1)
    assert all(torch.equal(p, before[n]) for n, p in linger.learned_ranges(model).items())


# --- state and files ----------------------------------------------------------------------------


def test_zero_points_come_back_with_the_state() -> None:
    model, x = network()
    other = linger.quantize(linger.fuse_bn(linger.prepare(ResNet(), (x,))), TFLITE)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model(x))
    scales = [row.scale for row in linger.summary(other)]
    assert scales == [row.scale for row in linger.summary(model)]
    assert any("zero -128" in scale for scale in scales)


@pytest.mark.parametrize("dialect", ["linger", "qdq"])
def test_no_file_pretends_to_be_the_engine(dialect: str, tmp_path: Path) -> None:
    model, x = network()
    path = tmp_path / "model.onnx"
    with pytest.raises(UnsupportedError, match=r"`stem/conv2d/0`.*no ONNX operator rounds"):
        linger.export_onnx(model, (x,), path, dialect)
    assert list(tmp_path.iterdir()) == []


def test_a_dump_has_what_is_stored(tmp_path: Path) -> None:
    model, x = network()
    dumper = linger.Dumper(tmp_path / "dump", level=2)
    with dumper, linger.integer(model), torch.no_grad():
        model(x)
    dump = linger.read_dump(dumper.folder)
    site = site_of(model, "stem/conv2d/0")
    (op,) = (op for op in dump.ops if op.info.get("site") == site.key)
    codes, result = op.values["result_codes"].tensors[0], op.values["result"].tensor
    step = float(site.output.step())
    assert (codes.scale, codes.zero_point, codes.bits) == (step, -128, 8)
    assert codes.values.dtype is torch.int8
    assert torch.equal((codes.values.float() + 128) * step, result)


def test_a_captured_graph_computes_the_same() -> None:
    model, x = network()
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,), strict=False)
        assert torch.equal(program.module()(x), expected)
        with linger.integer(model):
            whole = torch.export.export(model, (x,), strict=False)
        assert torch.equal(whole.module()(x), expected)


@pytest.mark.parametrize("range_", ["ema_absmax", "lsq", "mse"])
def test_training_where_nothing_can_be_read(range_: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's way, with steps and zero points as tensors: at most a code away in each layer."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU6(), nn.AvgPool2d(2), nn.Conv2d(6, 5, 3), nn.Tanh()]
    model = nn.Sequential(*layers)
    linger.prepare(model, (x,))
    linger.quantize(model, QuantConfig(platform="tflite", range=range_))
    for module in list(sys.modules.values()):
        if module.__name__.startswith("lightning_linger") and hasattr(module, "can_read"):
            monkeypatch.setattr(module, "can_read", lambda tensor: False)
    model.train()
    for _ in range(3):
        training = model(x)
        training.sum().backward()
    monkeypatch.undo()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert_integer_exact(model.eval(), x)
    with torch.no_grad():
        # Both convolutions and the averages may round the other way.
        assert (model(x) - training.detach()).abs().max() <= 6 / 128
