"""Wrong input to the callbacks: early, named, with a remedy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_linger.callbacks import (
    FuseBNCallback,
    IntegerValidatorCallback,
    NormalizeCallback,
    QuantErrorCallback,
    QuantizeCallback,
)
from tests.callbacks.boring import Classifier, loader, trainer

ARGUMENTS: dict[str, tuple[Callable[[], Any], str]] = {
    "bits too few": (lambda: QuantizeCallback(weight_bits=1), r"weight_bits.*from 2 to 16.*1"),
    "bits too many": (lambda: QuantizeCallback(output_bits=33), r"output_bits.*from 2 to 32.*33"),
    "bits not whole": (lambda: QuantizeCallback(activation_bits=7.5), r"activation_bits.*7\.5"),
    "unknown platform": (lambda: QuantizeCallback(platform="venusb"), r"venusb.*'venusa'"),
    "unknown scale": (lambda: QuantizeCallback(scale="log"), r"scale.*power_of_two.*log"),
    "unknown range": (lambda: QuantizeCallback(range="sigma"), r"range.*absmax.*ema_.*sigma"),
    "unknown rounding": (lambda: QuantizeCallback(rounding="up"), r"rounding.*half_up"),
    "unknown fuse mode": (lambda: FuseBNCallback(mode="twice"), r"mode.*running.*twice"),
    "limit not positive": (lambda: NormalizeCallback(weight=-1.0), r"limit.*-1\.0"),
    "limit not readable": (lambda: NormalizeCallback(output="8x"), r"7\*mean.*8x"),
    "two schedules": (
        lambda: QuantizeCallback(at_epoch=1, at_step=5),
        r"one of.*at_epoch.*at_step",
    ),
    "negative epoch": (lambda: FuseBNCallback(at_epoch=-1), r"at_epoch.*non-negative.*-1"),
    "ends before it starts": (
        lambda: NormalizeCallback(at_epoch=4, end_epoch=2),
        r"end_epoch.*4",
    ),
    "no batches to validate": (lambda: IntegerValidatorCallback(batches=0), r"batches.*positive"),
    "no epochs to compare": (lambda: QuantErrorCallback(every_n_epochs=0), r"every_n_epochs"),
}


@pytest.mark.parametrize(("build", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_arguments_are_checked_at_once(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


class NoLayers(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return torch.hypot(x.flatten()[:1], self.fc.bias[:1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).sum()


class Subtracting(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.fc((self.conv(x) - x).mean((2, 3)))


class Manual(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


def fit(folder: Path, callbacks: list[Any], model: Any = None, data: Any = None) -> None:
    trainer(folder, callbacks, epochs=1).fit(model or Classifier(), data or loader())


def poisoned() -> DataLoader[Any]:
    images = torch.full((8, 1, 6, 6), float("nan"))
    return DataLoader(TensorDataset(images, torch.zeros(8, dtype=torch.long)), 4)


def empty() -> DataLoader[Any]:
    images, labels = torch.zeros(0, 1, 6, 6), torch.zeros(0, dtype=torch.long)
    return DataLoader([(images, labels)], batch_size=None)


RUNS: dict[str, tuple[Callable[[Path], None], str]] = {
    "stages in an impossible order": (
        lambda folder: fit(folder, [FuseBNCallback(at_epoch=3), QuantizeCallback(at_epoch=1)]),
        r"FuseBNCallback\(at_epoch=3\) cannot start after QuantizeCallback\(at_epoch=1\).*HINT",
    ),
    "two callbacks of a kind": (
        lambda folder: fit(folder, [QuantizeCallback(), QuantizeCallback()]),
        r"two QuantizeCallbacks",
    ),
    "pattern without match": (
        lambda folder: fit(folder, [QuantizeCallback(overrides={"*.fcc": None})]),
        r"'\*\.fcc' matches no module.*'fc'",
    ),
    "unknown type": (
        lambda folder: fit(folder, [QuantizeCallback(types=["Lineer"])]),
        r"'Lineer'.*'Linear'",
    ),
    "unknown field": (
        lambda folder: fit(folder, [QuantizeCallback(overrides={"fc": {"weight_bit": 4}})]),
        r"weight_bit.*'weight_bits'",
    ),
    "unknown layer to fold": (
        lambda folder: fit(folder, [FuseBNCallback(modules=["stam"])]),
        r"'stam' matches no layer.*'stem'",
    ),
    "NaN input": (lambda folder: fit(folder, [QuantizeCallback()], data=poisoned()), r"NaN"),
    "empty batch": (lambda folder: fit(folder, [QuantizeCallback()], data=empty()), r"empty"),
    "no quantizable op": (
        lambda folder: fit(folder, [QuantizeCallback()], model=NoLayers()),
        r"NoLayers calls no op that can be quantized",
    ),
    "nothing selected": (
        lambda folder: fit(folder, [QuantizeCallback(types=[nn.Dropout])]),
        r"no site of Classifier would be quantized.*Widen",
    ),
    "free scale on a shifting platform": (
        lambda folder: fit(folder, [QuantizeCallback(scale="free")]),
        r"stem/conv2d/0.*venusa.*power_of_two",
    ),
    "op the engine lacks": (
        lambda folder: fit(folder, [QuantizeCallback(strict_platform=True)], model=Subtracting()),
        r"/sub/0.*test_errors.py:\d+.*venusa.*cannot run sub.*strict_platform=False",
    ),
    "manual optimization": (
        lambda folder: fit(folder, [QuantizeCallback()], model=Manual()),
        r"manual optimization.*example_input_array",
    ),
    "one-shot stream": (
        lambda folder: fit(folder, [QuantizeCallback()], data=(batch for batch in loader())),
        r"one-shot stream.*example_input_array",
    ),
}


@pytest.mark.parametrize(("run", "message"), RUNS.values(), ids=RUNS.keys())
def test_runs_stop_before_training_with_a_remedy(
    tmp_path: Path, run: Callable[[Path], None], message: str
) -> None:
    with pytest.raises(Exception, match=f"(?is){message}"):
        run(tmp_path)
