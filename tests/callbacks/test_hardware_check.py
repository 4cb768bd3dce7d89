"""`HardwareCheckCallback` in a Trainer: it speaks before training, and changes nothing."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.callbacks import FuseBNCallback, HardwareCheckCallback, QuantizeCallback
from lightning_linger.core.instrumentation import STATE_NAME
from tests.callbacks.boring import Classifier, fitted, loader, trainer


class Wide(Classifier):
    """Has a kernel that no engine runs; counts what was called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 7, padding=3)
        self.optimizers_made = 0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.optimizers_made += 1
        return super().configure_optimizers()


class MadeLate(Wide):
    """Makes its layers in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        del self.conv

    def configure_model(self) -> None:
        if not hasattr(self, "conv"):
            self.conv = nn.Conv2d(8, 8, 7, padding=3)


class ByHand(Wide):
    """Optimizes by itself, so that its step cannot be tried."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def fit(
    model: pl.LightningModule, folder: Path, *callbacks: Any, **kwargs: Any
) -> pl.LightningModule:
    trainer(folder, list(callbacks), epochs=1, **kwargs).fit(model, loader())
    return model


@pytest.mark.parametrize("make", [Wide, MadeLate])
@pytest.mark.parametrize("others", [(), (FuseBNCallback, QuantizeCallback)], ids=["alone", "qat"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
def test_an_error_stops_before_anything_is_trained(
    tmp_path: Path, make: type[Wide], others: tuple[Any, ...], first: bool
) -> None:
    torch.manual_seed(0)
    model = make()
    own = HardwareCheckCallback("arcs")
    callbacks = [callback() for callback in others]
    callbacks.insert(0 if first else len(callbacks), own)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(MisconfigurationException, match="cannot be deployed") as caught:
        fit(model, tmp_path, *callbacks)
    assert "conv/conv2d/0" in str(caught.value)
    assert "stack smaller kernels" in str(caught.value)
    assert model.losses == []
    assert model.optimizers_made == 0
    assert own.findings is not None
    assert [finding.rule for finding in own.findings.of("error")] == ["kernel"]
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value), key


def test_without_other_callbacks_no_bit_changes(tmp_path: Path) -> None:
    plain = fitted(tmp_path, [])
    checked = fitted(tmp_path, [HardwareCheckCallback("arcs")])
    assert torch.equal(torch.stack(plain.losses), torch.stack(checked.losses))
    assert list(checked.state_dict()) == list(plain.state_dict())
    assert not hasattr(checked, STATE_NAME)


def test_beside_the_stages_no_bit_changes(tmp_path: Path) -> None:
    runs = [
        fitted(tmp_path, [*extra, FuseBNCallback(), QuantizeCallback(platform="arcs")])
        for extra in ([], [HardwareCheckCallback()])
    ]
    assert torch.equal(*(torch.stack(model.losses) for model in runs))
    for key, value in runs[0].state_dict().items():
        assert torch.equal(value, runs[1].state_dict()[key]), key


def test_the_platform_is_that_of_the_quantize_stage(tmp_path: Path) -> None:
    own, other = HardwareCheckCallback(), HardwareCheckCallback("venus", on_error="warn")
    with pytest.warns(linger.QuantizationWarning, match="other_platform"):
        fitted(tmp_path, [own, other, QuantizeCallback(platform="arcs")], epochs=1)
    assert own.findings is not None
    assert own.findings.platform == "arcs"
    assert own.findings.deployable
    assert other.findings is not None
    assert other.findings.platform == "venus"


def test_the_plan_of_the_stages_is_checked(tmp_path: Path) -> None:
    own = HardwareCheckCallback()
    with pytest.raises(MisconfigurationException, match="operand_bits"):
        fit(Classifier(), tmp_path, QuantizeCallback(activation_bits=16, output_bits=16), own)
    own = HardwareCheckCallback(on_error="warn")
    with pytest.warns(linger.QuantizationWarning, match="float_op"):
        fitted(tmp_path, [QuantizeCallback(overrides={"conv": None}), own], epochs=1)
    assert own.findings is not None
    assert [finding.site for finding in own.findings] == ["conv/conv2d/0"]


def test_on_error_warn_trains(tmp_path: Path) -> None:
    model = Wide()
    with pytest.warns(linger.QuantizationWarning, match=r"(?s)cannot be deployed.*kernel") as seen:
        fit(model, tmp_path, HardwareCheckCallback(on_error="warn"))
    assert len([item for item in seen if "HardwareCheckCallback" in str(item.message)]) == 1
    assert len(model.losses) == 3


def test_a_warning_does_not_stop(tmp_path: Path) -> None:
    with pytest.warns(linger.QuantizationWarning, match=r"mars: can be deployed \(1 warning\)"):
        model = fitted(tmp_path, [HardwareCheckCallback("mars")], epochs=1)
    assert len(model.losses) == 3


def test_nothing_found_says_nothing(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fitted(tmp_path, [HardwareCheckCallback("arcs")], epochs=1)
    assert not [item for item in seen if issubclass(item.category, linger.QuantizationWarning)]


def test_only_a_fit_is_checked(tmp_path: Path) -> None:
    own = HardwareCheckCallback("arcs")
    run = trainer(tmp_path, [own])
    run.validate(Wide(), loader(shuffle=False), verbose=False)
    run.predict(Wide(), loader(shuffle=False))
    assert own.findings is None


def test_a_second_fit_is_checked_again(tmp_path: Path) -> None:
    model = fitted(tmp_path, [QuantizeCallback()], epochs=1)
    own = HardwareCheckCallback("venus", on_error="warn")
    with pytest.warns(linger.QuantizationWarning, match="other_platform"):
        fit(model, tmp_path, own)
    assert own.findings is not None
    assert own.findings.platform == "venus"


def test_manual_optimization_needs_an_example(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match="example_input_array"):
        fit(ByHand(), tmp_path, HardwareCheckCallback())
    model = ByHand()
    model.example_input_array = torch.randn(2, 1, 6, 6)
    with pytest.raises(MisconfigurationException, match="cannot be deployed"):
        fit(model, tmp_path, HardwareCheckCallback())
    assert not hasattr(model, STATE_NAME)


def test_an_example_needs_no_data(tmp_path: Path) -> None:
    class Broken(torch.utils.data.Dataset[Tensor]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:
            msg = "must not be read"
            raise RuntimeError(msg)

    model = Wide()
    model.example_input_array = torch.randn(1, 1, 6, 6)
    with pytest.raises(MisconfigurationException, match="cannot be deployed"):
        trainer(tmp_path, [HardwareCheckCallback()]).fit(
            model, torch.utils.data.DataLoader(Broken())
        )


def test_an_example_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    model = Classifier()
    model.example_input_array = torch.randn(1, 3, 6, 6)
    with pytest.raises(RuntimeError, match="expected input"):
        fit(model, tmp_path, HardwareCheckCallback())
    assert not hasattr(model, STATE_NAME)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("on_error", ["ignore", None, True])
def test_on_error_is_validated(on_error: Any) -> None:
    with pytest.raises(linger.ConfigError, match="`on_error` must be one of"):
        HardwareCheckCallback(on_error=on_error)


def test_the_platform_is_validated() -> None:
    with pytest.raises(linger.ConfigError, match="venusx"):
        HardwareCheckCallback("venusx")


def test_the_unified_namespace_works_too(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    assert isinstance(HardwareCheckCallback(), lightning.Callback)
