"""Learned ranges: gradients by the papers, life in an optimizer, integers of the same bits."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig
from lightning_linger.core.grid import Grid
from lightning_linger.core.instrumentation import instrumentation_of
from lightning_linger.core.quantizer import Quantizer, Window
from lightning_linger.core.ranges import LEARNED, LearnedScale
from lightning_linger.stages.quantize import switch_quantize
from tests.models import Lambda, ResNet, assert_integer_exact, images, site_of

KINDS = tuple(LEARNED)
WEIGHT_KINDS = ("lsq", "tqt")


def quantizer(
    kind: str, grid: Grid | None = None, value: float | None = None, window: Window | None = None
) -> Quantizer:
    found = Quantizer("x", grid or Grid(4), kind, window)
    found.observe(torch.randn(100))
    if value is not None:
        with torch.no_grad():
            found.learned.value.fill_(value)
    return found


def surrogate(kind: str, x: Tensor, parameter: Tensor, q: Tensor, grid: Grid, low: int) -> Tensor:
    """The rounded value as a smooth function: rounding is a constant added to what is clamped."""
    if kind == "pact":
        clamped = torch.minimum(torch.maximum(x, -parameter if low else 0 * parameter), parameter)
        step = grid.step(parameter.detach())
        return clamped + (q * step - clamped).detach()
    step = parameter / grid.qmax if kind == "lsq" else torch.exp2(parameter - (grid.bits - 1))
    v = torch.clamp(x / step, low, grid.qmax)
    return step * (v + (q - v).detach())


@pytest.mark.parametrize("window", [Window(), Window(low=0.0)], ids=["signed", "relu"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_papers(kind: str, window: Window) -> None:
    # With a free scale LSQ and PACT use the parameter itself, TQT's is a whole power of two here.
    scale = "power_of_two" if kind == "tqt" else "free"
    # PACT's two ends are as far from zero.
    grid = Grid(4, scale, "half_even", narrow=kind == "pact")
    value = {"lsq": 2.1, "tqt": 1.0, "pact": 2.1}[kind]
    ours = quantizer(kind, grid, value, window)
    x = torch.randn(400) * 2
    step = float(ours.step())
    low = 0 if window.low == 0 else grid.qmin
    v = x / step
    # Between an end code and its rounding threshold the papers clip already: see the next test.
    x = x[((v - grid.qmax).abs() > 0.51) & ((v - low).abs() > 0.51)]
    x, mine = x.clone().requires_grad_(), x.clone().requires_grad_()
    upstream = torch.randn(len(x))
    y = ours.round(mine, ours.step(), torch.float32)
    y.backward(upstream)

    parameter = torch.tensor(value, requires_grad=True)
    q = torch.round(x.detach() / step).clamp(low, grid.qmax)
    expected = surrogate(kind, x, parameter, q, grid, low)
    assert torch.allclose(y, expected, atol=1e-6)
    expected.backward(upstream)
    assert torch.allclose(mine.grad, x.grad, rtol=1e-6, atol=0.0)
    # Ours is `qmax` steps of LSQ; gradient descent moves the step as its section 2.2 says.
    scale = grid.qmax**2 / math.sqrt(len(x) * grid.qmax) if kind == "lsq" else 1.0
    assert ours.learned.value.grad.item() == pytest.approx(parameter.grad.item() * scale, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "slopes"),
    [
        # LSQ, equation 3, and TQT, equations 6 to 8.
        ("lsq", [-8, 0.5, 0, -0.25, -0.25, 0.25, 0, -0.25, 7, 7]),
        ("tqt", [-8, 0.5, 0, -0.25, -0.25, 0.25, 0, -0.25, 7, 7]),
        # PACT, equation 3, mirrored for negative values.
        ("pact", [-1, 0, 0, 0, 0, 0, 0, 0, 1, 1]),
    ],
)  # fmt: skip
def test_gradients_value_by_value(kind: str, slopes: list[float]) -> None:
    # Clipped from where rounding leaves the codes: the end codes themselves have a gradient.
    codes = [-9, -8.5, -8, -7.75, 0.25, 6.75, 7, 7.25, 7.5, 8]
    passes = [0, 1, 1, 1, 1, 1, 1, 1, 0, 0]
    step = 0.5
    value = {"lsq": step * 7, "tqt": math.log2(step * 8), "pact": step * 8}[kind]
    ours = quantizer(kind, Grid(4), value)
    assert ours.step() == step
    factor = {"lsq": math.sqrt(7), "tqt": step * math.log(2), "pact": 1.0}[kind]
    for code, slope, gate in zip(codes, slopes, passes, strict=True):
        ours.learned.value.grad = None
        x = torch.tensor([code * step], requires_grad=True)
        ours.round(x, ours.step(), torch.float32).backward(torch.tensor([3.0]))
        assert x.grad.item() == 3.0 * gate
        assert ours.learned.value.grad.item() == pytest.approx(3.0 * slope * factor)


@pytest.mark.parametrize("grid", [Grid(2), Grid(4), Grid(2, "free"), Grid(4, symmetry="affine")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("window", "activation"),
    [(Window(low=0.0), torch.relu), (Window(0.0, 6.0), F.relu6), (Window(-1.0, 1.0), F.hardtanh)],
    ids=["relu", "relu6", "hardtanh"],
)
def test_gradients_through_a_window_are_those_of_the_activation(
    kind: str, grid: Grid, window: Window, activation: Callable[[Tensor], Tensor]
) -> None:
    if grid.affine and kind != "lsq":
        pytest.skip("has no zero point")
    merged, behind = Quantizer("x", grid, kind, window), Quantizer("x", grid, kind)
    batch = activation(torch.randn(50) * 4)
    found = []
    for one, x in ((merged, torch.randn(300) * 5), (behind, None)):
        one.observe(batch)
        x = (found[0][0] if x is None else x).detach().clone().requires_grad_()
        y = one(x if one is merged else activation(x), learn=True)
        # At an edge that is no multiple of the step both give its nearest code.
        (y * torch.linspace(-1, 1, 300)).sum().backward()
        found.append((x, y, [parameter.grad for parameter in one.parameters()]))
    (x, y, gradients), (other_x, other_y, other_gradients) = found
    assert torch.equal(y, other_y)
    assert torch.equal(x.grad, other_x.grad)
    assert (x.grad == 0).any()
    for mine, other in zip(gradients, other_gradients, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("scale", ["power_of_two", "free"])
@pytest.mark.parametrize("kind", KINDS)
@given(half=st.floats(2.0**-12, 2.0**12, width=32))
def test_learning_starts_at_a_step_of_its_range(
    kind: str, scale: str, bits: int, half: float
) -> None:
    grid = Grid(bits, scale)
    learned = LearnedScale(kind, grid)
    learned.follow(torch.tensor(half))
    if kind == "tqt" and scale == "free":
        assert float(learned.step()) == float(Grid(bits).step(torch.tensor(half)))
    else:
        assert float(learned.step()) == float(grid.step(torch.tensor(half)))


@pytest.mark.parametrize(
    ("kind", "symmetry"), [("lsq", "symmetric"), ("lsq", "affine"), ("pact", "symmetric")]
)
def test_a_half_range_that_an_optimizer_took_across_zero_goes_on_with_its_size(
    kind: str, symmetry: str
) -> None:
    ours = quantizer(kind, Grid(4, symmetry=symmetry))
    x, found = torch.randn(400) * 2, {}
    for value in (2.1, -2.1):
        ours.learned.value = torch.nn.Parameter(torch.tensor(value))
        y = ours.round(x, ours.step(), torch.float32)
        (y * x).sum().backward()
        found[value] = y, ours.learned.value.grad
    assert torch.equal(found[2.1][0], found[-2.1][0])
    assert found[2.1][0].abs().max() > 1
    assert found[2.1][1] != 0
    assert torch.equal(found[2.1][1], -found[-2.1][1])


@pytest.mark.parametrize("kind", WEIGHT_KINDS)
def test_a_parameter_per_channel_has_its_own_gradient(kind: str) -> None:
    grid = Grid(4)
    both = LearnedScale(kind, grid, 2)
    both.follow(torch.tensor([1.0, 3.0]))
    x = torch.randn(2, 30) * 2
    step = both.step()[:, None]
    q = torch.floor(x / step + 0.5).clamp(grid.qmin, grid.qmax)
    both.carry(q * step, x, step, grid.qmin, grid.qmax, both.value[:, None]).sum().backward()
    for row in range(2):
        one = LearnedScale(kind, grid)
        one.follow(torch.tensor([1.0, 3.0][row]))
        own = step[row, 0]
        one.carry(q[row] * own, x[row], own, grid.qmin, grid.qmax).sum().backward()
        assert both.value.grad[row].item() == pytest.approx(one.value.grad.item(), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_the_platform_made_coarser_is_not_asked_to_be_finer(kind: str) -> None:
    ours = quantizer(kind, Grid(4))
    own = float(ours.step())
    for x in (torch.full((9,), 1e6), torch.full((9,), -1e6)):
        ours.learned.value.grad = None

        def gradient(sign: float, step: float, x: Tensor = x) -> float:
            ours.learned.value.grad = None
            y = ours.round(x.clone().requires_grad_(), step, torch.float32)
            (sign * y * x.sign()).sum().backward()
            return ours.learned.value.grad.item()

        # Beyond the end a loss that falls with the output wants a wider range, and gets it.
        assert gradient(-1.0, 8 * own) < 0
        assert gradient(1.0, 8 * own) == 0.0
        assert gradient(1.0, own) > 0


@pytest.mark.parametrize("scale", ["power_of_two", "free"])
@pytest.mark.parametrize("kind", KINDS)
@given(a=st.floats(-20, 20, width=32), b=st.floats(-20, 20, width=32))
def test_a_larger_parameter_never_has_a_finer_step(
    kind: str, scale: str, a: float, b: float
) -> None:
    learned = LearnedScale(kind, Grid(8, scale))
    steps = []
    # Only the size of a half-range counts; what TQT learns is a logarithm.
    for value in sorted((a, b), key=None if kind == "tqt" else abs):
        with torch.no_grad():
            learned.value.fill_(value)
        steps.append(float(learned.step()))
    assert 0 < steps[0] <= steps[1] < math.inf
    if scale == "power_of_two" or kind == "tqt":
        assert all(math.frexp(step)[0] == 0.5 for step in steps)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_stays_zero_and_degenerate_batches_have_finite_gradients(kind: str) -> None:
    for batch in (torch.zeros(5), torch.full((1,), 1e-42), torch.full((7,), 3.0)):
        ours = Quantizer("x", Grid(8), kind)
        x = batch.clone().requires_grad_()
        y = ours(x, learn=True)
        y.sum().backward()
        assert torch.isfinite(y).all()
        assert torch.isfinite(ours.learned.value.grad)
        assert ours(torch.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    ours(torch.zeros(0, 3), learn=True)


@pytest.mark.parametrize("scale", ["power_of_two", "free"])
@pytest.mark.parametrize("kind", KINDS)
def test_learning_repairs_a_bad_start(kind: str, scale: str) -> None:
    x = torch.randn(2000)
    ours = quantizer(kind, Grid(4, scale))
    ours.learned.follow(torch.tensor(0.2))
    optimizer = torch.optim.Adam(ours.parameters(), lr=0.05)
    errors = []
    for _ in range(150):
        error = (ours(x) - x).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert min(errors) < 0.05 * errors[0]
    assert errors[-1] < 0.1 * errors[0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_lsq_starts_with_the_step_of_least_squares(bits: int) -> None:
    # The paper's start, 2 mean|x| / sqrt(qmax), is five times too coarse at 8 bits.
    x = torch.randn(2000)
    grid = Grid(bits, "free")
    ours = Quantizer("x", grid, "lsq")
    rounded = ours(x, learn=True).detach()
    steps = (grid.step(half) for half in torch.linspace(0.05, 1.0, 96) * x.abs().max())
    errors = [
        ((x / s).round().clamp(grid.qmin, grid.qmax) * s - x).square().mean().item() for s in steps
    ]
    assert (rounded - x).square().mean().item() < 1.03 * min(errors)


@pytest.mark.parametrize("size", [1.0, 1.2, 1.4, 1.6, 1.8])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_learned_powers_of_two_start_with_that_of_least_squares(bits: int, size: float) -> None:
    x = torch.randn(2000) * size
    steps = set()
    for kind, scale in (
        *(("tqt", scale) for scale in ("free", "power_of_two")),
        *((kind, "power_of_two") for kind in ("lsq", "ema_mse")),
    ):
        ours = Quantizer("x", Grid(bits, scale), kind)
        ours(x, learn=True)
        steps.add(float(ours.step()))
    assert len(steps) == 1


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize(("moved", "steps"), [(0.51, 2), (0.49, 1), (-0.49, 1), (-0.51, 0.5)])
def test_steps_of_lsq_are_as_far_from_the_finer_as_from_the_coarser_power_of_two(
    bits: int, moved: float, steps: float
) -> None:
    learned = LearnedScale("lsq", Grid(bits, "power_of_two"))
    learned.follow(torch.tensor(1.3))
    first = float(learned.step())
    with torch.no_grad():
        learned.value.mul_(2**moved)
    assert float(learned.step()) == first * steps


def test_what_does_not_learn_has_the_step_of_its_estimator() -> None:
    x = torch.randn(2000) * 1.25
    quantizers = [
        Quantizer("x", Grid(8, "free"), "tqt", learns=False),
        Quantizer("x", Grid(8, "free"), "ema_mse"),
        Quantizer("x", Grid(8, "free"), "tqt"),
    ]
    for one in quantizers:
        one(x, learn=True)
    still, observed, learning = (float(one.step()) for one in quantizers)
    assert still == observed != learning


# --- in a model -------------------------------------------------------------------------------


class Net(nn.Module):
    """A convolution with batch norm, a sum, a product, a table, a pool and a transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm1d(4)
        self.up = nn.ConvTranspose1d(4, 4, 2, stride=2, groups=2)
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.conv(x)))
        y = y + torch.tanh(y) * y
        return self.fc(self.up(y).mean(2))


