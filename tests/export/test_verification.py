"""A file against its model: the verdict, and the first site at which a changed file differs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.export.verification import (
    compare_raw,
    engine_input,
    engine_output,
    verify,
    write_raw,
)
from tests.models import Chain, Lambda, ResNet, images, trained

DIALECTS = {"linger": "venusa", "qdq": "onnxruntime"}
each_dialect = pytest.mark.parametrize("dialect", DIALECTS)


@pytest.fixture(scope="module", params=DIALECTS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, nn.Module, Path]:
    torch.manual_seed(4)
    config = linger.QuantConfig(platform=DIALECTS[request.param])
    model = trained(ResNet(), images(), config=config, fold="running", steps=3, lr=0.01)
    path = tmp_path_factory.mktemp(request.param) / "model.onnx"
    return request.param, model, linger.export_onnx(model, (images(),), path, request.param)


def samples(count: int = 10) -> dict[str, np.ndarray]:
    torch.manual_seed(8)
    return {"x": images(count).numpy()}


def changed(path: Path, folder: Path, name: str, change: Callable[[np.ndarray], Any]) -> Path:
    """A copy of a file with another constant."""
    proto = onnx.load(path)
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    array = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(array.copy()).astype(array.dtype), name))
    target = folder / "changed.onnx"
    onnx.save(proto, target)
    return target


def flip(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[0] = 100 if array.reshape(-1)[0] < 0 else -100
    return array


def test_an_unchanged_file_is_equal(exported: tuple[str, nn.Module, Path]) -> None:
    _, model, path = exported
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    verdict = verify(model, path, samples(), (images(),))
    assert model.training
    assert verdict.equal
    assert (verdict.batches, verdict.elements, verdict.first) == (3, 3 * 4 * 5, None)
    assert str(verdict) == f"{path}: equal, 60 output elements in 3 batches"
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


SITES = ["stem/conv2d/0", "layers.0.conv2/conv2d/0", "layers.1.conv1/conv2d/0", "fc/linear/0"]


@pytest.mark.parametrize("site", SITES)
def test_the_first_site_that_differs_is_named(
    site: str, exported: tuple[str, nn.Module, Path], tmp_path: Path
) -> None:
    _, model, path = exported
    found = changed(path, tmp_path, f"{site}/weight", flip)
    verdict = verify(model, found, samples(), (images(),))
    assert not verdict.equal
    first = verdict.first
    assert first is not None
    assert first.site == site
    assert isinstance(first.expected, int)
    assert first.expected != first.found
    steps = {p.key: p.value for p in onnx.load(path).metadata_props}["lightning_linger.steps"]
    assert first.scales == json.loads(steps)[site]
    assert first.step == pytest.approx(first.scales["scale_o"])
    text = str(verdict)
    assert f"first difference: `{site}` [" in text
    assert f"expected {first.expected} ({first.expected * first.step:g})" in text
    assert f"scale_o={first.scales['scale_o']}" in text


def test_an_addition_is_found_too(exported: tuple[str, nn.Module, Path], tmp_path: Path) -> None:
    _, model, path = exported
    proto = onnx.load(path)
    node = next(n for n in proto.graph.node if n.name == "layers.0/add/0")
    node.input[1] = node.input[0]
    onnx.save(proto, tmp_path / "m.onnx")
    verdict = verify(model, tmp_path / "m.onnx", samples(4), (images(),))
    assert verdict.first is not None
    assert verdict.first.site == "layers.0/add/0"


def test_a_file_without_metadata_names_the_output(
    exported: tuple[str, nn.Module, Path], tmp_path: Path
) -> None:
    _, model, path = exported
    target = changed(path, tmp_path, "fc/linear/0/weight", flip)
    proto = onnx.load(target)
    del proto.metadata_props[:]
    onnx.save(proto, target)
    verdict = verify(model, target, samples(4), (images(),))
    assert verdict.first is not None
    assert (verdict.first.site, verdict.first.step) == ("output", None)


@each_dialect
def test_every_site_of_an_unchanged_file_is_equal(dialect: str, tmp_path: Path) -> None:
    """What a difference is looked for in: the results of all sites, with their sizes."""
    from lightning_linger.export import verification
    from lightning_linger.export.inputs import Inputs

    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x).relu()
        y = torch.cat([y, m.narrow(x)], 1).mean((2, 3))
        return m.fc(torch.sigmoid(y) * y)

    layers = {"conv": nn.Conv2d(3, 4, 3), "narrow": nn.Conv2d(3, 4, 3), "fc": nn.Linear(8, 3)}
    x = images()
    config = linger.QuantConfig(platform=DIALECTS[dialect])
    model = trained(Lambda(forward, **layers), x, config=config)
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", dialect)
    proto = onnx.load(path)
    names = verification._metadata(proto, "results")
    traced = verification._trace(path, proto, [*names.values()], [x.numpy()])
    results = verification._site_results(model, Inputs(model, (x,), {}), [x.numpy()])
    compared = 0
    for site, (codes, step) in results.items():
        if site in names and step is not None and names[site] in traced:
            assert np.array_equal(verification._codes(traced[names[site]]), codes), site
            compared += 1
    assert compared >= 5


# --- data ---------------------------------------------------------------------------------------


def test_open_batches_take_what_there_is(tmp_path: Path) -> None:
    x = images()
    model = trained(ResNet(), x, config=linger.QuantConfig(platform="onnxruntime"))
    axes = {"x": {0: "batch"}}
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx", "qdq", dynamic_axes=axes)
    assert verify(model, path, samples(5), (x,)).elements == 25
    assert verify(model, path, samples(40), (x,)).batches == 2


def test_data_take_the_type_of_the_input(exported: tuple[str, nn.Module, Path]) -> None:
    _, model, path = exported
    wide = {"x": samples(4)["x"].astype(np.float64)}
    assert verify(model, path, wide, (images(),)).equal


def test_a_file_of_codes_is_refused(tmp_path: Path) -> None:
    model = trained(ResNet(), images())
    path = linger.export_onnx(model, (images(),), tmp_path / "m.onnx", integer_inputs=True)
    with pytest.raises(linger.ConfigError, match=r"takes or gives codes.*without"):
        verify(model, path, samples(4), (images(),))


WRONG: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "another shape": (
        {"x": np.zeros((4, 3, 9, 9), np.float32)},
        r"'x' have the shape \(4, 3, 9, 9\).*takes 4x3x12x12",
    ),
    "nothing": ({}, r"no data for \['x'\]"),
    "no sample": ({"x": np.zeros((0, 3, 12, 12), np.float32)}, r"\(0, 3, 12, 12\)"),
}


@pytest.mark.parametrize(("data", "message"), WRONG.values(), ids=WRONG)
def test_data_that_do_not_fit_are_named(
    data: dict[str, np.ndarray], message: str, exported: tuple[str, nn.Module, Path]
) -> None:
    _, model, path = exported
    with pytest.raises(linger.ConfigError, match=f"(?s){message}"):
        verify(model, path, data, (images(),))


def test_another_model_is_named(exported: tuple[str, nn.Module, Path]) -> None:
    path = exported[2]
    other = trained(Chain(nn.Conv2d(3, 2, 3)), images())
    with pytest.raises(linger.ConfigError, match=r"gives the shapes.*Pass the model"):
        verify(other, path, samples(4), (images(),))
    floating = linger.prepare(ResNet(), (images(),))
    with pytest.raises(linger.NotReadyError, match="quantize stage is off"):
        verify(floating, path, samples(4), (images(),))


# --- the engine's own files ---------------------------------------------------------------------


def test_raw_files_hold_the_codes_of_the_ends(tmp_path: Path) -> None:
    x = images(1)
    model = trained(ResNet(), images())
    path = linger.export_onnx(model, (x,), tmp_path / "m.onnx")
    codes = engine_input(path, {"x": x.numpy()})["x"]
    quant = next(node for node in onnx.load(path).graph.node if node.op_type == "Quant")
    scale = next(a.f for a in quant.attribute if a.name == "scale_x")
    expected = np.clip(np.floor(x.numpy() * scale + 0.5), -128, 127)
    assert codes.dtype == np.int8
    assert np.array_equal(codes, expected)
    written = write_raw(codes, tmp_path / "input.bin")
    assert written.read_bytes() == codes.tobytes()
    ((name, (output, step)),) = engine_output(path, {"x": x.numpy()}).items()
    with torch.no_grad(), linger.integer(model):
        real = model(x).numpy()
    assert np.array_equal(output * np.float32(step), real)
    result = write_raw(output, tmp_path / "output.bin")
    assert compare_raw(result, name, output, step) is None
    wrong = output.copy()
    wrong[0, 2] += 1
    difference = compare_raw(write_raw(wrong, result), name, output, step)
    assert difference is not None
    assert (difference.index, difference.differing) == ((0, 2), 1)
    assert (difference.expected, difference.found) == (int(output[0, 2]), int(wrong[0, 2]))
    assert difference.step == step
    result.write_bytes(b"too long")
    with pytest.raises(linger.ConfigError, match=r"has 8 bytes\. The output 'output' has \d+"):
        compare_raw(result, name, output, step)
    with pytest.raises(linger.ConfigError, match=r"cannot read.*none\.bin"):
        compare_raw(tmp_path / "none.bin", name, output, step)
