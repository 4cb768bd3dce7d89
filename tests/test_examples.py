"""The examples keep what their tables promise, and the shipped data what its README says."""

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import lightning_linger as linger

pytest.importorskip("sklearn")
pytest.importorskip("onnxruntime")

EXAMPLES = Path(__file__).parents[1] / "examples"
ACCURACIES = ("float", "constrained", "QAT", "integer", "exported")
LAYERS = (
    *("stem", "block1.conv1", "block1.conv2", "down", "block2.conv1", "block2.conv2"),
    *("wide", "fc"),
)
SPLITS = ("train", "validation", "test")


class Examples:
    """Imports the examples as Python does that runs one of them: from their own folder."""

    def __getattr__(self, name: str) -> ModuleType:
        return importlib.import_module(name)


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Examples:
    monkeypatch.syspath_prepend(EXAMPLES)
    return Examples()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_digits_end_to_end(
    examples: Examples, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = examples.digits.main(tmp_path, epochs=3)
    assert set(results) == {"venusa", "onnxruntime"}
    for platform, result in results.items():
        for name in ACCURACIES:
            assert 0.0 < result[name] <= 1.0, f"{platform}: {name}"
        assert result["QAT"] > 0.9, platform
        assert result["integer_vs_exported"] == 0
        assert result["integer"] == result["exported"]
    # Power-of-two scales agree bit for bit; free scales up to rounding ties.
    assert results["venusa"]["fake_vs_integer"] == 0
    assert results["venusa"]["QAT"] == results["venusa"]["integer"]
    assert results["onnxruntime"]["fake_vs_integer"] < 0.02 * 4500

    for name in ("digits.linger.onnx", "digits.qdq.onnx"):
        assert (tmp_path / name).stat().st_size > 0
    for platform in results:
        events = list((tmp_path / "tensorboard" / platform).glob("events.out.tfevents.*"))
        assert len(events) == 1
        state = torch.load(tmp_path / f"digits.{platform}.ckpt", weights_only=False)["state_dict"]
        assert any(key.startswith("_linger.") for key in state)
    printed = capsys.readouterr().out
    assert "450 test images" in printed
    assert "logits that differ" in printed
    assert "tensorboard --logdir" in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_digits_for_tflite(examples: Examples, tmp_path: Path) -> None:
    results = examples.digits.main(tmp_path, epochs=3, platforms=["tflite"])
    assert set(results) == {"tflite"}
    assert results["tflite"]["QAT"] == results["tflite"]["integer"] > 0.9
    assert results["tflite"]["fake_vs_integer"] == 0
    assert not list(tmp_path.glob("*.onnx"))
    assert (tmp_path / "digits.tflite.ckpt").is_file()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("example", "options", "platform"),
    [
        ("kws", {"model": "ds_cnn"}, "venusa"),
        ("kws", {"model": "gru"}, "onnxruntime"),
        ("sequence", {}, "venusa"),
        ("attention", {}, "venusa"),
    ],
)
def test_an_example_end_to_end(
    examples: Examples, example: str, options: dict[str, str], platform: str, tmp_path: Path
) -> None:
    results = getattr(examples, example).main(tmp_path, epochs=4, limit=128, **options)
    assert set(results) == {platform}
    result = results[platform]
    assert set(ACCURACIES) <= set(result)
    assert result["logits"] == 128 * (12 if example == "kws" else 10)
    assert result["integer_vs_exported"] == 0
    ties = 0.02 * result["logits"] if platform == "onnxruntime" else 0
    assert result["fake_vs_integer"] <= ties
    for suffix in ("onnx", "ckpt"):
        assert len(list(tmp_path.rglob(f"*.{platform}.{suffix}"))) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("platform", ["venusa", "onnxruntime"])
