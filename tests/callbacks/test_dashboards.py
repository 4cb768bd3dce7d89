"""What the validating callbacks log."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_linger.callbacks import (
    FuseBNCallback,
    IntegerValidatorCallback,
    QuantErrorCallback,
    QuantizeCallback,
)
from lightning_linger.simulate.divergence import measured_sites
from tests.callbacks.boring import Classifier, loader, trainer


def test_tensorboard_holds_every_site_and_a_layout(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    callbacks = [
        FuseBNCallback(),
        QuantizeCallback(at_epoch=1),
        IntegerValidatorCallback(),
        QuantErrorCallback(),
    ]
    model = Classifier()
    run = trainer(tmp_path, callbacks, epochs=3, logger=logger)
    run.fit(model, loader(), loader(2, shuffle=False))
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    tags = events.Tags()
    assert "custom_scalars__config__" in tags["tensors"]
    for site in ("stem/conv2d/0", "conv/conv2d/0", "/add/0", "fc/linear/0"):
        assert site in measured_sites(model)
        for name in ("sqnr", "cosine", "saturation", "exponent", "mismatch", "integer_sqnr"):
            scalars = events.Scalars(f"{name}/{site}")
            assert [event.step for event in scalars] == [6, 9], "once per quantized epoch"
    assert all(event.value == 0.0 for event in events.Scalars("mismatch/stem/conv2d/0"))
    assert all(event.value > 10.0 for event in events.Scalars("sqnr/stem/conv2d/0"))


def test_logged_values_equal_recomputed_ones(tmp_path: Path) -> None:
    callback = QuantErrorCallback()
    model = Classifier(dropout=0.0)
    run = trainer(tmp_path, [QuantizeCallback(), callback], epochs=1)
    data = loader(1, shuffle=False)
    run.fit(model, loader(), data)
    import lightning_linger as linger

    model.eval()
    again = linger.quant_error(model, next(iter(data)))
    assert [row.site for row in again] == [row.site for row in callback.latest]
    for row, logged in zip(again, callback.latest, strict=True):
        assert row.sqnr == pytest.approx(logged.sqnr)
        assert row.saturation == pytest.approx(logged.saturation)


def test_aggregates_can_be_monitored_and_other_loggers_get_the_values(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="run")
    callbacks = [QuantizeCallback(), IntegerValidatorCallback(), QuantErrorCallback()]
    run = trainer(tmp_path, callbacks, epochs=1, logger=logger)
    run.fit(Classifier(), loader(), loader(2))
    assert run.callback_metrics["integer/mismatches"] == 0
    assert run.callback_metrics["integer/mismatch_rate"] == 0
    assert run.callback_metrics["quant_error/worst_sqnr"] > 0
    logger.save()
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert "sqnr/fc/linear/0" in header
    assert "mismatch/fc/linear/0" in header


def test_a_table_is_printed_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trainer(tmp_path, [QuantizeCallback(), IntegerValidatorCallback(rows=2)], epochs=1)
    run.fit(Classifier(), loader(), loader(2))
    printed = capsys.readouterr().out
    assert "Integer model: 0 of" in printed
    assert "SQNR" in printed


def test_validation_is_not_repeated(tmp_path: Path) -> None:
    class Counting(Classifier):
        steps = 0

        def validation_step(self, batch, batch_idx):  # type: ignore[no-untyped-def]
            self.steps += 1
            return super().validation_step(batch, batch_idx)

    pl.seed_everything(0, verbose=False)
    model = Counting()
    callbacks = [QuantizeCallback(), IntegerValidatorCallback(), QuantErrorCallback()]
    run = trainer(tmp_path, callbacks, epochs=1, num_sanity_val_steps=0)
    run.fit(model, loader(), loader(2))
    assert model.steps == 2