def trained(config: QuantConfig, steps: int = 4, fold: bool = True) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    model = Net()
    x = torch.randn(6, 3, 8)
    linger.prepare(model, (x,))
    if fold:
        linger.fuse_bn(model)
    linger.quantize(model, config)
    optimizer = torch.optim.Adam(linger.parameter_groups(model), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        F.mse_loss(model(x), torch.ones(6, 2)).backward()
        optimizer.step()
    return model, x


@pytest.mark.parametrize("weight_range", ["absmax", *WEIGHT_KINDS])
@pytest.mark.parametrize("kind", KINDS)
def test_integers_of_a_trained_model_are_exact(kind: str, weight_range: str) -> None:
    for granularity in ("tensor", "channel"):
        model, x = trained(
            QuantConfig(
                range=kind, weight_range=weight_range, weight_bits=4, granularity=granularity
            )
        )
        learned = linger.learned_ranges(model)
        assert all(parameter.grad is not None for parameter in learned.values())
        weights = [name for name in learned if ".weights." in name]
        assert len(weights) == (0 if weight_range == "absmax" else 3)
        model.eval()
        assert_integer_exact(model, x)


@pytest.mark.parametrize("kind", KINDS)
def test_free_scales_learn_too(kind: str) -> None:
    model, x = trained(QuantConfig(platform="onnxruntime", range=kind, weight_range="lsq"))
    model.eval()
    rows = linger.divergence(model, x)
    assert sum(row.mismatches for row in rows) <= 0.01 * sum(row.elements for row in rows)


def test_every_learned_range_moves() -> None:
    before = {n: p.clone() for n, p in linger.learned_ranges(trained(tqt(), 1)[0]).items()}
    after = linger.learned_ranges(trained(tqt(), 6)[0])
    moved = [name for name, value in before.items() if not torch.equal(value, after[name])]
    assert len(moved) >= len(before) - 1


def tqt() -> QuantConfig:
    return QuantConfig(range="tqt", weight_range="tqt")


def test_it_is_there_from_set_up_and_untouched_while_off() -> None:
    model = Net()
    x = torch.randn(6, 3, 8)
    linger.prepare(model, (x,))
    linger.quantize(model, tqt())
    switch_quantize(model, on=False)
    learned = linger.learned_ranges(model)
    assert learned
    names = dict(model.named_parameters())
    assert all(names[name] is parameter for name, parameter in learned.items())
    before = {name: parameter.detach().clone() for name, parameter in learned.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sum().backward()
        assert all(parameter.grad is None for parameter in learned.values())
        optimizer.step()
    assert all(torch.equal(learned[name], before[name]) for name in learned)

    switch_quantize(model, on=True)
    optimizer.zero_grad()
    model(x).sum().backward()
    assert all(parameter.grad is not None for parameter in learned.values())


def test_groups_hold_every_parameter_once_and_decay_no_range() -> None:
    model, _ = trained(tqt(), 0)
    weights, learned = linger.parameter_groups(model)
    every = [*weights["params"], *learned["params"]]
    assert {id(p) for p in every} == {id(p) for p in model.parameters()}
    assert len(every) == len(list(model.parameters()))
    assert learned["weight_decay"] == 0.0
    assert set(map(id, learned["params"])) == set(map(id, linger.learned_ranges(model).values()))
    plain = nn.Linear(2, 2)
    assert [len(group["params"]) for group in linger.parameter_groups(plain)] == [2]


def test_calibration_leads_until_gradients_take_over() -> None:
    model, x = trained(tqt(), 0)
    linger.calibrate(model, [x])
    narrow = {
        n: p.detach().clone() for n, p in linger.learned_ranges(model).items() if "output" in n
    }
    linger.calibrate(model, [x * 16] * 30)
    wide = linger.learned_ranges(model)
    assert any(float(wide[name].detach() - narrow[name]) > 2 for name in narrow)
    model.eval()
    assert_integer_exact(model, x)

    model.train()
    model(x).sum().backward()
    taken = {name: p.detach().clone() for name, p in linger.learned_ranges(model).items()}
    with torch.no_grad():
        model(x * 100)
    model(x * 100)
    assert all(torch.equal(p, taken[n]) for n, p in linger.learned_ranges(model).items())


def test_a_checkpoint_continues_with_the_same_bits() -> None:
    model, x = trained(tqt())
    other, _ = trained(tqt(), 0)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert torch.equal(other(x), model(x))
    assert torch.equal(other.eval()(x), model.eval()(x))


def test_evaluation_follows_parameters_that_are_swapped() -> None:
    """Averaging callbacks put other values into a model that is in evaluation."""
    model, x = trained(QuantConfig(range="lsq", weight_range="lsq", granularity="channel"))
    model.eval()
    with torch.no_grad():
        before = model(x)
        for parameter in linger.learned_ranges(model).values():
            parameter.mul_(16.0)
        after = model(x)
    assert not torch.equal(before, after)
    assert_integer_exact(model, x)
    fresh, _ = trained(QuantConfig(range="lsq", weight_range="lsq", granularity="channel"), 0)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.eval()(x), after)


def test_the_summary_shows_what_was_learned() -> None:
    model, x = trained(QuantConfig(range="pact"))
    with torch.no_grad():
        for parameter in linger.learned_ranges(model).values():
            parameter.fill_(64.0)
    model.eval()
    model(x)
    rows = {row.site: row for row in linger.summary(model)}
    assert (rows["fc/linear/0"].scale, rows["fc/linear/0"].range) == ("2^-1", "64")


def test_half_models_keep_ranges_in_float32() -> None:
    model, _ = trained(tqt())
    before = {name: p.detach().clone() for name, p in linger.learned_ranges(model).items()}
    model.to(torch.bfloat16)
    for name, parameter in linger.learned_ranges(model).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])


