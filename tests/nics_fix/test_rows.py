"""What the functions of NICS-fix share with the library: rows 9, 15, 17, 26, 28, 30, 31, 32."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig
from lightning_linger.callbacks import FuseBNCallback, QuantizeCallback
from lightning_linger.core.fake_quantize import fake_quantize
from lightning_linger.core.grid import Grid
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.ranges import RangeRule
from lightning_linger.nics_fix import (
    FIX_AUTO,
    FIX_FIXED,
    FIX_NONE,
    fix_state_dict,
    get_fix_configs,
    load_fix_configs,
    set_fix_method,
)
from lightning_linger.nn import FakeQuantize, fake_quantize_defaults
from lightning_linger.stages.quantize import plan_quantize, switch_watch
from tests.callbacks.boring import Classifier, loader, trainer
from tests.models import Chain, assert_integer_exact, site_of


def test_row09_nearest_ties_to_even() -> None:
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 0.75])
    found = fake_quantize(x, 1.0, -128, 127, "half_even")
    assert found.tolist() == [0.0, 2.0, 2.0, -0.0, -2.0, 1.0]


# --- batch norms ----------------------------------------------------------------------------------


def normalized(fold: bool, **fields: Any) -> tuple[Chain, Tensor]:
    torch.manual_seed(0)
    model = Chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=1e-3), nn.ReLU())
    x = torch.randn(4, 3, 6, 6) * 2
    linger.prepare(model, (x,))
    if fold:
        linger.fuse_bn(model)
    linger.quantize(model, linger.preset("nics_fix", **fields))
    for _ in range(3):
        model(x)
    return model, x


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "standalone"])
def test_row26_statistics_train_in_float_and_evaluate_on_a_grid(fold: bool) -> None:
    model, x = normalized(fold, statistics_bits=4)
    plain, _ = normalized(fold)
    bn, reference = model.net[1], plain.net[1]
    # Training does not know of it.
    assert torch.equal(model(x), plain(x))
    assert torch.equal(bn.running_mean, reference.running_mean)
    model.eval()
    with torch.no_grad():
        quantized, full = model(x), plain.eval()(x)
    assert not torch.equal(quantized, full)
    # It is what a float model with rounded statistics computes.
    fixed = fix_state_dict(model)
    for name in ("running_mean", "running_var"):
        values, scale = fixed[f"net.1.{name}"], fixed[f"net.1.{name}_fp_scale"]
        codes = values / (scale / 8)
        assert torch.equal(codes, codes.round())
        assert not torch.equal(values, getattr(bn, name))
        assert scale / 2 < getattr(bn, name).abs().max() <= scale
        getattr(reference, name).copy_(values)
    with torch.no_grad():
        assert torch.equal(plain(x), quantized)
    assert_integer_exact(model, x)


def test_row26_a_small_momentum_still_moves_them_after_an_evaluation() -> None:
    model, x = normalized(fold=False, statistics_bits=3)
    model.net[1].running_mean.fill_(1.0)
    model.eval()(x)
    before = model.net[1].running_mean.clone()
    model.train()
    for _ in range(5):
        model(x)
    moved = (model.net[1].running_mean - before).abs()
    assert (moved > 0).all()
    step = fix_state_dict(model)["net.1.running_mean_fp_scale"] / 4
    assert moved.max() < step / 4, "far less than a code, which a rounded buffer would lose"


def test_row26_their_scales_are_items_and_stay_when_fixed() -> None:
    model, x = normalized(fold=True, statistics_bits=4)
    model.eval()(x)
    items = get_fix_configs(model, data_only=True)["net.0"]
    assert [*items][:4] == ["weight", "running_mean", "running_var", "bias"] or set(items) >= {
        "running_mean",
        "running_var",
    }
    assert items["running_mean"]["bitwidth"] == 4
    set_fix_method(model, FIX_FIXED)
    model.net[1].running_mean.mul_(40)
    model(x)
    after = get_fix_configs(model, data_only=True)["net.0"]
    assert after["running_mean"]["scale"] == items["running_mean"]["scale"]
    set_fix_method(model, FIX_AUTO)
    model(x)
    after = get_fix_configs(model, data_only=True)["net.0"]
    assert after["running_mean"]["scale"] > items["running_mean"]["scale"]


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "standalone"])
@pytest.mark.parametrize(("still", "moving"), [("weight", "buffer"), ("buffer", "weight")])
def test_row17_buffers_and_weights_are_fixed_apart(still: str, moving: str, fold: bool) -> None:
    model, x = normalized(fold, statistics_bits=4)
    module, bn = ("net.0" if fold else "net.1"), model.net[1]
    names = {"weight": "weight", "buffer": "running_var"}
    model.eval()(x)
    found = get_fix_configs(model, data_only=True)[module]
    before = {kind: found[name]["scale"] for kind, name in names.items()}
    set_fix_method(model, by_name={module: {still: FIX_FIXED}})
    with torch.no_grad():
        bn.running_var.mul_(64)
        bn.weight.mul_(64)
    model(x)
    found = get_fix_configs(model, data_only=True)[module]
    assert found[names[still]]["method"] == FIX_FIXED
    assert found[names[moving]]["method"] == FIX_AUTO
    assert found[names[still]]["scale"] == before[still]
    assert found[names[moving]]["scale"] > before[moving]
    assert_integer_exact(model, x)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "standalone"])
def test_row17_buffers_stay_float_while_the_rest_is_rounded(fold: bool) -> None:
    model, x = normalized(fold, statistics_bits=3)
    plain, _ = normalized(fold)
    module = "net.0" if fold else "net.1"
    with torch.no_grad():
        assert not torch.equal(model.eval()(x), plain.eval()(x))
        set_fix_method(model, by_name={module: {"buffer": FIX_NONE}})
        assert torch.equal(model(x), plain(x))
    assert_integer_exact(model, x)
    set_fix_method(model, by_name={module: {"buffer": FIX_AUTO}})
    with torch.no_grad():
        assert not torch.equal(model(x), plain(x))


@pytest.mark.parametrize("range_", ["absmax", "three_sigma", "90%", "mse", 4.0])
def test_row17_buffers_have_a_range_of_their_own(range_: str | float) -> None:
    model, x = normalized(True, statistics_bits=4, statistics_range=range_, weight_range="absmax")
    model.eval()(x)
    mean = model.net[1].running_mean
    with torch.no_grad():
        mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.1, 0.2, 7.0]))
    model(x)
    items = get_fix_configs(model, data_only=True)["net.0"]
    statistic = RangeRule.parse_weight(range_).statistic
    grid = Grid(4)
    half = 4.0 if statistic is None else float(statistic.measure(mean[None], None, grid))
    assert items["running_mean"]["scale"] == 8 * grid.step_value(half)
    assert items["weight"]["range_method"] == 0
    named = {"absmax": 0, "three_sigma": 1}
    assert items["running_mean"]["range_method"] == named.get(str(range_), str(range_))


def test_row17_fixed_buffers_go_through_configs_and_checkpoints() -> None:
    model, x = normalized(True, statistics_bits=4)
    model.eval()(x)
    set_fix_method(model, by_name={"net.0": {"buffer": FIX_FIXED}})
    with torch.no_grad():
        model.net[1].running_mean.mul_(32)
        expected = model(x)
    configs, state = get_fix_configs(model, data_only=True), model.state_dict()
    by_checkpoint, _ = normalized(True, statistics_bits=4)
    by_checkpoint.load_state_dict(state)
    by_configs, _ = normalized(True, statistics_bits=4)
    by_configs.load_state_dict(
        {name: v for name, v in state.items() if "linger" not in name}, False
    )
    load_fix_configs(by_configs, configs)
    with torch.no_grad():
        for other in (by_checkpoint, by_configs):
            assert torch.equal(other.eval()(x), expected)
            assert get_fix_configs(other, data_only=True) == configs


@pytest.mark.parametrize("range_", ["lsq", "ema_absmax", "widest", 0.0])
def test_a_wrong_range_of_statistics_names_the_argument(range_: str | float) -> None:
    with pytest.raises(ConfigError, match="`statistics_range`"):
        QuantConfig(statistics_range=range_)


def test_row26_a_variance_is_never_zero() -> None:
    model, x = normalized(fold=False, statistics_bits=2)
    model.net[1].running_var[0] = 1e-4
    with torch.no_grad():
        y = model.eval()(x)
    assert torch.isfinite(y).all()
    assert (fix_state_dict(model)["net.1.running_var"] > 0).all()


@pytest.mark.parametrize("bits", [1, 17, "8"])
def test_row26_wrong_widths(bits: Any) -> None:
    with pytest.raises(ConfigError, match="`statistics_bits`"):
        QuantConfig(statistics_bits=bits)


# --- layers of users ------------------------------------------------------------------------------


def test_row28_any_layer_made_of_torch_functions_and_subclasses_once() -> None:
    class Scaled(nn.Linear):
        """A layer of a user's, which is a linear layer and more."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(super().forward(x))

    class Twice(Scaled):
        pass

    model = Chain(Twice(4, 4), nn.Linear(4, 3))
    x = torch.randn(5, 4)
    linger.prepare(model, (x,))
    linger.quantize(model, linger.preset("nics_fix"))
    model(x)
    assert type(model.net[0]) is Twice
    assert isinstance(model.net[0], nn.Linear)
    owners = [site.key for site in instrumentation_of(model).sites]
    assert owners == ["net.0/linear/0", "net.0/tanh/0", "net.1/linear/0"]
    set_fix_method(model, by_type={"Scaled": {"weight": FIX_FIXED}})
    assert get_fix_configs(model)["net.0/linear/0"]["weight"]["method"] == FIX_FIXED
    assert_integer_exact(model.eval(), x)


