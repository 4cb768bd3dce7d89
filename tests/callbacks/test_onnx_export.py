"""Exporting from a running Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from lightning_linger.callbacks import (
    FuseBNCallback,
    NormalizeCallback,
    ONNXExportCallback,
    QuantizeCallback,
)
from tests.callbacks.boring import Classifier, fitted, loader, trainer


@pytest.mark.parametrize(
    ("dialect", "platform"),
    [("linger", "venusa"), ("linger1", "arcs"), ("qdq", "onnxruntime")],
    ids=["linger", "linger1", "qdq"],
)
def test_the_file_at_the_end_of_fit_computes_the_integer_forward(
    tmp_path: Path, dialect: str, platform: str
) -> None:
    export = ONNXExportCallback(tmp_path / "new" / "model.onnx", dialect=dialect)
    fitted(tmp_path, [FuseBNCallback(), QuantizeCallback(platform=platform), export])
    assert export.exported == [tmp_path / "new" / "model.onnx"]
    assert export.mismatches == 0
    onnx.checker.check_model(onnx.load(export.exported[0]))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model.onnx"]


def test_exports_during_training_do_not_change_it(tmp_path: Path) -> None:
    stages = [FuseBNCallback(), QuantizeCallback(at_epoch=1)]
    plain = fitted(tmp_path, stages)
    export = ONNXExportCallback(tmp_path / "model-{epoch}.onnx", at_epoch=[0, 1])
    exported = fitted(tmp_path, [FuseBNCallback(), QuantizeCallback(at_epoch=1), export], epochs=3)
    assert [path.name for path in export.exported] == ["model-0.onnx", "model-1.onnx"]
    assert torch.equal(torch.stack(plain.losses), torch.stack(exported.losses))
    for key, value in plain.state_dict().items():
        assert torch.equal(value, exported.state_dict()[key]), key


def test_a_stage_without_quantization_exports_its_float_mathematics(tmp_path: Path) -> None:
    export = ONNXExportCallback(tmp_path / "{epoch}.onnx", at_epoch=[0, 1])
    fitted(tmp_path, [FuseBNCallback(), QuantizeCallback(at_epoch=1), export], epochs=2)
    ops = {node.op_type for node in onnx.load(export.exported[0]).graph.node}
    assert "Conv" in ops
    assert "QConv2d" not in ops
    assert "QConv2d" in {node.op_type for node in onnx.load(export.exported[1]).graph.node}


def test_a_differing_file_is_reported(tmp_path: Path) -> None:
    export = ONNXExportCallback(tmp_path / "model.onnx", dialect="linger")
    model = fitted(tmp_path, [QuantizeCallback(), export], epochs=1)
    path = export.exported[0]
    graph = onnx.load(path)
    bias = next(t for t in graph.graph.initializer if t.data_type == onnx.TensorProto.INT32)
    bias.CopyFrom(
        onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 100_000, bias.name)
    )
    onnx.save(graph, path)
    target, args, kwargs = export._inputs(model)
    with pytest.warns(UserWarning, match=r"output elements differ"):
        assert export._verify(target, args, kwargs, path)


def test_a_step_that_calls_one_part_exports_that_part(tmp_path: Path) -> None:
    class Part(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    export = ONNXExportCallback(tmp_path / "part.onnx")
    trainer(tmp_path, [QuantizeCallback(), export], epochs=1).fit(Part(), loader())
    assert export.mismatches == 0


def test_options_reach_the_export(tmp_path: Path) -> None:
    options = {"input_names": ["image"], "dynamic_axes": {"image": {0: "batch"}}}
    export = ONNXExportCallback(tmp_path / "m.onnx", options=options)
    fitted(tmp_path, [QuantizeCallback(), export], epochs=1)
    assert export.mismatches == 0
    (value,) = onnx.load(export.exported[0]).graph.input
    assert value.name == "image"
    assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def late(folder: Path) -> None:
    export = ONNXExportCallback(folder / "model.onnx", at_epoch=5)
    trainer(folder, [export], epochs=2).fit(Classifier(), loader())


def under_a_file(folder: Path) -> None:
    (folder / "file").write_text("")
    export = ONNXExportCallback(folder / "file" / "deep" / "model.onnx")
    trainer(folder, [QuantizeCallback(), export], epochs=1).fit(Classifier(), loader())


def before_quantize(folder: Path) -> None:
    export = ONNXExportCallback(folder / "model.onnx", at_epoch=1)
    stages = [QuantizeCallback(at_epoch=2), export]
    trainer(folder, stages, epochs=4).fit(Classifier(), loader())


ERRORS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown dialect": (lambda _: ONNXExportCallback("m.onnx", "qnn"), r"'qnn'.*'linger'.*'qdq'"),
    "unknown option": (
        lambda _: ONNXExportCallback("m.onnx", options={"opset": 18}),
        r"\['opset'\].*opset_version",
    ),
    "negative epoch": (lambda _: ONNXExportCallback("m.onnx", at_epoch=-1), r"at_epoch.*-1"),
    "one path for several epochs": (
        lambda _: ONNXExportCallback("m.onnx", at_epoch=[1, 2]),
        r"\{epoch\}.*m\.onnx",
    ),
    "an epoch that never comes": (late, r"at_epoch=5.*max_epochs=2.*last one is 1"),
    "export before quantize": (
        before_quantize,
        r"at_epoch=\[1\].*before QuantizeCallback\(at_epoch=2\).*HINT",
    ),
    "a folder that cannot be": (under_a_file, r"cannot write.*HINT"),
}


@pytest.mark.parametrize(("run", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_wrong_arguments_name_the_remedy(
    tmp_path: Path, run: Callable[[Path], Any], message: str
) -> None:
    with pytest.raises(Exception, match=f"(?s){message}"):
        run(tmp_path)
    assert not list(tmp_path.rglob("*.onnx"))


@pytest.mark.parametrize("limit", ["99%", "3*mean"])
def test_a_model_with_dynamic_limits_is_exported(tmp_path: Path, limit: str) -> None:
    """The value of a limit is read before the forward is captured, in which it could not be."""
    export = ONNXExportCallback(tmp_path / "model.onnx")
    stages = [FuseBNCallback(), NormalizeCallback(output=limit), QuantizeCallback()]
    fitted(tmp_path, [*stages, export], epochs=2)
    assert export.mismatches == 0
