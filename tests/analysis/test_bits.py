"""Widths under a budget: the best there are, and overrides that quantize so."""

import itertools
import logging
import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger import ConfigError, QuantConfig
from lightning_linger.analysis.knapsack import Option, least_loss
from lightning_linger.analysis.sensitivity import SensitivityRow
from lightning_linger.core.instrumentation import instrumentation_of

options = st.lists(
    st.builds(Option, st.integers(0, 12), st.integers(-3, 20)), min_size=1, max_size=4
)


@settings(max_examples=150, deadline=None)
@given(st.lists(options, min_size=1, max_size=6), st.integers(0, 40))
def test_no_choice_is_better(classes: list[list[Option]], budget: int) -> None:
    choices = [
        [options[i] for options, i in zip(classes, indices, strict=True)]
        for indices in itertools.product(*(range(len(options)) for options in classes))
    ]
    allowed = [c for c in choices if sum(option.cost for option in c) <= budget]
    found = least_loss(classes, budget)
    if not allowed:
        assert found is None
        return
    assert found is not None
    mine = [options[i] for options, i in zip(classes, found, strict=True)]
    assert sum(option.cost for option in mine) <= budget
    best = min(sum(option.loss for option in choice) for choice in allowed)
    assert sum(option.loss for option in mine) == best


def test_no_choice_is_better_where_greedy_choices_are_wrong() -> None:
    """Cheap options with little loss are rare here, so that bounds and dominance decide."""
    for seed in range(60):
        draw = random.Random(seed)
        classes = [
            [Option(draw.randint(0, 20), draw.randint(-20, 20)) for _ in range(4)] for _ in range(5)
        ]
        budget = draw.randint(10, 60)
        losses = [
            sum(option.loss for option in choice)
            for choice in itertools.product(*classes)
            if sum(option.cost for option in choice) <= budget
        ]
        found = least_loss(classes, budget)
        mine = None
        if found is not None:
            mine = sum(options[i].loss for options, i in zip(classes, found, strict=True))
        assert mine == min(losses, default=None), seed


def test_many_classes_are_solved_by_bounds() -> None:
    rng = random.Random(0)
    classes = [
        [
            Option(rng.randint(1000, 3_000_000) * bits, int(2**60 * rng.random() * 4.0**-bits))
            for bits in (2, 4, 6, 8)
        ]
        for _ in range(120)
    ]
    budget = sum(options[1].cost for options in classes)
    found = least_loss(classes, budget)
    assert found is not None
    assert sum(options[i].cost for options, i in zip(classes, found, strict=True)) <= budget