def test_resnet_walks_through_the_five_stages(
    examples: Examples, platform: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = examples.resnet.main
    result = main(tmp_path, 4, platform, limit=64, width=4, packer=tmp_path / "tpacker")
    assert set(ACCURACIES) <= set(result)
    assert result["integer_vs_exported"] == 0
    assert result["verified"] == 1.0
    printed = capsys.readouterr().out
    assert f"{platform}: can be deployed" in printed or "Nothing stands against" in printed
    assert "There is no packer" in printed
    assert "equal, 640 output elements in 64 batches" in printed.replace("\n", " ")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nics_fix_trains_in_fixed_point_and_saves_its_scales(
    examples: Examples, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = examples.nics_fix.main(tmp_path, epochs=3)
    assert result["fixed"] > 0.9
    assert result["fixed_vs_integer"] == result["fixed_vs_reloaded"] == 0
    printed = capsys.readouterr().out
    assert "block1.conv1" in printed
    assert "450 test images, 8 bits" in printed
    weight = torch.load(tmp_path / "fixed.pt", weights_only=True)["fc.weight"]
    scale = torch.load(tmp_path / "fixed.pt", weights_only=True)["fc.weight_fp_scale"]
    codes = weight / scale * 128
    assert torch.equal(codes, codes.round())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_algorithms_make_post_training_quantization_work(
    examples: Examples, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = examples.ptq_algorithms.main(tmp_path, epochs=6, steps=60)
    assert list(results) == ["PTQ", "CLE", "CLE, BN", "CLE, bias", "CLE, AdaRound"]
    for platform in ("venusa", "onnxruntime"):
        eight, four, three = (f"{platform}, {bits} bit" for bits in (8, 4, 3))
        assert results["PTQ"][eight] < 0.5 < 0.85 < results["CLE"][eight]
        for better in ("CLE, BN", "CLE, bias", "CLE, AdaRound"):
            assert results[better][four] >= results["CLE"][four] - 0.01, better
            assert results[better][three] > results["CLE"][three] + 0.03, better
    printed = capsys.readouterr().out
    assert "450 test images" in printed
    assert "venusa, 4 bit" in printed


@pytest.mark.filterwarnings("ignore")
def test_row33_row49_a_model_is_calibrated_saved_and_run(
    examples: Examples, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = examples.ptq.main(tmp_path, epochs=3)
    models = [name for name in results if f"{name} differing" in results]
    assert len(models) == 6
    for name in set(models) - {"float", "from CATCH's state dict"}:
        assert results[f"{name} differing"] == 0, name
    # Its ranges are one unit in the last place away, which moves a code in many.
    assert results["from CATCH's state dict differing"] < 0.02 * results["logits"]
    assert results["float"] > 0.9
    assert abs(results["run"] - results["float"]) < 0.01
    assert (tmp_path / "quantized.pt").is_file()
    assert "fc.scale" in torch.load(tmp_path / "catch.pth", weights_only=True)
    assert "run, raw images" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mixed_precision_keeps_its_budget(examples: Examples, tmp_path: Path) -> None:
    results = examples.mixed_precision.main(tmp_path, epochs=2, seeds=1)
    assert list(results) == ["float", "3 bits", "mixed, as 3 bits"]
    for name, methods in results.items():
        assert all(0.0 < accuracy <= 1.0 for accuracy in methods.values()), name
    data = examples.digits.digits_data()
    model = examples.digits.Digits().eval()
    trained = examples.mixed_precision.trained(model, data, 3, None, 1, tmp_path, distill=True)
    assert not [row for row in linger.summary(trained) if row.system == "float"]
    sizes = {
        path: module.weight.numel() for path, module in model.named_modules() if path in LAYERS
    }
    overrides = json.loads((tmp_path / "mixed.3.0.json").read_text())
    assert set(overrides) == set(sizes)
    spent = sum(sizes[layer] * fields["weight_bits"] for layer, fields in overrides.items())
    assert spent <= sum(sizes.values()) * 3
    assert len({fields["weight_bits"] for fields in overrides.values()}) > 1


def cifar_folder(folder: Path, images: int) -> np.ndarray:
    """Write files of the binary layout, and return their records."""
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    records = rng.integers(0, 256, (len(names), images, 3073)).astype(np.uint8)
    records[:, :, 0] %= 10
    for name, part in zip(names, records, strict=True):
        part.tofile(folder / name)
    return records


def test_cifar_is_read_from_its_binary_version(examples: Examples, tmp_path: Path) -> None:
    records = cifar_folder(tmp_path, images=3)
    data = examples.resnet.cifar_data(tmp_path)
    images, labels = data.train.tensors
    assert images.shape == (15, 3, 32, 32)
    assert labels.tolist() == records[:5, :, 0].reshape(-1).tolist()
    pixel = records[1, 2, 1 + 1024 + 32 * 4 + 7] / 255.0 - 0.5
    assert images[5, 1, 4, 7].item() == pytest.approx(pixel, abs=1e-6)
    assert data.test.tensors[1].tolist() == records[5, :, 0].tolist()
    (tmp_path / "data_batch_3.bin").write_bytes(b"\0" * 3074)
    with pytest.raises(SystemExit, match=r"data_batch_3\.bin is no file of CIFAR-10"):
        examples.resnet.cifar_data(tmp_path)
    (tmp_path / "test_batch.bin").unlink()
    with pytest.raises(SystemExit, match=r"lacks test_batch\.bin.*binary version.*pickles"):
        examples.resnet.cifar_data(tmp_path)


def test_enlarged_digits_have_the_shape_of_the_resnet(examples: Examples) -> None:
    model, data = examples.resnet.ResNet(width=4), examples.resnet.digits_data(limit=3)
    images, _ = data.train.tensors
    assert images.shape == (3, *model.example_input_array.shape[1:])
    assert model.eval()(images).shape == (3, 10)


@pytest.mark.parametrize(
    ("example", "model"),
    [
        ("digits", "Digits"),
        ("resnet", "ResNet"),
        ("kws", "DSCNN"),
        ("kws", "GRU"),
        ("sequence", "RowReader"),
        ("attention", "RowEncoder"),
    ],
)
def test_the_models_are_quantized_completely(examples: Examples, example: str, model: str) -> None:
    net = getattr(getattr(examples, example), model)()
    inputs = torch.rand(8, *net.example_input_array.shape[1:])
    linger.prepare(net, (inputs[:2],))
    linger.fuse_bn(net)
    linger.quantize(net)
    net.train()(inputs)
    assert not [row for row in linger.summary(net) if row.system == "float"]


def test_stages_are_measured_on_the_test_data(examples: Examples, tmp_path: Path) -> None:
    common = examples.common
    inputs, labels = torch.eye(4), torch.arange(4)
    data = common.TensorData((inputs, labels), (inputs, labels.flip(0)), (inputs, labels))
    stages = common.StageAccuracy(1, 2, data.test)

    class Identity(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    class Trainer:
        sanity_checking = False
        current_epoch = 0

    trainer = Trainer()
    stages.on_validation_end(trainer, Identity())
    assert stages.accuracy == {"float": 0.0}
    trainer.current_epoch = 1
    stages.on_validation_end(trainer, Identity())
    trainer.current_epoch = 2
    stages.on_validation_end(trainer, Identity())
    assert set(stages.accuracy) == {"float", "constrained"}

    empty = common.StageAccuracy(1, 1, data.test)
    trainer.current_epoch = 0
    empty.on_validation_end(trainer, Identity())
    assert set(empty.accuracy) == {"float"}


def test_training_data_comes_in_the_same_order_whatever_was_drawn_before(
    examples: Examples,
) -> None:
    numbers = torch.arange(64)
    data = examples.common.TensorData((numbers, numbers), (numbers, numbers), batch_size=16)
    first = [batch for batch, _ in data.train_dataloader()]
    torch.rand(3)
    again = [batch for batch, _ in data.train_dataloader()]
    assert torch.equal(torch.stack(first), torch.stack(again))
    assert not torch.equal(torch.cat(first), numbers)


def test_elements_that_differ_are_counted(examples: Examples) -> None:
    differing = examples.common.differing
    assert differing(torch.ones(3), torch.ones(3)) == 0
    assert differing(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])) == 2


@pytest.fixture
def features(examples: Examples) -> dict[str, np.ndarray]:
    with np.load(examples.make_kws_features.FEATURES, allow_pickle=False) as file:
        return dict(file)


def test_keyword_features_are_as_described(
    examples: Examples, features: dict[str, np.ndarray]
) -> None:
    maker = examples.make_kws_features
    assert tuple(features["classes"]) == maker.CLASSES
    spoken = {}
    for split in SPLITS:
        codes, labels = features[f"{split}_codes"], features[f"{split}_labels"]
        assert codes.dtype == np.uint8
        assert codes.shape[1:] == (maker.FRAMES, maker.MELS) == (49, 16)
        assert codes.max() <= maker.HIGHEST_CODE
        expected = maker.EXAMPLES_PER_CLASS[split]
        assert np.bincount(labels).tolist() == [expected] * len(maker.CLASSES)
        spoken[split] = {features["voices"][index] for index in features[f"{split}_voices"]}
        assert spoken[split] == set(maker.VOICES[split].split())
    assert not spoken["train"] & spoken["test"]
    assert not spoken["train"] & spoken["validation"]
    assert not spoken["validation"] & spoken["test"]
    metadata = json.loads(str(features["metadata"]))
    assert metadata["made_by"].startswith("examples/make_kws_features.py with espeak-ng ")
    assert maker.FEATURES.stat().st_size < 2.5e6


def drawn(maker: ModuleType) -> dict[str, list]:
    rng = np.random.default_rng(maker.SEED)
    return {split: maker.plan(split, rng) for split in maker.VOICES}


def test_keyword_features_come_from_the_script(
    examples: Examples, features: dict[str, np.ndarray]
) -> None:
    maker = examples.make_kws_features
    for split, plan in drawn(maker).items():
        assert features[f"{split}_labels"].tolist() == [label for label, _ in plan]
        names = features["voices"][features[f"{split}_voices"]].tolist()
        assert names == [utterance.voice for _, utterance in plan]
        silent = [index for index, (_, utterance) in enumerate(plan) if utterance.word is None]
        for index in silent[:10]:
            made = maker.log_mel(maker.mix(plan[index][1])).astype(int)
            # Another FFT may round a code at a tie differently.
            assert np.abs(made - features[f"{split}_codes"][index]).max() <= 1
            assert np.mean(made != features[f"{split}_codes"][index]) < 0.01


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="needs espeak-ng")
def test_keyword_features_are_made_again(
    examples: Examples, features: dict[str, np.ndarray]
) -> None:
    maker = examples.make_kws_features
    version = json.loads(str(features["metadata"]))["made_by"].split()[-1]
    if maker.espeak_version() != version:
        pytest.skip(f"needs espeak-ng {version}")
    for split, plan in drawn(maker).items():
        for index in range(8):
            made = maker.log_mel(maker.mix(plan[index][1])).astype(int)
            assert np.abs(made - features[f"{split}_codes"][index]).max() <= 1


def test_resampling_keeps_a_tone(examples: Examples) -> None:
    maker = examples.make_kws_features
    time = np.arange(22050) / 22050
    resampled = maker.resample(np.sin(2 * np.pi * 440 * time), 22050)
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert len(resampled) == 16000
    assert np.abs(resampled - expected).max() < 1e-6


def test_keyword_data_has_the_shape_and_the_values_of_its_model(
    examples: Examples, features: dict[str, np.ndarray]
) -> None:
    kws = examples.kws
    path = examples.make_kws_features.FEATURES
    for name, (make_model, _, _) in kws.MODELS.items():
        model, data = make_model(), kws.kws_data(path, name, limit=4)
        inputs, labels = data.train.tensors
        assert inputs.shape == (4, *model.example_input_array.shape[1:])
        assert model(inputs).shape == (4, kws.CLASSES)
        assert labels.tolist() == features["train_labels"][:4].tolist()
        values = features["train_codes"][:4] * 0.25 - 8.0
        kept = inputs.reshape(4, -1, kws.MELS).numpy()
        assert np.array_equal(kept, values[:, : kept.shape[1]])
