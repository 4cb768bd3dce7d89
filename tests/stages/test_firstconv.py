"""Models that take raw images: the result is that of normalized ones, bit for bit."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightning_linger as linger
from lightning_linger.core.instrumentation import is_prepared
from lightning_linger.stages.firstconv import code_differences, raw_site
from tests.models import Lambda, site_of
from tests.stages.test_mlu import Net, config, net, run

IMAGENET = linger.FirstConv([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
GREY = linger.FirstConv([0.1307], [0.3081])


def raw_images(channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (4, channels, 9, 9), dtype=torch.uint8, generator=generator)


def by_hand(raw: Tensor, firstconv: linger.FirstConv) -> Tensor:
    """Return the image as torchvision's `ToTensor` and `Normalize` make it."""
    x = raw.float().div(255)
    mean = torch.as_tensor(firstconv.mean, dtype=torch.float32)
    std = torch.as_tensor(firstconv.std, dtype=torch.float32)
    return x.sub_(mean[:, None, None]).div_(std[:, None, None])


def calibrated(firstconv: linger.FirstConv = IMAGENET, **fields: Any) -> nn.Module:
    torch.manual_seed(0)
    channels = len(firstconv.mean)
    model = Net(channels).eval()
    images = by_hand(raw_images(channels), firstconv)
    return linger.calibrate(model, [images], config(**fields), firstconv=firstconv)


# --- what is allowed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mean", "std", "named"),
    [
        ([0.5], [0.0], r"std must be in \(0, 1\]"),
        ([0.5], [-0.1], r"std must be in \(0, 1\]"),
        ([0.5], [1.1], r"std must be in \(0, 1\]"),
        ([0.5], [float("nan")], r"std must be in \(0, 1\]"),
        ([1.0], [0.5], r"mean must be in \[0, 1\)"),
        ([-0.1], [0.5], r"mean must be in \[0, 1\)"),
        ([123.7, 116.3, 103.5], [0.5, 0.5, 0.5], r"mean must be in \[0, 1\)"),
        ([0.5, 0.5], [0.5, 0.5], r"one value per channel, \(1, 3, 4\) of them. Found: 2 and 2"),
        ([0.5], [0.5, 0.5, 0.5], "Found: 1 and 3"),
        ([], [], "Found: 0 and 0"),
        (None, [0.5], "mean is a list of numbers. Found: None"),
        ([0.5], None, "std is a list of numbers. Found: None"),
        (0.5, [0.5], "mean is a list of numbers"),
        (["0.5"], [0.5], "mean is a list of numbers"),
    ],
)
def test_row40_mean_and_std_are_checked(mean: Any, std: Any, named: str) -> None:
    with pytest.raises(linger.ConfigError, match=named):
        linger.FirstConv(mean, std)


@pytest.mark.parametrize("spec", [{"mean": [0.5]}, {"std": [0.5]}, {}, [0.5], {"means": [0.5]}])
def test_row40_both_are_needed(spec: Any) -> None:
    with pytest.raises(linger.ConfigError, match="needs both mean and std"):
        linger.FirstConv.parse(spec)


def test_row40_the_end_of_the_ranges() -> None:
    assert linger.FirstConv([0], [1]) == linger.FirstConv((0.0,), (1.0,))
    assert linger.FirstConv.parse({"mean": [0], "std": [1]}) == linger.FirstConv((0.0,), (1.0,))


def test_row40_it_is_off_by_default() -> None:
    model = linger.calibrate(net(), [by_hand(raw_images(), IMAGENET)], config())
    assert raw_site(model) is None
    for system in (torch.no_grad(), linger.integer(model)):
        with system, pytest.raises(linger.ConfigError, match="`early/conv2d/0` got uint8"):
            model(raw_images())
    with pytest.raises(linger.UnsupportedError, match="takes no raw images"):
        code_differences(model)


