"""Learned rounding: better than to nearest, and the same codes wherever the model runs."""

import copy
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.stages.adaround import AdaRoundConfig
from lightning_linger.stages.checkpoints import restore
from tests.models import Chain, Lambda, assert_integer_exact, float_state, site_of

QUICK = AdaRoundConfig(steps=50, learning_rate=0.1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(9)


def smooth(*shape: int) -> Tensor:
    """Images whose pixels go together, as those of photographs do: there rounding can help."""
    low = torch.rand(*shape[:-2], 3, 3)
    return nn.functional.interpolate(low, shape[-2:], mode="bilinear")


def net(channels: int = 2) -> nn.Module:
    return Chain(
        *(nn.Conv2d(channels, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        *(nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(6, 4, 3, stride=2, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 5)),
    )


LAYERS = ("net.0/conv2d/0", "net.3/conv2d/0", "net.5/conv_transpose2d/0", "net.9/linear/0")


def ready(x: Tensor, model: nn.Module | None = None, fold: bool = True, **config: Any) -> nn.Module:
    model = net() if model is None else model
    for _ in range(30):
        model.train()(x)
    linger.prepare(model.eval(), (x,))
    if fold:
        linger.fuse_bn(model)
    settings = {"weight_bits": 3, "activation_bits": 8, **config}
    return linger.calibrate(model, [x], linger.QuantConfig(**settings))


@torch.no_grad()
def error(model: nn.Module, x: Tensor, wanted: Tensor) -> float:
    return float((model(x) - wanted).square().mean() / wanted.square().mean())


def codes_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        model(x)
    sites = instrumentation_of(model).sites
    return {s.key: s.prepared["weights"].codes.clone() for s in sites if "weights" in s.prepared}


def steps_of(model: nn.Module) -> dict[str, list[float]]:
    sites = instrumentation_of(model).sites
    return {s.key: s.prepared["weights"].steps for s in sites if "weights" in s.prepared}


GRIDS: dict[str, dict[str, Any]] = {
    "power of two": {"platform": "venusa"},
    "per channel": {"platform": "venusa", "granularity": "channel"},
    "onnxruntime": {"platform": "onnxruntime"},
    "groups": {"platform": "venusa", "granularity": "input_channel"},
    "zero points": {"platform": "tflite"},
    "searched range": {"platform": "venusa", "weight_range": "mse"},
    "half even": {"platform": "venusa", "rounding": "half_even"},
    "downwards": {"platform": "venusa", "rounding": "floor"},
    "learned range": {"platform": "onnxruntime", "weight_range": "lsq"},
    "float results": {"platform": "arcs", "output_bits": None},
}


@pytest.mark.parametrize("config", GRIDS.values(), ids=GRIDS)
def test_the_learned_codes_are_floors_and_ceilings_and_better(config: dict[str, Any]) -> None:
    x = smooth(40, 2, 7, 7)
    model = ready(x, **config)
    plain = copy.deepcopy(model)
    instrumentation_of(plain).switches.quantize = False
    with torch.no_grad():
        wanted = plain(x)
    before, nearest = error(model, x, wanted), codes_of(model, x)
    steps = steps_of(model)
    weights = copy.deepcopy(float_state(model))
    rows = linger.adaround(model, [x[:16], x[16:]], QUICK)
    assert [row.site for row in rows] == list(LAYERS)
    assert sum(row.error_after for row in rows) < sum(row.error_before for row in rows)
    if config.get("weight_range") != "lsq":  # least squares leave too little for the whole to gain
        assert error(model, x, wanted) < before
    learned = codes_of(model, x)
    assert steps_of(model) == steps, "steps stay"
    for row in rows:
        changed = learned[row.site] != nearest[row.site]
        assert row.changed == int(changed.sum())
        # The integers of groups are at the finest of their steps.
        apart = (learned[row.site] - nearest[row.site]).abs()
        assert (apart <= 1).all() or config.get("granularity") == "input_channel"
        assert row.error_after <= row.error_before
        assert (row.changed == 0) == bool(row.why_not)
        assert row.weights == changed.numel()
    assert sum(row.changed for row in rows) > 4
    moved = {k for k, v in float_state(model).items() if not torch.equal(v, weights[k])}
    assert moved <= {f"{key.partition('/')[0]}.weight" for key in LAYERS}
    if config["platform"] not in ("onnxruntime", "tflite"):
        assert_integer_exact(model, x)


def test_weights_move_by_less_than_a_step_and_only_those_that_change() -> None:
    x = smooth(32, 2, 8, 8)
    model = ready(x)
    nearest, before = codes_of(model, x), copy.deepcopy(float_state(model))
    linger.adaround(model, [x], QUICK)
    learned, steps = codes_of(model, x), steps_of(model)
    for key in LAYERS[1:]:  # without a batch norm
        name = key.partition("/")[0] + ".weight"
        shift = (float_state(model)[name] - before[name]).abs()
        changed = learned[key] != nearest[key]
        assert (shift[changed] > 0).all()
        assert (shift < steps[key][0]).all()
        assert not shift[~changed].any()


@pytest.mark.parametrize(("platform", "dialect"), [("venusa", "linger"), ("onnxruntime", "qdq")])
def test_exports_have_the_learned_codes(platform: str, dialect: str, tmp_path: Path) -> None:
    x = smooth(8, 2, 8, 8)
    model = ready(x, platform=platform)
    rows = linger.adaround(model, [x], QUICK)
    assert sum(row.changed for row in rows) > 0
    path = linger.export_onnx(model, (x,), tmp_path / "model.onnx", dialect)
    learned = {key: codes.int() for key, codes in codes_of(model, x).items()}
    stored = [numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer]
    # An engine may want the kernels of transposed convolutions in another layout.
    del learned[LAYERS[2]]
    for key, codes in learned.items():
        flat = codes.flatten().sort().values
        assert any(
            array.size == flat.numel() and np.array_equal(np.sort(array.astype(int).ravel()), flat)
            for array in stored
            if array.dtype == np.int8
        ), key
    verdict = linger.verify(model, path, {"x": x.numpy()}, (x,))
    assert verdict.equal


def test_a_checkpoint_has_the_learned_codes() -> None:
    x = smooth(16, 2, 8, 8)
    model = ready(x)
    linger.adaround(model, [x], QUICK)
    twin = restore(net(), model.state_dict())
    twin.load_state_dict(model.state_dict())
    twin.eval()
    assert all(torch.equal(v, codes_of(twin, x)[k]) for k, v in codes_of(model, x).items())
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
    assert instrumentation_of(twin).applied == ["adaround"]
    with pytest.raises(linger.ConfigError, match=r"`adaround` has changed"):
        linger.correct_bias(twin, [x])


def test_the_same_data_and_seed_give_the_same_bits() -> None:
    x = smooth(40, 2, 7, 7)
    model = ready(x, net())
    twins = [copy.deepcopy(model) for _ in range(3)]
    random = torch.random.get_rng_state()
    for twin, seed in zip(twins, (0, 0, 1), strict=True):
        linger.adaround(twin, [x], AdaRoundConfig(steps=30, learning_rate=0.1, seed=seed))
    assert torch.equal(torch.random.get_rng_state(), random)
    first, second, third = (float_state(twin) for twin in twins)
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert not all(torch.equal(v, third[k]) for k, v in first.items())


def test_where_learning_does_not_help_nearest_stays() -> None:
    """With a rate that lets no weight cross the middle, codes and steps are as before."""
    x = smooth(16, 2, 8, 8)
    model = ready(x)
    before = copy.deepcopy(model.state_dict())
    rows = linger.adaround(model, [x], AdaRoundConfig(steps=1, learning_rate=1e-9))
    assert all(row.why_not == "rounding to nearest is the best that was found" for row in rows)
    assert all(row.changed == 0 and row.error_after == row.error_before for row in rows)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert {k for k in before if not torch.equal(before[k], after[k])} == {"_linger._extra_state"}
    assert not any(site.frozen for site in instrumentation_of(model).sites)


def test_a_strong_regularization_leaves_every_weight_on_its_side() -> None:
    """It drives a weight to the code it is nearer to, before the outputs can move it across."""
    x = smooth(16, 2, 8, 8)
    strong = dataclasses.replace(QUICK, regularization=1e6, warm_start=0.0, sharpness=(2.0, 2.0))
    assert not any(row.changed for row in linger.adaround(ready(x), [x], strong))
    assert any(row.changed for row in linger.adaround(ready(x), [x], QUICK))


def test_the_relu_behind_a_layer_counts() -> None:
    """Errors that a ReLU cuts off cost nothing: all results of one channel are negative."""
    model = Chain(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    with torch.no_grad():
        model.net[0].bias.fill_(-50.0)
    x = torch.rand(64, 8)
    linger.prepare(model.eval(), (x,))
    linger.calibrate(model, [x], linger.QuantConfig(weight_bits=3))
    rows = linger.adaround(model, [x], QUICK)
    assert rows[0].error_before == 0.0
    assert rows[0].changed == 0
    bare = Chain(nn.Linear(8, 4), nn.Linear(4, 4))
    bare.net[0].load_state_dict(model.net[0].state_dict())
    linger.prepare(bare.eval(), (x,))
    linger.calibrate(bare, [x], linger.QuantConfig(weight_bits=3))
    assert linger.adaround(bare, [x], QUICK)[0].error_before > 0


def test_targets_are_those_of_the_float_model_with_its_own_weights() -> None:
    """What earlier layers have changed must not leak into what later ones are to give."""
    x = smooth(40, 2, 7, 7)
    model = ready(x, weight_bits=2, output_bits=None)
    instrumentation_of(model).switches.quantize = False
    with torch.no_grad():
        wanted = model(x)
    instrumentation_of(model).switches.quantize = True
    rows = linger.adaround(model, [x], QUICK)
    assert any(row.changed > 0 for row in rows[:-1])
    assert error(model, x, wanted) == pytest.approx(rows[-1].error_after, rel=1e-3)


def test_limits_are_kept() -> None:
    x = smooth(16, 2, 8, 8)
    model = net()
    for _ in range(10):
        model.train()(x)
    linger.prepare(model.eval(), (x,))
    linger.fuse_bn(model)
    linger.normalize(model, weight=0.2, output=None, overrides={"net.9": {"weight": "3*mean"}})
    linger.calibrate(model, [x], linger.QuantConfig(weight_bits=4))
    nearest, before = codes_of(model, x), copy.deepcopy(float_state(model))
    rows = linger.adaround(model, [x], QUICK)
    assert rows[-1].why_not == "its range limit follows the weights"
    assert sum(row.changed for row in rows) > 0
    # Up would be beyond the limit for those that it cuts: they have to stay.
    for key in LAYERS[1:3]:
        name = key.partition("/")[0] + ".weight"
        moved = float_state(model)[name] != before[name]
        assert (before[name].abs() > 0.2).any()
        assert torch.equal(moved, codes_of(model, x)[key] != nearest[key])
    assert_integer_exact(model, x)


def test_training_goes_on_with_the_steps_that_were_learned_for() -> None:
    x = smooth(16, 2, 8, 8)
    model = ready(x)
    linger.adaround(model, [x], QUICK)
    codes, steps = codes_of(model, x), steps_of(model)
    model.train()
    model(x).square().mean().backward()
    assert model.net[3].weight.grad.abs().sum() > 0
    model.eval()
    assert steps_of(model) == {} or steps_of(model) == steps
    assert all(torch.equal(codes_of(model, x)[k], v) for k, v in codes.items() if "net.0" not in k)


@pytest.mark.parametrize("algorithm", ["adaround", "correct_bias", "reestimate_bn"])
def test_raw_images_are_as_good_as_normalized_ones(algorithm: str) -> None:
    raw = (smooth(24, 3, 7, 7) * 255).to(torch.uint8)
    firstconv = linger.FirstConv([0.4, 0.5, 0.6], [0.2, 0.3, 0.2])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (firstconv.mean, firstconv.std))
    x = (raw.float() / 255 - mean) / std
    model = ready(x, net(channels=3))
    twin = copy.deepcopy(model)
    linger.take_raw_images(model, firstconv)
    arguments = [QUICK] if algorithm == "adaround" else []
    getattr(linger, algorithm)(model, [raw], *arguments)
    getattr(linger, algorithm)(twin, [x], *arguments)
    found = float_state(twin)
    assert all(torch.allclose(v, found[k], atol=1e-5) for k, v in float_state(model).items())
    assert_integer_exact(model, raw)


def test_what_is_left_alone_says_why() -> None:
    x = torch.rand(4, 5)

    def shared(self: Any, x: Tensor) -> Tensor:
        return self.a(torch.relu(self.a(x)))

    model = linger.prepare(Lambda(shared, a=nn.Linear(5, 5)).eval(), (x,))
    linger.calibrate(model, [x])
    assert all("read by 2 calls" in row.why_not for row in linger.adaround(model, [x], QUICK))
    model = linger.prepare(Chain(nn.Linear(5, 5), nn.Linear(5, 5)).eval(), (x,))
    linger.quantize(model, overrides={"net.0": None})
    linger.calibrate(model, [x])
    rows = linger.adaround(model, [x], QUICK)
    assert "stays float: override" in rows[0].why_not
    assert "net.1/linear/0" in str(rows)


def test_sequences_and_batches_of_different_sizes() -> None:
    batches = [torch.rand(3, length, 6) for length in (4, 9, 2)]
    model = linger.prepare(Chain(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), (batches[0],))
    linger.calibrate(model, batches, linger.QuantConfig(weight_bits=3))
    rows = linger.adaround(model, batches, AdaRoundConfig(steps=60, batch_size=2))
    assert sum(row.changed for row in rows) > 0
    assert_integer_exact(model, batches[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, r"steps.*positive integer.*0"),
        ({"batch_size": 1.5}, r"batch_size.*positive integer.*1\.5"),
        ({"learning_rate": 0.0}, r"learning_rate.*positive"),
        ({"regularization": -1.0}, r"regularization.*positive"),
        ({"warm_start": 1.0}, r"warm_start.*below 1"),
        ({"sharpness": (20.0,)}, r"sharpness.*two positive"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(linger.ConfigError, match=message):
        AdaRoundConfig(**fields)


def test_the_regularization_is_annealed() -> None:
    config = AdaRoundConfig(steps=100, warm_start=0.2, sharpness=(20.0, 2.0))
    exponents = [config.exponent(step) for step in range(100)]
    assert exponents[:20] == [None] * 20
    assert exponents[20] == pytest.approx(20.0)
    assert exponents[99] == pytest.approx(2.0, abs=0.1)
    assert all(a > b for a, b in itertools.pairwise(exponents[20:]))


def test_an_unquantized_model() -> None:
    x = torch.rand(4, 5)
    with pytest.raises(linger.NotReadyError, match="not quantized yet"):
        linger.adaround(linger.prepare(Chain(nn.Linear(5, 5)), (x,)), [x])
    assert site_of(linger.prepare(Chain(nn.Linear(5, 5)), (x,)), "net.0/linear/0").frozen == set()
