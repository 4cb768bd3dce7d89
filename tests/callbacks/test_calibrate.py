"""Post-training quantization at the end of a run."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

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


def own(model: Any) -> dict[str, Tensor]:
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


FIRSTCONV = linger.FirstConv([0.4], [0.25])


def test_row33_row40_cambricon_at_the_end_of_a_run(tmp_path: Path) -> None:
    pl.seed_everything(2, verbose=False)
    raw = torch.randint(0, 256, (12, 1, 6, 6), dtype=torch.uint8)
    data = TensorDataset(FIRSTCONV.normalized(raw), torch.randint(0, 4, (12,)))
    model = Classifier()
    callback = CalibrateCallback(batches=2, preset="cambricon", firstconv=FIRSTCONV)
    run = trainer(tmp_path, [callback], epochs=1)
    with warnings.catch_warnings():
        # That everything but layers is float is what was asked for.
        warnings.simplefilter("error", linger.QuantizationWarning)
        run.fit(model, DataLoader(data, 4))
    assert callback.config == linger.preset("cambricon")
    model.eval()
    with torch.no_grad():
        expected = model(FIRSTCONV.normalized(raw))
        assert torch.equal(model(raw), expected)
        with linger.integer(model):
            assert torch.equal(model(raw), expected)
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = linger.load_checkpoint(Classifier, tmp_path / "run.ckpt").eval()
    with torch.no_grad():
        assert torch.equal(loaded(raw), expected)


def test_row46_a_part_that_training_batches_do_not_reach(tmp_path: Path) -> None:
    class Silent(Classifier):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * 0)

    with pytest.warns(linger.QuantizationWarning, match=r"`stem/conv2d/0:input0`.*scale is 1\.0"):
        trainer(tmp_path, [CalibrateCallback(preset="cambricon")], epochs=1).fit(Silent(), loader())


def test_the_range_is_the_presets_unless_it_is_given() -> None:
    assert CalibrateCallback().config.range == "absmax"
    assert CalibrateCallback(preset="cambricon").config.range == "minmax"
    with pytest.raises(linger.ConfigError, match=r"in the place of \['range'\]"):
        CalibrateCallback(preset="cambricon", range="mse")


@pytest.mark.parametrize(
    ("firstconv", "named"),
    [
        ({"mean": [0.5]}, "needs both mean and std"),
        ({"mean": [0.5], "std": [0.0]}, r"std must be in \(0, 1\]"),
        (0.5, "needs both mean and std"),
    ],
)
def test_row40_wrong_images_are_named_at_once(firstconv: Any, named: str) -> None:
    with pytest.raises(linger.ConfigError, match=named):
        CalibrateCallback(preset="cambricon", firstconv=firstconv)
    spec = {"mean": [0.4], "std": [0.25]}
    assert CalibrateCallback(preset="cambricon", firstconv=spec).firstconv == FIRSTCONV


def test_row40_the_convolution_has_to_be_quantized(tmp_path: Path) -> None:
    callback = CalibrateCallback(preset="cambricon", firstconv=FIRSTCONV, overrides={"stem": None})
    with pytest.raises(linger.ConfigError, match="`stem/conv2d/0` has to be quantized"):
        trainer(tmp_path, [callback], epochs=1).fit(Classifier(), loader())


class TwoLoaders(Classifier):
    """Reads two loaders side by side."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step(batch["first"], batch_idx)


def test_a_collection_of_loaders_is_read_as_in_training(tmp_path: Path) -> None:
    both = {"first": loader(), "second": loader()}
    pl.seed_everything(0, verbose=False)
    module = TwoLoaders()
    trainer(tmp_path, [CalibrateCallback(batches=2)], 1).fit(module, both)
    assert all(site.output.known for site in instrumentation_of(module).sites if site.output)


def test_a_loader_with_a_generator_of_its_own_shuffles_as_without_callbacks(
    tmp_path: Path,
) -> None:
    found = []
    for callbacks in ([], [CalibrateCallback(batches=2)]):
        pl.seed_everything(0, verbose=False)
        module = Classifier()
        dataset = loader().dataset
        shuffled = DataLoader(dataset, 8, shuffle=True, generator=torch.Generator().manual_seed(11))
        trainer(tmp_path, callbacks, 2).fit(module, shuffled)
        found.append(dict(module.named_parameters()))
    for name, weight in found[0].items():
        assert torch.equal(weight, found[1][name]), name