# --- what comes of it ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "firstconv",
    [GREY, IMAGENET, linger.FirstConv([0.4, 0.3, 0.2, 0.9], [0.1, 0.2, 0.3, 0.9])],
    ids=["grey", "rgb", "rgba"],
)
@pytest.mark.parametrize(
    "fields", [{}, {"granularity": "channel"}, {"activation_bits": 16}], ids=str
)
def test_row40_raw_images_give_what_normalized_ones_give(
    firstconv: linger.FirstConv, fields: dict[str, Any]
) -> None:
    model = calibrated(firstconv, **fields)
    for seed in range(3):
        raw = raw_images(len(firstconv.mean), seed)
        assert torch.equal(run(model, raw), run(model, by_hand(raw, firstconv)))


def test_row40_the_edges_are_zeros_of_the_normalized_image() -> None:
    """Folding mean and std into the weights would pad with black pixels instead."""
    x = by_hand(raw_images(), IMAGENET)
    conv = nn.Conv2d(3, 5, 3, padding=2, padding_mode="zeros")
    expected = conv(x)
    linger.calibrate(conv, [x], config(weight_bits=16, activation_bits=16), firstconv=IMAGENET)
    found = run(conv, raw_images())
    assert torch.allclose(found, expected, atol=1e-3)
    # The corner sees one pixel and eight zeros: here the two ways differ most.
    assert torch.allclose(found[..., 0, 0], expected[..., 0, 0], atol=1e-3)


def test_row40_raw_batches_calibrate_as_normalized_ones() -> None:
    raw = raw_images()
    model = linger.calibrate(net(), [raw], config(), firstconv=IMAGENET)
    twin = calibrated()
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value) or key.endswith("_extra_state"), key
    named = linger.calibrate(net(), [{"x": raw}], config(), firstconv=IMAGENET)
    assert torch.equal(run(named, raw), run(model, raw))


def test_row40_the_state_is_that_of_one_model() -> None:
    """A second model in the process takes raw images too, with its own normalization."""
    first, second = calibrated(), calibrated(linger.FirstConv([0.5] * 3, [0.25] * 3))
    raw = raw_images()
    assert torch.equal(run(first, raw), run(first, by_hand(raw, IMAGENET)))
    assert not torch.equal(run(first, raw), run(second, raw))
    plain = linger.calibrate(net(), [by_hand(raw, IMAGENET)], config())
    assert raw_site(plain) is None


def test_row33_row40_it_comes_back_from_the_state_dict(tmp_path: Path) -> None:
    model = calibrated()
    torch.save(model.state_dict(), tmp_path / "quantized.pt")
    loaded = linger.load_checkpoint(Net, tmp_path / "quantized.pt").eval()
    assert torch.equal(run(loaded, raw_images()), run(model, raw_images()))
    with pytest.raises(linger.ConfigError, match="'firstconv' is missing here"):
        linger.calibrate(net(), [by_hand(raw_images(), IMAGENET)], config()).load_state_dict(
            model.state_dict()
        )


def test_row41_the_first_convolution_is_the_first_that_runs() -> None:
    model = calibrated()
    assert next(m for m in model.modules() if isinstance(m, nn.Conv2d)) is model.late
    site = raw_site(model)
    assert site is not None
    assert site.owner is model.early


def test_row40_raw_training_batches_move_ranges_and_weights() -> None:
    raw = raw_images()
    model, twin = calibrated().train(), calibrated().train()
    for each, x in ((model, raw), (twin, by_hand(raw, IMAGENET))):
        each(x).square().sum().backward()
    for name, parameter in twin.named_parameters():
        assert torch.equal(model.get_parameter(name).grad, parameter.grad), name


def test_row40_taken_back() -> None:
    model = calibrated()
    x = by_hand(raw_images(), IMAGENET)
    expected = run(model, x)
    again = linger.take_raw_images(model, linger.FirstConv([0.5] * 3, [0.25] * 3))
    assert torch.equal(run(again, x), expected)
    assert torch.equal(
        run(again, raw_images()),
        run(again, by_hand(raw_images(), linger.FirstConv([0.5] * 3, [0.25] * 3))),
    )