def test_what_cannot_learn_stays_with_its_estimator() -> None:
    model = Lambda(lambda self, x: self.fc(self.rnn(x)[0]), rnn=nn.LSTM(4, 5), fc=nn.Linear(5, 3))
    x = torch.randn(6, 2, 4)
    linger.prepare(model, (x,))
    linger.quantize(model, tqt())
    for _ in range(2):
        model(x).sum().backward()
    assert all(p.grad is not None for p in linger.learned_ranges(model).values())
    # Of the recurrent layer, the ranges of weights alone.
    of_rnn = [name for name in linger.learned_ranges(model) if "rnn" in name]
    assert len(of_rnn) == 2
    assert all(".weights.learned_parts." in name for name in of_rnn)
    assert site_of(model, "fc/linear/0").weights.learned is not None
    model.eval()
    assert_integer_exact(model, x)


def test_attention_learns() -> None:
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    linger.prepare(layer, (x, x, x))
    linger.quantize(layer, tqt())
    layer(x, x, x)[0].square().sum().backward()
    assert all(p.grad is not None for p in linger.learned_ranges(layer).values())
    layer.eval()
    assert_integer_exact(layer, x, x, x)


@pytest.mark.slow
def test_residual_network_compiled() -> None:
    model = ResNet()
    x = images()
    linger.prepare(model, (x,))
    linger.fuse_bn(model)
    linger.quantize(model, tqt())
    model(x).sum().backward()
    model.zero_grad()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in linger.learned_ranges(model).values())
    assert all(torch.isfinite(p.grad).all() for p in linger.learned_ranges(model).values())


def test_stripping_takes_the_parameters_off() -> None:
    model, _ = trained(tqt(), 0)
    linger.strip(model)
    assert linger.learned_ranges(model) == {}
    assert not any("linger" in name for name, _ in model.named_parameters())


def test_no_learning_no_parameters() -> None:
    model, _ = trained(QuantConfig(), 0)
    assert linger.learned_ranges(model) == {}
    assert list(instrumentation_of(model).parameters()) == []


def test_pact_is_for_activations() -> None:
    with pytest.raises(ConfigError, match="`weight_range`: 'pact' is for activations"):
        QuantConfig(weight_range="pact")