class Net(nn.Module):
    """A folded layer, one that is called twice, and a product of activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn(self.stem(x))).transpose(1, 2)
        y = self.mix(self.mix(y))
        return self.head(y @ y.transpose(1, 2) @ y)


WEIGHTS = {"stem": 8 * 3 * 3, "mix": 8 * 8, "head": 8 * 5}
LENGTH = 6
MACS = {
    "stem": 8 * 3 * 3 * LENGTH,
    "mix": 2 * 8 * 8 * LENGTH,
    "head": 8 * 5 * LENGTH,
    "/matmul/0": LENGTH * LENGTH * 8,
    "/matmul/1": LENGTH * LENGTH * 8,
}


def prepared() -> nn.Module:
    model = Net()
    linger.prepare(model, (torch.randn(1, 3, LENGTH),))
    return linger.fuse_bn(model)


def rows(part: str = "weights", sites: Any = tuple(WEIGHTS)) -> list[SensitivityRow]:
    rng = random.Random(1)
    return [
        SensitivityRow(site, bits, rng.random() * 4.0**-bits, part)
        for site in sites
        for bits in (2, 3, 4, 8)
    ]


def brute_force(measured: list[SensitivityRow], cost: Any, budget: float) -> float:
    by_site: dict[str, list[SensitivityRow]] = {}
    for row in measured:
        by_site.setdefault(row.site, []).append(row)
    return min(
        sum(row.drop for row in choice)
        for choice in itertools.product(*by_site.values())
        if sum(cost(row) for row in choice) <= budget
    )


@pytest.mark.parametrize("budget", [44, 60, 88, 100, 150, 1000])
def test_weight_bytes(budget: int) -> None:
    model, measured = prepared(), rows()
    overrides = linger.choose_bits(model, measured, budget)
    drops = {(row.site, row.bits): row.drop for row in measured}
    chosen = {site: fields["weight_bits"] for site, fields in overrides.items()}
    assert list(chosen) == list(WEIGHTS)
    assert sum(WEIGHTS[site] * bits for site, bits in chosen.items()) <= 8 * budget
    best = brute_force(measured, lambda row: WEIGHTS[row.site] * row.bits / 8, budget)
    assert sum(drops[item] for item in chosen.items()) == pytest.approx(best, rel=1e-12)


def other_bits(row: SensitivityRow) -> int:
    return row.bits if "/" in row.site else 8


@pytest.mark.parametrize(
    ("part", "cost"),
    [
        ("weights", lambda row: MACS[row.site] * row.bits * 8),
        ("activations", lambda row: MACS[row.site] * row.bits * other_bits(row)),
        ("both", lambda row: MACS[row.site] * row.bits**2),
    ],
)
def test_mac_bits(part: str, cost: Any) -> None:
    sites = [site for site in MACS if part != "weights" or site in WEIGHTS]
    measured = rows(part, sites)
    fixed = sum(64 * macs for site, macs in MACS.items() if site not in sites)
    least = sum(cost(row) for row in measured if row.bits == 2)
    for budget in (1.0, 1.7, 3.0):
        overrides = linger.choose_bits(
            prepared(), measured, fixed + least * budget, "mac_bits", platform="onnxruntime"
        )
        name = "weight_bits" if part == "weights" else "activation_bits"
        chosen = [
            next(r for r in measured if (r.site, r.bits) == (site, fields[name]))
            for site, fields in overrides.items()
        ]
        assert sum(map(cost, chosen)) <= least * budget
        best = brute_force(measured, cost, least * budget)
        assert sum(row.drop for row in chosen) == pytest.approx(best, rel=1e-12)


def test_the_overrides_quantize_so() -> None:
    model = prepared()
    measured = linger.sensitivity(model, [torch.randn(4, 3, LENGTH)], bits=(2, 4, 8), part="both")
    budget = sum(WEIGHTS.values()) / 2
    overrides = linger.choose_bits(model, measured, budget, platform="onnxruntime")
    linger.quantize(model, QuantConfig(platform="onnxruntime"), overrides=overrides)
    widths = {row.site: row.bits for row in linger.summary(model) if row.bits}
    for site, fields in overrides.items():
        keys = [key for key in widths if site in (key, key.partition("/")[0].split("@")[0])]
        assert keys, site
        for key in keys:
            weight = fields.get("weight_bits", "-")
            assert widths[key].startswith(f"{weight}/{fields['activation_bits']}/")


def test_a_plan_that_differs_for_a_layer_is_kept_and_so_is_the_model() -> None:
    model = prepared()
    plan = {"head": {"output_bits": None, "range": "mse"}, "stem": None}
    linger.quantize(model, QuantConfig(), overrides=plan)
    before = instrumentation_of(model).get_extra_state()
    measured = rows("both", ["mix", "head"])
    overrides = linger.choose_bits(model, measured, 1000, platform="onnxruntime")
    assert overrides["head"].pop("weight_bits") == 8
    assert overrides["head"] == {"output_bits": None, "range": "mse", "activation_bits": 8}
    assert torch.equal(instrumentation_of(model).get_extra_state(), before)


def test_other_layers_count_with_what_they_have() -> None:
    measured = rows(sites=["stem", "head"])
    fixed = WEIGHTS["mix"] * 8
    least = -(-(fixed + 2 * (WEIGHTS["stem"] + WEIGHTS["head"])) // 8)
    with pytest.raises(ConfigError, match=f"the smallest possible is {least},"):
        linger.choose_bits(prepared(), measured, least - 1)
    chosen = linger.choose_bits(prepared(), measured, least)
    assert {fields["weight_bits"] for fields in chosen.values()} == {2}


def test_widths_that_a_platform_does_not_run_are_not_chosen() -> None:
    measured = [
        SensitivityRow(site, bits, 1.0 / bits, "weights") for site in WEIGHTS for bits in (4, 16)
    ]
    chosen = linger.choose_bits(prepared(), measured, 10_000, platform="venusa")
    assert {fields["weight_bits"] for fields in chosen.values()} == {4}
    free = linger.choose_bits(prepared(), measured, 10_000, platform="onnxruntime")
    assert {fields["weight_bits"] for fields in free.values()} == {16}
    wide = [row for row in measured if row.bits == 16]
    with pytest.raises(ConfigError, match=r"'venusa' allows none of the measured widths \[16\]"):
        linger.choose_bits(prepared(), wide, 10_000, platform="venusa")
    # The engine's operands have 8 bits.
    codes = rows("activations", ["stem"])
    chosen = linger.choose_bits(prepared(), codes, 1e9, "mac_bits", platform="venusa")
    assert chosen == {"stem": {"activation_bits": 8, "output_bits": 8}}


@pytest.mark.parametrize(
    ("measured", "arguments", "message"),
    [
        ([], {}, "Found: no row"),
        (rows() + rows("both"), {}, r"Found: \['both', 'weights'\]"),
        (rows(sites=["stam"]), {}, "`stam` names no layer .* Similar: 'stem'"),
        (rows() + rows(), {}, "twice"),
        (rows(), {"cost": "bytes"}, "`cost` must be one of"),
        (rows(), {"budget": float("inf")}, "`budget` must be a positive number. Found: inf"),
        (rows(), {"budget": "9 kB"}, "`budget` must be a positive number. Found: '9 kB'"),
        (rows(), {"budget": 43}, r"`budget` of 43 bytes of weights cannot be kept: .* 44"),
    ],
)
def test_wrong_arguments(measured: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        linger.choose_bits(prepared(), measured, **{"budget": 100, **arguments})


def test_the_choice_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lightning_linger"):
        linger.choose_bits(prepared(), rows(), 44)
    assert "chose widths of 3 layers: 44 of 44 bytes of weights" in caplog.text