def test_row30_defaults_for_many_layers() -> None:
    with fake_quantize_defaults(output_bits=4, range="last_absmax"):
        first, second = FakeQuantize(), FakeQuantize(output_bits=6)
        with fake_quantize_defaults(range="absmax"):
            inner = FakeQuantize()
        whole = FakeQuantize(QuantConfig(output_bits=5))
    after = FakeQuantize()
    assert first.fields == {"output_bits": 4, "range": "last_absmax"}
    assert second.fields == {"output_bits": 6, "range": "last_absmax"}
    assert inner.fields == {"output_bits": 4, "range": "absmax"}
    assert whole.fields == after.fields == {}
    model = Chain(first, second, after)
    x = torch.randn(6, 4)
    linger.prepare(model, (x,))
    linger.quantize(model)
    bits = [site.output.grid.bits for site in instrumentation_of(model).sites if site.output]
    assert bits == [4, 6, 8]


def test_row30_ends_at_an_error_and_checks_its_fields() -> None:
    with (
        pytest.raises(ConfigError, match="no field 'outputbits'"),
        fake_quantize_defaults(outputbits=4),
    ):
        pass
    with pytest.raises(ConfigError, match="`output_bits`"), fake_quantize_defaults(range="absmax"):
        FakeQuantize(output_bits=1)
    assert FakeQuantize().fields == {}


