"""`DumpCallback`: which batches are dumped, and that the fit is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_linger as linger
from lightning_linger.callbacks import DumpCallback, FuseBNCallback, QuantizeCallback
from tests.callbacks.boring import Classifier, fitted, loader, trainer


def test_chosen_batches_are_dumped_and_the_fit_is_the_same(tmp_path: Path) -> None:
    stages: list[Any] = [FuseBNCallback(), QuantizeCallback(at_epoch=1)]
    plain = fitted(tmp_path, stages, epochs=2)
    stages = [FuseBNCallback(), QuantizeCallback(at_epoch=1)]
    dumps = DumpCallback(batches=[0, 2], epochs=[1], compare=True, level=1)
    model = fitted(tmp_path, [*stages, dumps], epochs=2)
    assert {x.name for x in (tmp_path / "dumps").iterdir()} == {
        "train_epoch1_batch0",
        "train_epoch1_batch2",
    }
    state, expected = model.state_dict(), plain.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(model.losses, plain.losses, strict=True))
    dump = linger.read_dump(tmp_path / "dumps" / "train_epoch1_batch0")
    ops = [op.op for op in dump.walk()]
    assert {"cross_entropy", "convolution_backward"} <= set(ops)
    assert {"stem/conv2d/0", "fc/linear/0"} <= {op.info.get("site") for op in dump.walk()}


def test_other_loops_have_dumps_of_their_own(tmp_path: Path) -> None:
    dumps = DumpCallback(tmp_path / "here", loops=["validation", "predict"])
    model, run = Classifier(), trainer(tmp_path, [dumps], epochs=1)
    run.fit(model, loader(), loader(2))
    run.predict(model, loader(1))
    names = sorted(x.name for x in (tmp_path / "here").iterdir())
    # Lightning counts an epoch as done once `fit` has ended.
    assert names == ["validation_epoch0_batch0"]
    again = trainer(tmp_path, [dumps])
    again.predict(model, loader(1))
    assert (tmp_path / "here" / "predict_epoch0_batch0" / "dump.json").exists()


def test_a_batch_that_fails_ends_its_dump(tmp_path: Path) -> None:
    class Failing(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 1:
                msg = "broken step"
                raise ValueError(msg)
            return loss

    with pytest.raises(ValueError, match="broken step"):
        trainer(tmp_path, [DumpCallback(batches=[0, 1])]).fit(Failing(), loader())
    folders = sorted((tmp_path / "dumps").iterdir())
    assert [x.name for x in folders] == ["train_epoch0_batch0", "train_epoch0_batch1"]
    assert all(linger.read_dump(folder).ops for folder in folders)
    count = sum(1 for _ in tmp_path.rglob("op.json"))
    torch.ones(2) + 1
    assert sum(1 for _ in tmp_path.rglob("op.json")) == count


@pytest.mark.parametrize(
    "arguments",
    [{"batches": [-1]}, {"batches": []}, {"epochs": [0.5]}, {"loops": ["fit"]}, {"level": 4}],
)
def test_wrong_arguments_are_errors(arguments: dict[str, Any]) -> None:
    with pytest.raises(linger.ConfigError):
        DumpCallback(**arguments)
