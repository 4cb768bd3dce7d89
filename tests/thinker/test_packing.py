"""Exported models become chip images, or are refused for the reason that is written down."""

from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_linger as linger
from lightning_linger.export import OnnxIntegerRunner, export_onnx
from lightning_linger.export.capture import flat_tensors
from lightning_linger.export.packer import pack
from tests.thinker.cases import ALL
from tests.thinker.cases.case import ENGINES, PLATFORMS, PackCase
from tests.thinker.packing_table import PAGE, page


def targets() -> list[object]:
    """Every case on every platform; what is alike on all of them is slow on all but one."""
    found = []
    for case in ALL:
        # What the export refuses everywhere for one reason is tried once.
        for platform in PLATFORMS[:1] if case.refused_by_export else PLATFORMS:
            special = bool(case.vectors) or platform in case.refused or platform in case.wrong
            slow = platform != PLATFORMS[0] and not special
            marks = [pytest.mark.slow] if slow else []
            found.append(pytest.param(case, platform, id=f"{case.name}-{platform}", marks=marks))
    return found


def exported(case: PackCase, platform: str, folder: Path, dialect: str = "linger") -> Path:
    """Export a case, and check its file in the runner."""
    model, x = case.build(), case.inputs()
    linger.prepare(model, (x,))
    if case.fold:
        linger.fuse_bn(model)
    linger.quantize(model, linger.QuantConfig(platform=platform, **case.fields))
    model.train()
    with torch.no_grad():
        for _ in range(2):
            model(x)
    model.eval()
    path = export_onnx(model, (x,), folder / f"{case.name}.onnx", dialect)
    with linger.integer(model), torch.no_grad():
        expected = flat_tensors(model(x))
    runner = OnnxIntegerRunner(path)
    found = runner.run({runner.input_names[0]: x.numpy()}).values()
    for result, wanted in zip(found, expected, strict=True):
        assert np.array_equal(result, wanted.numpy())
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "platform"), targets())
def test_model_is_packed_or_refused(packer: Path, tmp_path: Path, case: PackCase, platform: str):
    refused = case.refused.get(platform)
    if refused is not None and refused.by == "export":
        with pytest.raises(linger.UnsupportedError, match=refused.match):
            exported(case, platform, tmp_path)
        return
    path, image_path = exported(case, platform, tmp_path), tmp_path / "model.pkg"
    if refused is not None:
        with pytest.raises(linger.UnsupportedError, match=refused.match):
            pack(path, image_path, packer)
        assert not image_path.exists()
        return
    packed = pack(path, image_path, packer)
    assert packed.platform == ENGINES[platform]
    assert packed.path == image_path
    assert image_path.stat().st_size > 0


def test_images_are_the_same_bytes(packer: Path, tmp_path: Path):
    path = exported(next(case for case in ALL if case.name == "conv2d"), "venusa", tmp_path)
    images = [pack(path, tmp_path / name, packer).path.read_bytes() for name in ("a.pkg", "b.pkg")]
    assert images[0] == images[1]


def test_a_file_for_another_platform_is_refused(packer: Path, tmp_path: Path):
    path = exported(next(case for case in ALL if case.name == "add"), "arcs", tmp_path)
    with pytest.raises(linger.UnsupportedError, match="Platform mismatch"):
        pack(path, tmp_path / "model.pkg", packer, options=["-p", "venusa"])


def test_a_packer_that_goes_on_forever_is_stopped(packer: Path, tmp_path: Path):
    """A linear layer of this size is in its way."""
    case = PackCase("large", "", lambda: torch.nn.Linear(140000, 4), lambda: torch.randn(1, 140000))
    path = exported(case, "venusa", tmp_path)
    with pytest.raises(linger.UnsupportedError, match="did not finish"):
        pack(path, tmp_path / "model.pkg", packer, timeout=8)


def test_the_page_tells_what_is_proven():
    assert PAGE.read_text(encoding="utf-8").endswith(page()), (
        "run `python -m tests.thinker.packing_table`"
    )


# Together they have most of the ops, and each is packed everywhere.
BOTH_GENERATIONS = ("cat", "conv_transpose2d", "embedding", "lstm", "mean", "softmax")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BOTH_GENERATIONS)
@pytest.mark.parametrize(
    "platform", [pytest.param(p, marks=[pytest.mark.slow] * (p != "venus")) for p in PLATFORMS]
)
def test_both_generations_of_names_are_one_image(
    packer: Path, tmp_path: Path, name: str, platform: str
):
    case = next(case for case in ALL if case.name == name)
    images = []
    for dialect in ("linger3", "linger1"):
        torch.manual_seed(0)
        image = tmp_path / f"{dialect}.pkg"
        pack(exported(case, platform, tmp_path, dialect), image, packer, timeout=60)
        images.append(image.read_bytes())
    assert images[0] == images[1]