# --- runs -----------------------------------------------------------------------------------------


class Steps(pl.Callback):
    """What is on at the end of each epoch, and the scales of each training step and validation."""

    def __init__(self) -> None:
        self.methods: list[set[int]] = []
        self.scales: list[Any] = []
        self.validations: list[tuple[Any, Any]] = []
        self._before: Any = None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        state = instrumentation_of(pl_module).state_dict()
        ranges = {name: x.tolist() for name, x in state.items() if name.endswith(".range")}
        self.scales.append((get_fix_configs(pl_module, data_only=True), ranges))

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        configs = get_fix_configs(pl_module)
        self.methods.append({c["method"] for items in configs.values() for c in items.values()})

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        self._before = copy.deepcopy(instrumentation_of(pl_module).state_dict())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        after = copy.deepcopy(instrumentation_of(pl_module).state_dict())
        self.validations.append((self._before, after))


def test_row31_row32_float_auto_fixed_by_callbacks(tmp_path: Path) -> None:
    steps = Steps()
    pl.seed_everything(0)
    run = trainer(
        tmp_path,
        callbacks=[
            FuseBNCallback(),
            QuantizeCallback(at_epoch=1, freeze_at_epoch=2, preset="nics_fix"),
            steps,
        ],
    )
    module = Classifier()
    run.fit(module, loader(), loader(2, shuffle=False))
    assert steps.methods == [{FIX_NONE}, {FIX_AUTO}, {FIX_FIXED}]
    auto, fixed = steps.scales[3:6], steps.scales[6:]
    assert auto[0] != auto[1]
    assert fixed[0] == fixed[1] == fixed[2]
    # Sanity check and every epoch: validation moves nothing.
    assert len(steps.validations) >= 3
    for before, after in steps.validations:
        changed = [name for name in before if not torch.equal(before[name], after[name])]
        assert changed == []
    module.eval()
    assert_integer_exact(module, next(iter(loader()))[0])


