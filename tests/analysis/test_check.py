"""What `check` looks at, what it leaves alone, and that it says what the packer says."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.analysis import Finding, Findings
from lightning_linger.platforms import platform_of
from lightning_linger.platforms.limits import limits_of
from tests.models import Chain, Lambda, ResNet
from tests.ops import cases as ops_cases
from tests.test_readme import ROOT, blocks, run
from tests.thinker.cases import ALL
from tests.thinker.cases.case import PLATFORMS, PackCase

SEVEN = (torch.randn(1, 2, 12, 12),)


def seven() -> nn.Module:
    """A kernel that no engine has, behind dropout and a batch norm."""
    return Chain(nn.Dropout(), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 7), nn.BatchNorm2d(2), nn.ReLU())


# --- against the packer -------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_the_packer_is_of_the_same_opinion(case: PackCase) -> None:
    """The verdicts of the cases were measured: `tests/thinker` packs each of them."""
    for platform in PLATFORMS:
        model, x = case.build(), case.inputs()
        linger.prepare(model, (x,))
        if case.fold:
            linger.fuse_bn(model)
        linger.quantize(model, linger.QuantConfig(platform=platform, **case.fields))
        findings = linger.check(model, platform)
        runs = platform not in case.refused and platform not in case.wrong
        assert findings.deployable is runs, f"{case.refused.get(platform)}\n{findings}"


# A case of several samples, which the engine takes one by one.
OF_A_BATCH = "lstm-batch"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("platform", ["venusa", "arcs", "venus", "mars", "onnxruntime"])
def test_what_the_export_refuses_is_an_error(platform: str) -> None:
    for case in ops_cases.ALL:
        if case.id == OF_A_BATCH:
            continue
        model, inputs = case.build(random.Random(case.id))
        linger.fuse_bn(linger.prepare(model, inputs))
        linger.quantize(model, linger.QuantConfig(platform=platform))
        findings = linger.check(model, platform)
        refusal = case.refusal(platform_of(platform).dialect, platform, 8)
        if refusal is not None:
            assert not findings.deployable, f"{case.id}: {refusal}"
        if limits_of(platform).engine is not None:
            assert linger.resources(model, platform).macs >= 0


# --- the model is left as it was ----------------------------------------------------------------


def plain(model: nn.Module) -> nn.Module:
    return model


def prepared(model: nn.Module) -> nn.Module:
    return linger.prepare(model, SEVEN)


def folded(model: nn.Module) -> nn.Module:
    return linger.fuse_bn(prepared(model))


def quantized(model: nn.Module) -> nn.Module:
    linger.quantize(folded(model), linger.QuantConfig(platform="arcs"))
    return linger.calibrate(model, [SEVEN[0], SEVEN[0] / 2])


def hooks(model: nn.Module) -> list[tuple[str, int]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks")
    return [
        (f"{name}.{kind}", len(getattr(module, kind)))
        for name, module in model.named_modules()
        for kind in kinds
    ]


@pytest.mark.parametrize("call", [linger.check, linger.resources], ids=["check", "resources"])
@pytest.mark.parametrize("make", [plain, prepared, folded, quantized])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(
    make: Callable[[nn.Module], nn.Module], call: Callable[..., Any], training: bool
) -> None:
    torch.manual_seed(0)
    model = make(seven()).train(training)
    model.net[3].eval()  # a mode of its own
    state = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    before = (list(state), modes, hooks(model), dict(model.__dict__))
    summary = "" if make is plain else str(linger.summary(model))
    randomness = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state())
    call(model, "venusa", SEVEN if make is plain else None)
    assert random.getstate() == randomness[0]
    assert np.random.get_state()[1].tolist() == randomness[1]
    assert torch.equal(torch.get_rng_state(), randomness[2])
    modes = [module.training for module in model.modules()]
    assert (list(model.state_dict()), modes, hooks(model), dict(model.__dict__)) == before
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    if make is not plain:
        assert str(linger.summary(model)) == summary


def test_a_checked_model_trains_like_any_other() -> None:
    def trained(checked: bool) -> Tensor:
        torch.manual_seed(0)
        model = prepared(seven())
        if checked:
            linger.check(model, "venus")
        linger.fuse_bn(model)
        linger.quantize(model, linger.QuantConfig(platform="arcs"))
        if checked:
            linger.check(model)
        for _ in range(2):
            model(SEVEN[0]).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(trained(True), trained(False))


def test_a_failing_check_leaves_nothing_behind() -> None:
    model = Lambda(lambda m, x: m.fc(x), fc=nn.Linear(4, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linger.check(model, "venusa", (torch.randn(1, 5),))
    assert hooks(model) == hooks(Lambda(lambda m, x: m.fc(x), fc=nn.Linear(4, 4)))
    assert linger.check(model, "venusa", (torch.randn(1, 4),)).deployable


# --- what is checked ----------------------------------------------------------------------------


def rules(findings: Findings) -> list[str]:
    return [finding.rule for finding in findings]


def test_a_plain_model_is_checked_as_the_callbacks_would_quantize_it() -> None:
    model = ResNet()
    x = (torch.randn(1, 3, 32, 32),)
    linger.fuse_bn(linger.prepare(model, x))
    linger.quantize(model, linger.QuantConfig(platform="mars"))
    assert list(linger.check(ResNet(), "mars", x)) == list(linger.check(model)) != []
    assert list(linger.resources(ResNet(), "mars", x)) == list(linger.resources(model))


def test_the_platform_is_that_of_the_plan() -> None:
    model = quantized(seven())
    assert linger.check(model).platform == "arcs"
    assert linger.check(seven(), None, SEVEN).platform == "venusa"
    found = linger.check(model, "venus")
    assert "other_platform" in rules(found)
    assert "other_platform" not in rules(linger.check(model, "arcs"))


def test_a_setting_that_is_the_same_everywhere_is_one_finding() -> None:
    model = prepared(Chain(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)))
    linger.quantize(model, linger.QuantConfig(rounding="half_even"))
    (finding,) = [item for item in linger.check(model) if item.rule == "rounding"]
    assert (finding.site, finding.found) == ("<model>", "half_even")


def test_a_setting_of_some_sites_is_a_finding_each() -> None:
    model = prepared(Chain(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)))
    linger.quant_module(model.net[1], rounding="half_even")
    linger.quantize(model)
    found = [item for item in linger.check(model) if item.rule == "rounding"]
    assert [item.site for item in found] == ["net.1/conv2d/0"]


def test_what_is_left_out_of_the_quantize_stage_is_named() -> None:
    model = Chain(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    linger.disable_quant(model.net[1])
    (found,) = linger.check(model, "venusa", SEVEN)
    assert (found.rule, found.site) == ("float_op", "net.1/conv2d/0")
    assert found.found == "marked on the module"


def test_a_model_from_a_checkpoint_is_checked_alike(tmp_path: Path) -> None:
    model = quantized(seven())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    twin = linger.load_checkpoint(seven, tmp_path / "model.pt")
    assert list(linger.check(twin)) == list(linger.check(model)) != []
    assert list(linger.resources(twin)) == list(linger.resources(model))


def test_keyword_inputs() -> None:
    model = Lambda(lambda m, *, x, scale: m.fc(x) * scale, fc=nn.Linear(4, 4))
    kwargs = {"x": torch.randn(1, 4), "scale": 2.0}
    assert linger.check(model, "venusa", example_kwargs=kwargs).deployable


def test_a_batch_is_checked_as_one_sample() -> None:
    one, many = (linger.resources(ResNet(), "arcs", (torch.randn(n, 3, 32, 32),)) for n in (1, 6))
    assert list(one) == list(many)
    assert str(one) == str(many)
    assert [str(linger.check(ResNet(), "arcs", (torch.randn(n, 3, 32, 32),))) for n in (1, 6)] == (
        [str(linger.check(ResNet(), "arcs", (torch.randn(2, 3, 32, 32),)))] * 2
    )


def test_masks_of_the_input_are_no_constants() -> None:
    def forward(m: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mask = torch.eye(4) > 0 if mask is None else mask
        return m.fc(x).masked_fill(mask, 0.0)

    model, x = Lambda(forward, fc=nn.Linear(4, 4)), torch.randn(1, 4, 4)
    assert rules(linger.check(model, "venusa", (x,))) == []
    assert rules(linger.check(model, "venusa", (x, torch.eye(4) > 0))) == ["computed_places"]


def test_zeros_before_the_first_convolution() -> None:
    def model(function: Callable[[Tensor], Tensor]) -> nn.Module:
        return Lambda(lambda m, x: m.conv(function(x)), conv=nn.Conv1d(2, 2, 3))

    x = (torch.randn(1, 2, 8),)
    assert list(linger.check(model(lambda x: F.pad(x, (2, 0))), "venusa", x)) == []
    assert rules(linger.check(model(lambda x: F.pad(x, (2, 0), value=1.0)), "venusa", x)) == [
        "float_op"
    ]


# --- errors -------------------------------------------------------------------------------------


def test_unknown_platform() -> None:
    with pytest.raises(linger.ConfigError, match="venusx"):
        linger.check(seven(), "venusx", SEVEN)


def test_a_plain_model_needs_inputs() -> None:
    with pytest.raises(linger.ConfigError, match=r"Chain is not prepared\. Pass `example_inputs`"):
        linger.check(seven(), "venusa")


def test_nothing_to_check() -> None:
    with pytest.raises(linger.UnsupportedError, match="calls no op that can be quantized"):
        linger.check(Lambda(lambda m, x: x.atan()), "venusa", SEVEN)


def test_resources_are_those_of_an_engine() -> None:
    with pytest.raises(linger.ConfigError, match=r"'onnxruntime' has no memories to plan.*venusa"):
        linger.resources(seven(), "onnxruntime", SEVEN)


# --- how findings print -------------------------------------------------------------------------


def finding(severity: Any, rule: str) -> Finding:
    return Finding("conv/conv2d/0", rule, "7x7", "up to 5", severity, "use a smaller one")


def test_errors_come_first() -> None:
    found = Findings([finding("note", "a"), finding("error", "b"), finding("warning", "c")], "arcs")
    assert rules(found) == ["b", "c", "a"]
    assert [item.rule for item in found.of("warning")] == ["c"]
    assert not found.deployable
    assert found[0].rule == "b"
    assert [item.rule for item in found[1:]] == ["c", "a"]
    assert found.summary() == "arcs: cannot be deployed (1 error, 1 warning, 1 note)"
    assert repr(found) == "<Findings of 3 rows>"


def test_a_table() -> None:
    found = Findings([finding("warning", "kernel"), finding("warning", "stride")], "arcs")
    assert found.deployable
    assert str(found).splitlines() == [
        "arcs: can be deployed (2 warnings)",
        "site           rule    found  allowed  severity  remedy",
        "conv/conv2d/0  kernel  7x7    up to 5  warning   use a smaller one",
        "conv/conv2d/0  stride  7x7    up to 5  warning   use a smaller one",
    ]
    table = found.__rich__()
    assert [column.header for column in table.columns][:2] == ["site", "rule"]
    assert table.row_count == 2


@pytest.mark.filterwarnings("ignore")
def test_the_page_shows_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    page, namespace = ROOT / "docs" / "check.md", {}
    exec(blocks(ROOT / "docs" / "quickstart.md")[0], namespace)
    run(page, namespace)
    for printed in ("findings", "needed"):
        assert f"```text\n{namespace[printed]}\n```" in page.read_text(encoding="utf-8")


def test_nothing_found() -> None:
    assert str(Findings([], "arcs")) == "arcs: can be deployed"
    assert Findings([], "arcs").deployable
