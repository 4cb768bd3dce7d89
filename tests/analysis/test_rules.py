"""Every rule of every platform, just inside and just outside its limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightning_linger as linger
from lightning_linger.analysis import Findings
from lightning_linger.analysis.families import READERS
from lightning_linger.analysis.measures import MEASURES
from lightning_linger.analysis.memory import MODEL_MEASURES
from lightning_linger.core.registry import op_of
from lightning_linger.platforms import PLATFORMS
from lightning_linger.platforms.limits import LIMITS, limits_of
from tests.analysis.edges import EDGES, Edge, Make
from tests.analysis.limits_page import PAGE, page
from tests.models import Lambda

# What a model cannot keep or break: it stands for the platform as a whole.
OF_THE_PLATFORM = {("mars", "not_packed")}
# What an engine of these does with an op is known op by op.
MEASURED = [name for name, limits in LIMITS.items() if "unverified_op" in limits.by_name]


def found(make: Make, platform: str, fields: dict[str, Any] | None) -> Findings:
    model, inputs = make()
    if fields is None:
        return linger.check(model, platform, inputs)
    linger.prepare(model, inputs)
    linger.quantize(model, linger.QuantConfig(**{"platform": platform, **fields}))
    return linger.check(model, platform)


@pytest.mark.parametrize("edge", EDGES, ids=lambda edge: f"{edge.rule}-{EDGES.index(edge)}")
def test_edge(edge: Edge) -> None:
    for platform in edge.platforms:
        rule = LIMITS[platform].by_name[edge.rule]
        inside = found(edge.inside, platform, edge.inside_fields)
        assert edge.rule not in {finding.rule for finding in inside}, f"{platform}: {inside}"
        outside = found(edge.outside, platform, edge.outside_fields)
        mine = [finding for finding in outside if finding.rule == edge.rule]
        assert mine, f"{platform}: {outside}"
        for finding in mine:
            assert finding.severity == rule.severity
            assert finding.allowed == rule.text
            assert finding.found
            assert finding.remedy
            assert finding.found in str(outside)


@pytest.mark.parametrize("platform", LIMITS)
def test_every_rule_has_an_edge(platform: str) -> None:
    tried = {edge.rule for edge in EDGES if platform in edge.platforms}
    whole = {rule for name, rule in OF_THE_PLATFORM if name == platform}
    assert tried | whole == set(LIMITS[platform].by_name) - {"unverified_op"}


@pytest.mark.parametrize("platform", MEASURED)
def test_an_op_that_nobody_reads_is_unverified(
    platform: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Lambda(lambda m, x: m.conv(x).amax((2, 3)), conv=nn.Conv2d(2, 2, 3))
    inputs = (torch.randn(1, 2, 6, 6),)
    assert linger.check(model, platform, inputs).deployable
    monkeypatch.delitem(READERS, "amax")
    (finding,) = (item for item in linger.check(model, platform, inputs) if item.site == "/amax/0")
    assert (finding.rule, finding.severity, finding.found) == ("unverified_op", "warning", "amax")


def test_every_platform_has_limits() -> None:
    assert set(LIMITS) == set(PLATFORMS)


def test_nothing_is_known_about_another_platform() -> None:
    assert limits_of("somewhere").rules == ()


@pytest.mark.parametrize("platform", LIMITS)
def test_rules_are_complete(platform: str) -> None:
    for rule in LIMITS[platform].rules:
        assert rule.severity in ("error", "warning", "note")
        assert rule.evidence in ("engine", "packer", "sources", "export")
        assert "{" not in rule.text
        assert rule.text[0].islower() or rule.text[0].isdigit()
        assert not rule.text.endswith(".")
        assert rule.remedy
        if "model" in rule.layers:
            assert rule.measure in MODEL_MEASURES
        elif "setting" not in rule.layers:
            assert rule.measure in MEASURES


@pytest.mark.parametrize("platform", MEASURED)
def test_an_op_is_read_or_refused(platform: str) -> None:
    """What neither has a reader nor is refused stays float in any case."""
    unsupported = PLATFORMS[platform].unsupported
    assert all(op_of(kind) is not None for kind in READERS)
    for kind in ("conv2d", "linear", "add", "mul", "cat", "relu", "softmax", "embedding"):
        assert kind in READERS
        assert kind not in unsupported


def test_what_runs_has_no_finding() -> None:
    """A network of what the engines have."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
            self.norm = nn.BatchNorm2d(16)
            self.depthwise = nn.Conv2d(16, 16, 3, 1, 1, groups=16)
            self.pointwise = nn.Conv2d(16, 16, 1)
            self.fc = nn.Linear(32, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.stem(x)).relu()
            y = self.pointwise(self.depthwise(x).relu())
            y = nn.functional.max_pool2d(torch.cat([x + y, y], 1), 2)
            return self.fc(nn.functional.dropout(y.mean((2, 3)), training=self.training))

    for platform in ("venusa", "arcs", "venus"):
        findings = linger.check(Net(), platform, (torch.randn(1, 3, 32, 32),))
        assert list(findings) == [], findings
        assert findings.deployable
        assert str(findings) == f"{platform}: can be deployed"


def test_the_page_of_limits_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.analysis.limits_page"