@pytest.mark.parametrize(
    "schedule",
    [
        {"at_epoch": 2, "observe_at_epoch": 1},
        {"at_step": 6, "observe_at_step": 3},
    ],
    ids=["epochs", "steps"],
)
@pytest.mark.parametrize("fold", [True, False])
def test_row78_ranges_are_observed_before_rounding_starts(
    schedule: dict[str, int], fold: bool, tmp_path: Path
) -> None:
    seen: list[tuple[bool, int, int]] = []

    class Watcher(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            switches = instrumentation_of(pl_module).switches
            site = site_of(pl_module, "conv/conv2d/0")
            batches = int(site.output.estimator.batches)
            stem = site_of(pl_module, "stem/conv2d/0")
            seen.append((switches.quantize, batches, int(stem.output.estimator.batches)))

    def run(watch: bool) -> Classifier:
        pl.seed_everything(0)
        module = Classifier()
        arguments = schedule if watch else {k: v for k, v in schedule.items() if "observe" not in k}
        callbacks: list[pl.Callback] = [QuantizeCallback(**arguments), Watcher()]
        callbacks += [FuseBNCallback()] if fold else []
        trainer(tmp_path, callbacks).fit(module, loader())
        return module

    watched = run(watch=True)
    expected = [(False, 0)] * 3 + [(False, n) for n in (1, 2, 3)] + [(True, n) for n in (4, 5, 6)]
    assert [(on, conv) for on, conv, _ in seen] == expected
    assert [stem for _, _, stem in seen] == [0, 0, 0, 1, 2, 3, 4, 5, 6]
    plain = run(watch=False)
    # Watching changes nothing of the float training, and quantization starts with another range.
    assert all(torch.equal(a, b) for a, b in zip(watched.losses[:6], plain.losses[:6], strict=True))
    assert not torch.equal(watched.losses[-1], plain.losses[-1])


def test_row78_what_is_observed_is_what_quantization_rounds() -> None:
    model = Chain(nn.Linear(4, 6), nn.ReLU(), nn.LayerNorm(6), nn.Linear(6, 3), nn.Sigmoid())
    x = torch.randn(16, 4)
    linger.prepare(model, (x,))
    plan_quantize(model, QuantConfig(range="last_absmax"))
    switch_watch(model, on=True)
    float_model = linger.strip(copy.deepcopy(model))
    assert torch.equal(model(x), float_model(x))
    hidden = float_model.net[:2](x)
    assert site_of(model, "net.0/linear/0").inputs["0"].estimator.absmax() == x.abs().max()
    assert site_of(model, "net.0/linear/0").output.estimator.absmax() == hidden.max()
    model.eval()
    with torch.no_grad():
        model(x * 9)
    assert site_of(model, "net.0/linear/0").inputs["0"].estimator.absmax() == x.abs().max()


def test_row78_a_checkpoint_goes_on_observing() -> None:
    def build() -> Chain:
        model = Chain(nn.Linear(4, 3))
        linger.prepare(model, (torch.randn(5, 4),))
        return plan_quantize(model, QuantConfig())

    model, other = build(), build()
    switch_watch(model, on=True)
    other.load_state_dict(model.state_dict())
    other(torch.randn(5, 4))
    assert site_of(other, "net.0/linear/0").output.known
    assert not instrumentation_of(other).switches.quantize


def test_row78_learned_ranges_do_not_start_before() -> None:
    model = Chain(nn.Linear(4, 6), nn.Linear(6, 3))
    x = torch.randn(16, 4)
    linger.prepare(model, (x,))
    plan_quantize(model, QuantConfig(range="lsq"))
    switch_watch(model, on=True)
    model(x).sum().backward()
    learned = site_of(model, "net.0/linear/0").output.learned
    assert not learned.started
    assert learned.value != 1.0
    assert learned.value.grad is None


@pytest.mark.parametrize(
    "arguments", [{"at_epoch": 1, "observe_at_epoch": 1}, {"at_step": 4, "observe_at_step": 5}]
)
def test_row78_a_delay_has_to_come_first(arguments: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"`observe_at_\w+` \(\d\) must come before `at_\w+`"):
        QuantizeCallback(**arguments)