def test_row40_where_the_normalization_is_written_otherwise() -> None:
    model = calibrated()
    site = raw_site(model)
    assert site is not None
    quantizer: Any = site.inputs["0"]
    step = np.float32(quantizer.step())
    values = np.arange(256, dtype=np.float32)
    differing = 0
    for mean, std in zip(IMAGENET.mean, IMAGENET.std, strict=True):
        mean, std = np.float32(mean), np.float32(std)
        here = (values / np.float32(255) - mean) / std
        there = (values - mean * np.float32(255)) / (std * np.float32(255))
        codes = [np.clip(np.rint(x / step), -128, 127) for x in (here, there)]
        differing += int((codes[0] != codes[1]).sum())
    assert code_differences(model) == differing
    # Of 16-bit codes some do.
    assert 0 < code_differences(calibrated(activation_bits=16)) < 20


def test_row40_folded_batch_norms() -> None:
    x = by_hand(raw_images(), IMAGENET)
    model = linger.prepare(net(), (x,))
    linger.fuse_bn(model)
    linger.calibrate(model, [x], config(), firstconv=IMAGENET)
    assert torch.equal(run(model, raw_images()), run(model, x))
    rows = linger.divergence(model, raw_images())
    assert [row.mismatches for row in rows] == [0] * len(rows)


def test_row40_on_another_platform() -> None:
    x = by_hand(raw_images(), IMAGENET)
    model = linger.calibrate(net(), [x], linger.QuantConfig(), firstconv=IMAGENET)
    assert torch.equal(run(model, raw_images()), run(model, x))


def channels_last(self: Any, x: Tensor) -> Tensor:
    return self.conv(x.permute(0, 3, 1, 2).contiguous())


def test_row40_the_order_of_pixels_may_change_in_the_model() -> None:
    raw = raw_images()
    torch.manual_seed(0)
    model = Lambda(channels_last, conv=nn.Conv2d(3, 4, 3))
    x = by_hand(raw, IMAGENET).permute(0, 2, 3, 1)
    linger.calibrate(model, [x], config(), firstconv=IMAGENET)
    assert torch.equal(run(model, raw.permute(0, 2, 3, 1)), run(model, x))


def _conv(forward: Callable[..., Tensor]) -> nn.Module:
    return Lambda(forward, conv=nn.Conv2d(3, 4, 3), more=nn.Conv2d(3, 4, 3), fc=nn.Linear(9, 4))


@pytest.mark.parametrize(
    ("forward", "named"),
    [
        pytest.param(
            lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1))), r"reads what `/pad/0` at .*", id="pad"
        ),
        pytest.param(lambda m, x: m.conv(x.float()), "reads what `/cast/0`", id="cast"),
        pytest.param(lambda m, x: m.conv(x * 2.0), "reads what `/mul/0`", id="product"),
        pytest.param(
            lambda m, x: m.conv(x) + m.more(x),
            r"is read elsewhere too .*more/conv2d/0",
            id="branch",
        ),
        pytest.param(lambda m, x: (m.conv(x), x), r"read elsewhere too .*<output>", id="returned"),
        pytest.param(lambda m, x: m.fc(x), "runs no two-dimensional convolution", id="none"),
        pytest.param(
            lambda m, x: m.conv(x) if m.training else m.more(x),
            "in training another convolution runs first",
            id="training",
        ),
    ],
)
def test_row40_row41_what_cannot_take_raw_images(forward: Any, named: str) -> None:
    model = _conv(forward)
    with pytest.raises(linger.UnsupportedError, match=named):
        linger.calibrate(model, [by_hand(raw_images(), IMAGENET)], config(), firstconv=IMAGENET)
    assert not is_prepared(model)


