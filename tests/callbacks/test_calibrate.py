"""Post-training quantization at the end of a run."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import lightning_linger as linger
from lightning_linger.callbacks import (
    CalibrateCallback,
    FuseBNCallback,
    NormalizeCallback,
    ONNXExportCallback,
    QuantizeCallback,
)
from lightning_linger.core.instrumentation import instrumentation_of
from tests.callbacks.boring import Classifier, fitted, loader, trainer
from tests.callbacks.test_entry_points import Manual, assert_integer_exact


def own(model: Any) -> dict[str, torch.Tensor]:
    return {k: v for k, v in model.state_dict().items() if not k.startswith("_linger.")}


def test_weights_are_those_of_the_float_run(tmp_path: Path) -> None:
    plain = fitted(tmp_path, [])
    export = ONNXExportCallback(tmp_path / "model.onnx")
    quantized = fitted(tmp_path, [CalibrateCallback(batches=2), export])
    assert torch.equal(torch.stack(plain.losses), torch.stack(quantized.losses))
    for key, value in own(plain).items():
        assert torch.equal(value, own(quantized)[key]), key
    assert instrumentation_of(quantized).switches.quantize
    assert_integer_exact(quantized)
    assert export.mismatches == 0


def test_ranges_are_those_of_the_function(tmp_path: Path) -> None:
    """The callback sees the batches that the loader gives, as `linger.calibrate` does."""
    pl.seed_everything(2, verbose=False)
    model = Classifier()
    ordered = loader(3, shuffle=False)
    trainer(tmp_path, [CalibrateCallback(batches=2)], epochs=1).fit(model, ordered)
    twin = Classifier()
    twin.load_state_dict(own(model))
    batches = [batch[0] for batch, _ in zip(ordered, range(2), strict=False)]
    linger.prepare(twin, (batches[0],))
    linger.calibrate(twin, batches, linger.QuantConfig(range="absmax"))
    state = twin.state_dict()
    ranges = [key for key in state if key.endswith(".range")]
    assert ranges
    for key in ranges:
        assert torch.equal(state[key], model.state_dict()[key]), key


def test_with_folding_and_limits(tmp_path: Path) -> None:
    stages = [FuseBNCallback(), NormalizeCallback(), CalibrateCallback()]
    model = fitted(tmp_path, stages)
    assert_integer_exact(model)
    path = tmp_path / "model.ckpt"
    torch.save(model.state_dict(), path)
    twin = linger.load_checkpoint(Classifier, path)
    assert_integer_exact(twin)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"batches.*positive.*0"):
        CalibrateCallback(batches=0)
    with pytest.raises(Exception, match=r"manual optimization.*linger.calibrate"):
        trainer(tmp_path, [CalibrateCallback()], epochs=1).fit(Manual(), loader())
    with pytest.raises(Exception, match=r"two "):
        fitted(tmp_path, [QuantizeCallback(), CalibrateCallback()])
