"""Learned ranges in a run: the optimizer has them, off means untouched, a resume has the bits."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

import lightning_linger as linger
from lightning_linger import QuantizationWarning
from lightning_linger.callbacks import FuseBNCallback, QuantizeCallback
from lightning_linger.callbacks._compat import MisconfigurationException
from lightning_linger.callbacks.optimizers import check_learned_ranges
from tests.callbacks.boring import Classifier, fitted, loader, trainer


class Grouped(Classifier):
    """Does what the message asks for."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(linger.parameter_groups(self), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)]


class Missing(Classifier):
    """Names the parameters it knows."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        layers = (self.stem, self.bn, self.conv, self.fc)
        return torch.optim.SGD([p for layer in layers for p in layer.parameters()], lr=1e-2)


class Plain(Classifier):
    """No weight decay anywhere."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


class Ranges(pl.Callback):
    """Notes the learned ranges at the end of every epoch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.seen.append({n: float(p) for n, p in linger.learned_ranges(pl_module).items()})


def stack(at_epoch: int = 1) -> list[Any]:
    learned = QuantizeCallback(at_epoch=at_epoch, range="tqt", weight_range="lsq")
    return [FuseBNCallback(at_epoch=0), learned]


def test_ranges_stay_while_off_and_move_while_on(tmp_path: Path) -> None:
    seen = Ranges()
    model = Grouped()
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        trainer(tmp_path, [*stack(), seen], 3).fit(model, loader(), loader(2, shuffle=False))
    first, second, third = seen.seen
    assert set(first.values()) == {1.0}
    assert all(second[name] != third[name] for name in first)


def test_weight_decay_on_ranges_is_named_with_its_repair(tmp_path: Path) -> None:
    with pytest.warns(QuantizationWarning, match=r"Weight decay.*\n.*parameter_groups\(self\)"):
        fitted(tmp_path, stack(), 1)


@pytest.mark.parametrize("model", [Plain, Grouped])
def test_no_decay_no_warning(model: type[Classifier], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", QuantizationWarning)
        trainer(tmp_path, stack(), 1).fit(model(), loader())


def test_an_optimizer_without_them_is_refused_with_two_lines(tmp_path: Path) -> None:
    expected = (
        r"of \d+ learned ranges are in no optimizer.*`_linger\.site.*\n"
        r"    groups = linger\.parameter_groups\(self\)\n"
        r"    optimizer = torch\.optim\.AdamW\(groups, lr=\.\.\.\)"
    )
    with pytest.raises(MisconfigurationException, match=expected):
        trainer(tmp_path, stack(), 1).fit(Missing(), loader())
    # Nothing is learned, nothing is missing.
    trainer(tmp_path, [QuantizeCallback()], 1).fit(Missing(), loader())


def test_a_resumed_run_has_the_same_bits(tmp_path: Path) -> None:
    def run(name: str, ckpt: Path | None = None) -> dict[str, torch.Tensor]:
        pl.seed_everything(1, verbose=False)
        model = Grouped(dropout=0.0)
        saver = pl.callbacks.ModelCheckpoint(tmp_path / name, filename="{epoch}", save_top_k=-1)
        fit = trainer(tmp_path, [*stack(), saver], 3, enable_checkpointing=True)
        fit.fit(model, loader(shuffle=False), ckpt_path=ckpt)
        return model.state_dict()

    whole = run("whole")
    for epoch in (0, 1):
        again = run(f"again-{epoch}", tmp_path / "whole" / f"epoch={epoch}.ckpt")
        assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_ddp_has_to_expect_ranges_that_start_late() -> None:
    model = Grouped()
    linger.prepare(model, (torch.randn(2, 1, 6, 6),))
    linger.quantize(model, linger.QuantConfig(range="lsq"))

    class Strategy:
        _ddp_kwargs: dict[str, bool]

    class Run:
        strategy = Strategy()
        optimizers = (torch.optim.SGD(model.parameters(), lr=0.1),)

    Strategy._ddp_kwargs = {}
    with pytest.raises(MisconfigurationException, match="ddp_find_unused_parameters_true"):
        check_learned_ranges(Run(), model, late=True)
    check_learned_ranges(Run(), model, late=False)
    Strategy._ddp_kwargs = {"find_unused_parameters": True}
    check_learned_ranges(Run(), model, late=True)