def test_row40_as_many_channels_as_the_convolution_reads() -> None:
    with pytest.raises(
        linger.UnsupportedError, match=r"of 1 channels, `early/conv2d/0` .* reads 3"
    ):
        linger.calibrate(net(), [by_hand(raw_images(), IMAGENET)], config(), firstconv=GREY)


def test_row40_a_convolution_of_each_channel() -> None:
    raw = raw_images()
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 6, 3, groups=3, padding=1)
    expected = conv(by_hand(raw, IMAGENET))
    model = linger.calibrate(conv, [raw], config(), firstconv=IMAGENET)
    assert torch.equal(run(model, raw), run(model, by_hand(raw, IMAGENET)))
    assert torch.allclose(run(model, raw), expected, atol=0.05)


@pytest.mark.parametrize("platform", ["mlu", "tflite"])
def test_row40_raw_images_need_firstconv(platform: str) -> None:
    model = net()
    fields = {"output_bits": None} if platform == "mlu" else {}
    with pytest.raises(linger.ConfigError, match=r"takes no uint8 tensors.*`firstconv`"):
        linger.calibrate(model, [raw_images()], linger.QuantConfig(platform=platform, **fields))
    assert not is_prepared(model)


def test_row40_pixels_as_real_numbers_are_noticed() -> None:
    raw = raw_images()
    assert IMAGENET.reach == pytest.approx(float(by_hand(raw_ends(), IMAGENET).abs().max()))
    for wrong in (raw.float(), {"x": raw.double().float()}):
        with pytest.warns(linger.QuantizationWarning, match=r"reaches 255; .*as uint8 tensors"):
            linger.calibrate(net(), [wrong], config(), firstconv=IMAGENET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linger.calibrate(net(), [by_hand(raw, IMAGENET)], config(), firstconv=IMAGENET)
        linger.calibrate(net(), [raw], config(), firstconv=IMAGENET)


def raw_ends() -> Tensor:
    return torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)


def test_row40_the_convolution_has_to_be_quantized() -> None:
    model = net()
    with pytest.raises(linger.ConfigError, match="`early/conv2d/0` has to be quantized"):
        linger.calibrate(
            model,
            [by_hand(raw_images(), IMAGENET)],
            config(),
            overrides={"early": None},
            firstconv=IMAGENET,
        )
    assert not is_prepared(model)


def test_row40_half_precision_and_graphs() -> None:
    raw = raw_images()
    model = calibrated()
    expected = run(model, raw)
    with torch.no_grad():
        traced = torch.jit.trace(model, raw, check_trace=False)
        program = torch.export.export(model, (raw,), strict=False)
    assert torch.equal(traced(raw), expected)
    assert torch.equal(program.module()(raw), expected)
    model.half()
    assert raw_site(model).raw_images.mean.dtype == torch.float32
    assert torch.equal(run(model, raw), run(model, by_hand(raw, IMAGENET).half()))


def test_row40_the_exported_file_takes_raw_images(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    raw = raw_images()
    model = calibrated(granularity="channel")
    path = linger.export_onnx(model, (raw,), tmp_path / "model.onnx", "qdq")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(uint8)"
    (found,) = session.run(None, {"x": raw.numpy()})
    # The batch norm, ReLU and mean between the layers are other libraries' floats.
    assert np.allclose(found, run(model, raw).numpy(), atol=1e-4)

    conv = nn.Conv2d(3, 5, 3, padding=1)
    linger.calibrate(conv, [by_hand(raw, IMAGENET)], config(), firstconv=IMAGENET)
    path = linger.export_onnx(conv, (raw,), tmp_path / "conv.onnx", "qdq")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: raw.numpy()})
    assert np.array_equal(found, run(conv, raw).numpy())


def test_planned_again_without_losing_it() -> None:
    model = calibrated()
    linger.quantize(model, config(weight_bits=16))
    assert raw_site(model) is site_of(model, "early/conv2d/0")
